"""How many parameters a model has, of which kind, and in how many bits each kind is kept. Never imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparing.config.names import FLOAT32_TENSORS

__all__ = ["FORMATS", "active_parameters", "bits_per_parameter", "count_parameters", "element_size"]

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

# Bits per parameter, block scales included (int4: one 16-bit scale for 32; nvfp4: 8 bits for 16; mxfp4: 8 bits for
# 32). The scale of a whole row or tensor is not counted.
FORMATS = {"fp8": 8.0, "int8": 8.0, "int4": 4.5, "nvfp4": 4.5, "mxfp4": 4.25}
QUANTISED = ("matrices", "experts", "self_conditioning")  # the vocabulary's tables and all vectors stay as stored

ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


def count_parameters(tensors: Mapping[str, tuple[int, ...]]) -> dict[str, int]:
    """Parameters by kind of tensors given as name -> shape.

    Layer scalars and the routers' correction biases are constants, not parameters.
    """
    counts: dict[str, int] = dict.fromkeys(KINDS, 0)
    for name, shape in tensors.items():
        if not name.endswith(("layer_scalar", "e_score_correction_bias")):
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


def bits_per_parameter(config: Any, weights: str) -> dict[str, float]:
    """Bits of each kind of parameter. weights: "stored" or a quantised format, which applies to matrices and experts.

    Raises ValueError listing the formats for one that is not known.
    """
    stored = 8.0 * element_size(config)
    if weights != "stored" and weights not in FORMATS:
        raise ValueError(f"weights={weights!r} is not known, use stored, {', '.join(FORMATS)}")
    bits = {kind: FORMATS[weights] if weights != "stored" and kind in QUANTISED else stored for kind in KINDS}
    return {**bits, "float32": 32.0}
