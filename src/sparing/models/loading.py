"""`sparing.load`: from a checkpoint to a model that runs."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sparing.checkpoint import open_checkpoint
from sparing.config import ARCHITECTURES, parse_config
from sparing.config.formats import FORMATS
from sparing.config.names import names_in_file
from sparing.config.protocol import ModelConfig
from sparing.config.roles import HASH_TABLE, LOOKUP
from sparing.errors import CheckpointError
from sparing.kernels.shapes import expect_indices
from sparing.models.base import LanguageModel
from sparing.weights.load import check_names, load_weights, whole_names
from sparing.weights.stored import stored_weights
from sparing.weights.tied import refuse_other_copies, settle_head

if TYPE_CHECKING:
    from sparing.models.drafting_head import DraftingHead

__all__ = ["build", "load", "load_drafting_head"]

# model_type -> (module in models/, class) of the head that drafts for such a model
DRAFTING_HEADS = {"nemotron_h": ("nemotron3_mtp", "MTPHead"), "deepseek_v4": ("deepseek_v4_mtp", "DeepseekV4MTP")}
DTYPES = ("float32", "bfloat16", "float16")


def load(
    source: str | Path | None = None,
    *,
    dtype: str = "auto",
    weights: str = "stored",
    device: str | torch.device = "auto",
    revision: str | None = None,
    map_embeddings: bool = False,
) -> LanguageModel:
    """Load a model.

    source: a checkpoint folder, a GGUF file, a hub id ("org/name"), or a checkpoint that ships with the package:
    "tales" (also None), "sudoku" or "hybrid". dtype: "auto" (what config.json names, also where matrices are packed;
    float32 where it names none of these, and for GGUF files), "float32", "bfloat16" or "float16". weights: "stored"
    (packed where the file is), or the format in which matrices are packed as they are read: "int8", "int4", "nvfp4",
    "mxfp4" or "fp8". The output head is int8 then, also where it is the embedding too (except in DiffusionGemma and
    drafters). Other embeddings, norms, biases, routers and convolutions stay dense, as do matrices whose inputs are no
    multiple of the format's block (`config.formats`).
    device: "auto" takes a GPU if there is one. revision: of a hub id.
    map_embeddings: leave the per-layer embedding table in the file, read row by row as needed.
    Raises CheckpointError for a missing, damaged or unsupported checkpoint, ValueError for a bad argument.
    """
    if dtype not in ("auto", *DTYPES):
        raise ValueError(f"dtype={dtype!r} is not known, use auto, {', '.join(DTYPES)}")
    if weights != "stored" and weights not in FORMATS:
        raise ValueError(f"weights={weights!r} is not known, use stored, {', '.join(FORMATS)}")
    where = _device(device)
    checkpoint = open_checkpoint(source, revision=revision)
    checkpoint.check_generation_config()
    config = parse_config(checkpoint.config)  # what is wrong with it is said before weights are looked for
    tensors = stored_weights(checkpoint)
    config = settle_head(config, tensors)
    if dtype == "auto":
        dtype = config.stored_dtype if config.stored_dtype in DTYPES else "float32"
    refuse_other_copies(config, tensors)
    expected = names_in_file(config, tensors.names())
    ignore = whole_names(config.tolerated_tensors())
    check_names(tensors, expected, ignore)  # before any layer is made
    model = build(config)
    load_weights(
        model,
        tensors,
        expected,
        dtype=getattr(torch, dtype),
        device=where,
        ignore=ignore,
        keep_mapped=[name for name, (_, _, role) in expected.items() if map_embeddings and role is LOOKUP],
        weights=weights,
    )
    for name, (path, _, role) in expected.items():
        if role is HASH_TABLE:
            _check_experts(f"{tensors.file(name).name}: {name}", model.get_buffer(path), config.num_experts)
    model.path, model.weights = checkpoint.path, weights
    model.tokenizer = checkpoint.tokenizer
    model.generation_config = checkpoint.generation_config
    return model.eval().requires_grad_(False)


def _check_experts(where: str, table: torch.Tensor, experts: int) -> None:
    """Raises CheckpointError unless all numbers of a table are those of experts."""
    try:
        expect_indices(where, table, experts)
    except ValueError as error:
        raise CheckpointError(f"{error}: config.json states {experts} experts") from None


def _device(device: str | torch.device) -> torch.device:
    """Raises ValueError listing the devices that are there for one that is not."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
        if found.type != "meta":  # which holds no numbers
            return torch.empty(0, device=found).device
    except (RuntimeError, AssertionError, TypeError, ValueError):  # however torch puts it that there is no such device
        pass
    there = ["auto", "cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
    if torch.backends.mps.is_available():
        there.append("mps")
    raise ValueError(f"device={str(device)!r} is not there, use {', '.join(there)}")


def build(config: ModelConfig) -> LanguageModel:
    """A model of the config's architecture with parameters on the meta device."""
    module, _, model_class = ARCHITECTURES[config.model_type]
    with torch.device("meta"):
        return getattr(import_module(f"sparing.models.{module}"), model_class)(config)


def load_drafting_head(target: LanguageModel) -> DraftingHead:
    """The head in a model's checkpoint that drafts for it, read when first asked for and packed as the model is.

    Raises ValueError where there is none, CheckpointError where it is damaged or of more than one depth.
    """
    if target.drafting_heads:
        return target.drafting_heads[0]
    instead = "use draft='ngram' or a smaller model"
    model_type = target.config.model_type
    if model_type not in DRAFTING_HEADS or not target.config.mtp.text.layers:  # type: ignore[attr-defined]
        raise ValueError(f"draft='mtp': a {model_type} model has no drafting head, {instead}")
    if target.path is None:
        raise ValueError(f"the model was not loaded from a file that could hold a drafting head: {instead}")
    tensors = stored_weights(open_checkpoint(target.path))
    module, head_class = DRAFTING_HEADS[model_type]
    with torch.device("meta"):
        head: DraftingHead = getattr(import_module(f"sparing.models.{module}"), head_class)(target)
    head.check(tensors.names(), str(target.path))
    load_weights(
        nn.ModuleDict({"mtp": head}),
        tensors,
        names_in_file(target.config.mtp, tensors.names()),  # type: ignore[attr-defined]
        dtype=target.dtype,
        device=target.device,
        ignore=(".",),  # all that is not the head's
        weights=target.weights,
    )
    target.drafting_heads.append(head.eval().requires_grad_(False))
    return head
