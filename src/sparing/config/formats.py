"""Which formats weights can be packed in, the tensors each consists of, and which roles take them.

One table: `load` allocates by it and `plan` counts by it. Never imports torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from sparing.config.roles import Role

__all__ = [
    "BLOCKS",
    "FORMATS",
    "HEAD_FORMAT",
    "ITEM_SIZES",
    "PLAIN",
    "Format",
    "Part",
    "format_loaded",
    "is_packed",
    "packed_nbytes",
    "stays_packed",
]

Part = tuple[str, tuple[int, ...]]  # torch's name of the type, shape

ITEM_SIZES = {
    "int8": 1, "uint8": 1, "float8_e4m3fn": 1, "float8_e8m0fnu": 1, "bfloat16": 2, "float32": 4, "int64": 8,
}  # fmt: skip

# The format of the output head beside every other one: a step reads all of it, and four bits of it lose more than they
# save.
HEAD_FORMAT = "int8"


@dataclass(frozen=True)
class Format:
    """block: inputs that share a scale; the number of inputs must be a multiple of it. parts: of a matrix [out, in].

    scales: the ways its scales can be chosen or laid out -> how many rows share one (1: none do, or all), of which
    `best` is what files are written with; scale_shapes: of a matrix, where the ways differ in it.
    """

    name: str
    block: int
    parts: Callable[[int, int], dict[str, Part]]
    scales: Mapping[str, int] = field(default_factory=dict)
    best: str | None = None
    scale_shapes: Mapping[str, Callable[[int, int], tuple[int, ...]]] = field(default_factory=dict)

    def layout(self, shape: Sequence[int], scales: str | None = None) -> dict[str, Part]:
        """Name -> (type, shape) of the tensors that hold a matrix [out, in], or a stack of them [..., out, in]."""
        *stack, out, size = shape
        parts = self.parts(out, size)
        if scales is not None and scales in self.scale_shapes:
            parts["scale"] = (parts["scale"][0], self.scale_shapes[scales](out, size))
        return {name: (dtype, (*stack, *own)) for name, (dtype, own) in parts.items()}

    def checked(self, scales: str | None) -> str | None:
        """The way to choose scales, `best` for None. Raises ValueError for one that is not of this format."""
        if scales is None or scales in self.scales:
            return scales or self.best
        taking = " and ".join(f"{f.name} takes {', '.join(f.scales)}" for f in FORMATS.values() if f.scales)
        raise ValueError(f"scales={scales!r} is not for {self.name}: {taking}")


FORMATS = {
    f.name: f
    for f in (
        Format("int8", 1, lambda out, size: {"codes": ("int8", (out, size)), "scale": ("float32", (out,))}),
        Format(
            "int4",
            32,
            lambda out, size: {"codes": ("uint8", (out, size // 2)), "scale": ("bfloat16", (out, size // 32))},
        ),
        Format(
            "nvfp4",
            16,
            lambda out, size: {
                "codes": ("uint8", (out, size // 2)),
                "scale": ("float8_e4m3fn", (out, size // 16)),
                "scale_2": ("float32", ()),
            },
            scales={"max": 1, "four_over_six": 1, "mse": 1, "2d": 16},
            best="mse",
        ),
        Format(
            "mxfp4",
            32,
            lambda out, size: {"codes": ("uint8", (out, size // 2)), "scale": ("uint8", (out, size // 32))},
        ),
        Format(
            "fp8",
            1,
            lambda out, size: {"codes": ("float8_e4m3fn", (out, size)), "scale": ("float32", (out,))},
            scales={"tensor": 1, "row": 1, "block": 128},
            best="row",
            scale_shapes={"tensor": lambda out, size: (), "block": lambda out, size: (-(-out // 128), -(-size // 128))},
        ),
    )
}

# What a row is made of in a GGUF file, where a weight stays as it lies there: numbers in a block, and its bytes.
BLOCKS = {
    "q4_0": (32, 18), "q4_1": (32, 20), "q5_0": (32, 22), "q5_1": (32, 24), "q8_0": (32, 34), "q2_k": (256, 84),
    "q3_k": (256, 110), "q4_k": (256, 144), "q5_k": (256, 176), "q6_k": (256, 210), "iq4_nl": (32, 18), "f16": (1, 2),
    "bf16": (1, 2),
}  # fmt: skip
PLAIN = {"f16": "float16", "bf16": "bfloat16"}  # of these what is plain in a model of that type


def packed_nbytes(format: str, shape: Sequence[int]) -> int:
    """Bytes of a matrix or stack of matrices in a format, scales included."""
    return sum(math.prod(own) * ITEM_SIZES[dtype] for dtype, own in FORMATS[format].layout(shape).values())


def is_packed(role: Role, shape: Sequence[int], format: str) -> bool:
    """Whether a tensor takes a format itself: a matrix whose number of inputs is a multiple of the format's block."""
    return role.is_matrix and shape[-1] % FORMATS[format].block == 0


def format_loaded(role: Role, shape: Sequence[int], format: str) -> str | None:
    """The format that a tensor has in a model loaded with `weights=format`; None: dense."""
    if role.is_head and role.is_packable:
        return HEAD_FORMAT
    return format if is_packed(role, shape, format) else None


def stays_packed(role: Role, format: str, dtype: str) -> bool:
    """Whether a tensor that a file holds in this format stays so in a model of this dtype.

    Matrices and a head of its own do, and of blocks the tables that are looked up.
    """
    if format in BLOCKS:
        is_table = role.is_looked_up and not role.is_head
        return (role.is_packable or is_table) and PLAIN.get(format) != dtype
    return role.is_packable and not role.is_looked_up
