"""Vocabularies that lie in a folder in another form than tokenizer.json.

vocab.json and merges.txt say nothing of how words are cut: that is known by the class of the tokenizer alone.
Source: Qwen2Tokenizer and GPT2Tokenizer of transformers 5.23.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from sparing.checkpoint.file_names import OTHER_VOCABULARIES
from sparing.checkpoint.gguf.word_patterns import QWEN2
from sparing.checkpoint.json_files import read_object
from sparing.errors import CheckpointError, shown

__all__ = ["class_defaults", "read_vocabulary"]

END = "<|endoftext|>"
DEFAULTS = {
    "Qwen2Tokenizer": {"unk_token": END, "eos_token": END, "pad_token": END},
    "GPT2Tokenizer": {"unk_token": END, "bos_token": END, "eos_token": END},
}
CLASSES = {"qwen2": "Qwen2Tokenizer", "qwen3": "Qwen2Tokenizer"}  # of a model_type, where the folder names none


def class_defaults(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """The special tokens that the folder's class of tokenizer has unless tokenizer_config.json says otherwise."""
    return DEFAULTS.get(_class(folder, config), {})


def read_vocabulary(folder: Path, config: Mapping[str, Any]) -> Backend:
    """The tokenizer of vocab.json and merges.txt.

    config: tokenizer_config.json. Raises CheckpointError that says what to do for every other form.
    """
    found = sorted(file.name for form in OTHER_VOCABULARIES for file in folder.glob(form))
    name = _class(folder, config)
    if not (folder / "vocab.json").is_file() or not (folder / "merges.txt").is_file():
        what = f"its {found[0]} is in a form that cannot be read here" if found else "no vocabulary"
    elif name not in DEFAULTS:
        known = ", ".join(DEFAULTS)
        what = f"its vocab.json is of a tokenizer of class {shown(name)}; only {known} can be read without"
    else:
        return _byte_level(folder, config, by_pattern=name == "Qwen2Tokenizer")
    raise CheckpointError(
        f"{folder}: no tokenizer.json, and {what}. Write one with transformers, where what reads the file is installed:"
        f" AutoTokenizer.from_pretrained(folder).save_pretrained(folder)"
    )


def _byte_level(folder: Path, config: Mapping[str, Any], *, by_pattern: bool) -> Backend:
    prefix = config.get("add_prefix_space") is True
    backend = Backend(BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt")))
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    if not by_pattern:
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)  # pyright: ignore[reportAttributeAccessIssue]
        return backend
    backend.normalizer = normalizers.NFC()  # pyright: ignore[reportAttributeAccessIssue]
    steps = [
        pre_tokenizers.Split(Regex(QWEN2), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=prefix, use_regex=False),
    ]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _class(folder: Path, config: Mapping[str, Any]) -> str:
    model = read_object(folder / "config.json", missing={})
    name = (
        config.get("tokenizer_class") or model.get("tokenizer_class") or CLASSES.get(str(model.get("model_type")), "")
    )
    return str(name).removesuffix("Fast")
