"""How many parameters a model has, of which kind, and in how many bits each kind is kept. Never imports torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from sparing.checkpoint.tensors import TensorSource
from sparing.config.formats import FORMATS, format_loaded, packed_nbytes, stays_packed
from sparing.config.names import FLOAT32_TENSORS, names_in_file
from sparing.weights.packed_files import PackedTensors

__all__ = ["active_parameters", "bits_per_parameter", "count_parameters", "element_size", "held_bytes"]

# What a forward pass does with a tensor decides its kind:
#   matrices           multiplied for every token
#   vectors            norms, biases, router scales
#   float32            vectors that stay in float32
#   experts            multiplied for top_k of num_experts
#   embedding          looked up by id; read in full where it also is the head
#   head               an output head of its own
#   lookup             per-layer embedding table: looked up only, can live outside the accelerator
#   self_conditioning  runs in denoising passes only
KINDS: tuple[str, ...] = (
    "matrices", "vectors", "float32", "experts", "embedding", "head", "lookup", "self_conditioning",
)  # fmt: skip

# Constants of a file that released counts leave out.
CONSTANTS = ("layer_scalar", "e_score_correction_bias", "token_ordering")

ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def count_parameters(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Parameters by kind of tensors given as name -> shape.

    Constants, such as layer scalars and the routers' correction biases, are not parameters.
    """
    counts: dict[str, int] = dict.fromkeys(KINDS, 0)
    for name, shape in tensors.items():
        if not name.endswith(CONSTANTS):
            counts[_kind(name, shape)] += math.prod(shape)
    return counts


def _kind(name: str, shape: tuple[int, ...]) -> str:
    if "self_conditioning." in name:
        return "self_conditioning"
    if ".experts." in name:
        return "experts"
    if "embed_tokens_per_layer." in name:
        return "lookup"
    if "embed_tokens." in name or name == "backbone.embeddings.weight":
        return "embedding"
    if name.startswith("lm_head."):
        return "head"
    if len(shape) > 1:
        return "matrices"
    return "float32" if FLOAT32_TENSORS.search(name) else "vectors"


def active_parameters(config: Any, counts: Mapping[str, int]) -> int:
    """Parameters that one token of text makes use of: of the experts only the chosen ones, no per-layer table.

    The token embedding counts in full, also where only a row of it is read, as released figures do.
    """
    unused = counts["lookup"] + counts["self_conditioning"]
    if counts["experts"]:
        unused += counts["experts"] // config.num_experts * (config.num_experts - config.top_k_experts)
    return sum(counts.values()) - unused


def element_size(config: Any) -> int:
    """Bytes of one number in the type that `load` chooses by itself: the stored one, else float32."""
    return ELEMENT_SIZES.get(config.stored_dtype, 4)


def held_bytes(config: Any, weights: str = "stored", tensors: TensorSource | None = None) -> dict[str, int]:
    """Bytes of each kind of parameter once loaded, scales included.

    weights: as in `load`; tensors: of the checkpoint, where there is one: what it packs stays packed.
    Raises ValueError listing the formats for one that is not known.
    """
    if weights != "stored" and weights not in FORMATS:
        raise ValueError(f"weights={weights!r} is not known, use stored, {', '.join(FORMATS)}")
    dense = element_size(config)
    in_file = _packed_in_file(config, tensors) if weights == "stored" else {}
    held: dict[str, int] = dict.fromkeys(KINDS, 0)
    for name, shape in config.tensors().items():
        if name.endswith(CONSTANTS):
            continue
        if weights != "stored" and (format := format_loaded(name, shape, weights, config.packable_head)):
            nbytes = packed_nbytes(format, shape)
        elif name in in_file and stays_packed(name, shape):
            nbytes = in_file[name]
        else:
            nbytes = math.prod(shape) * (4 if FLOAT32_TENSORS.search(name) else dense)
        held[_kind(name, shape)] += nbytes
    return held


def bits_per_parameter(config: Any, weights: str, tensors: TensorSource | None = None) -> dict[str, float]:
    """Bits of each kind of parameter, scales included, on average; arguments and errors as in `held_bytes`."""
    counts = count_parameters(config.tensors())
    return {kind: 8 * n / max(counts[kind], 1) for kind, n in held_bytes(config, weights, tensors).items()}


def _packed_in_file(config: Any, tensors: TensorSource | None) -> dict[str, int]:
    """Parameter -> bytes, of those that a checkpoint packs; the parts of a stack of experts are added up."""
    held: dict[str, int] = {}
    if isinstance(tensors, PackedTensors):
        for name, (parameter, _) in names_in_file(config, tensors.names()).items():
            if tensors.format(name):
                whole = re.sub(r"\.\d+$", "", parameter)
                held[whole] = held.get(whole, 0) + tensors.nbytes(name)
    return held
