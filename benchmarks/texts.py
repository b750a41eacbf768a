"""Text to measure on: tales, plays and Python source, in passages of equally many tokens, away from calibration."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

    from sparing.models.base import LanguageModel

__all__ = ["GENRES", "calibration", "encode", "passage"]

GENRES = ("tales", "plays", "code")
MODULES = (
    "argparse",
    "tarfile",
    "inspect",
    "zipfile",
    "typing",
    "statistics",
)  # of the standard library that runs this


def passage(model: LanguageModel, genre: str, number: int, tokens: int) -> Tensor:
    """int64 [tokens], the passage `number` of a genre. They lie far apart, and far from what calibration reads."""
    if genre == "code":
        found = importlib.util.find_spec(MODULES[number])
        assert found is not None and found.origin is not None
        text = Path(found.origin).read_text(encoding="utf-8")[15_000:]
    else:
        file, first, apart = {
            "tales": ("fairy_tales.txt", 2_000_000, 300_000),
            "plays": ("shakespeare.txt", 100_000, 90_000),
        }[genre]
        text = _corpus(file)[first + number * apart :]
    return encode(model, text[: 8 * tokens])[:tokens]


def calibration(model: LanguageModel, tokens: int) -> Tensor:
    """int64 [tokens] of tales that no passage is from."""
    return encode(model, _corpus("fairy_tales.txt")[1_000_000 : 1_000_000 + 8 * tokens])[:tokens]


def encode(model: LanguageModel, text: str) -> Tensor:
    """int64 ids, without special tokens."""
    import torch

    assert model.tokenizer is not None
    return torch.tensor(model.tokenizer.encode(text, add_special_tokens=False))


def _corpus(file: str) -> str:
    from sparing.training.data import corpus_file

    return corpus_file(file).read_text(encoding="ascii")
