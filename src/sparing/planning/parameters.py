"""How many parameters a model has, of which kind, and in how many bits each kind is kept. Never imports torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping

from sparing.checkpoint.tensors import TensorSource
from sparing.config.formats import FORMATS, ITEM_SIZES, Part, format_loaded, packed_nbytes, stays_packed
from sparing.config.names import names_in_file
from sparing.config.protocol import HasRelease, ModelConfig
from sparing.config.roles import KINDS, Tensors
from sparing.weights.packed_files import PackedTensors

__all__ = [
    "active_parameters", "bits_per_parameter", "count_parameters", "element_size", "held_bytes", "released_size",
]  # fmt: skip

ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}
# Model types whose published figures leave out an embedding that is not the head too.
WITHOUT_EMBEDDING = ("deepseek_v4", "deepseek_v32")


def count_parameters(tensors: Tensors) -> dict[str, int]:
    """Parameters by kind. Constants, such as layer scalars and the routers' correction biases, are not parameters."""
    counts: dict[str, int] = dict.fromkeys(KINDS, 0)
    for shape, role in tensors.values():
        if role.kind is not None:
            counts[role.kind] += math.prod(shape)
    return counts


def active_parameters(config: ModelConfig, counts: Mapping[str, int]) -> int:
    """Parameters that one token of text makes use of: of the experts only the chosen ones, no per-layer table.

    The token embedding counts in full, also where only a row of it is read, as released figures do; those of DeepSeek
    do not count it.
    """
    unused = counts["lookup"] + counts["self_conditioning"]
    if config.model_type in WITHOUT_EMBEDDING:
        unused += counts["embedding"]
    if counts["experts"]:
        unused += counts["experts"] // config.num_experts * (config.num_experts - config.top_k_experts)
    return sum(counts.values()) - unused


def element_size(config: ModelConfig) -> int:
    """Bytes of one number in the type that `load` chooses by itself: the stored one, else float32."""
    return ELEMENT_SIZES.get(config.stored_dtype, 4)


def held_bytes(config: ModelConfig, weights: str = "stored", tensors: TensorSource | None = None) -> dict[str, int]:
    """Bytes of each kind of parameter once loaded, scales included.

    weights: as in `load`; tensors: of the checkpoint, where there is one: what it packs stays packed. Without one, what
    the release packs, if the config says so.
    Raises ValueError listing the formats for one that is not known.
    """
    if weights != "stored" and weights not in FORMATS:
        raise ValueError(f"weights={weights!r} is not known, use stored, {', '.join(FORMATS)}")
    dense = element_size(config)
    in_file = _packed_in_file(config, tensors) if weights == "stored" else {}
    held: dict[str, int] = dict.fromkeys(KINDS, 0)
    if weights == "stored" and tensors is None and isinstance(config, HasRelease) and config.is_fp8:
        for role, copies, part in config.released(drafting=False):
            if role.kind is not None:
                held[role.kind] += copies * _nbytes(part)
        return held
    for name, (shape, role) in config.tensors().items():
        if role.kind is None:
            continue
        if weights != "stored" and (format := format_loaded(role, shape, weights)):
            nbytes = packed_nbytes(format, shape)
        elif name in in_file:
            nbytes = in_file[name]
        else:
            nbytes = math.prod(shape) * (4 if role.is_float32 else dense)
        held[role.kind] += nbytes
    return held


def released_size(config: HasRelease) -> tuple[int, int]:
    """(tensors, bytes) in the release's files: with the layers that draft, and what is no parameter."""
    parts = list(config.released(drafting=True))
    return sum(copies for _, copies, _ in parts), sum(copies * _nbytes(part) for _, copies, part in parts)


def _nbytes(part: Part) -> int:
    dtype, shape = part
    return math.prod(shape) * ITEM_SIZES[dtype]


def bits_per_parameter(counts: Mapping[str, int], held: Mapping[str, int]) -> dict[str, float]:
    """Bits of each kind of parameter, scales included, on average, from `count_parameters` and `held_bytes`."""
    return {kind: 8 * n / max(counts[kind], 1) for kind, n in held.items()}


def _packed_in_file(config: ModelConfig, tensors: TensorSource | None) -> dict[str, int]:
    """Parameter -> bytes, of those that stay packed; the parts of a stack of experts are added up."""
    held: dict[str, int] = {}
    dtype = config.stored_dtype if config.stored_dtype in ELEMENT_SIZES else "float32"
    if isinstance(tensors, PackedTensors):
        for name, expected in names_in_file(config, tensors.names()).items():
            if (format := tensors.format(name)) and stays_packed(expected.role, format, dtype):
                whole = re.sub(r"\.\d+$", "", expected.parameter)
                held[whole] = held.get(whole, 0) + tensors.nbytes(name)
    return held
