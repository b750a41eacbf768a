"""What the files of DeepSeek's FP8 releases hold of each tensor: types, shapes and how many. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator

from sparing.config import roles
from sparing.config.formats import Part
from sparing.config.roles import Role, Shape, Tensors

__all__ = ["StoredPart", "stored_parts"]

StoredPart = tuple[Role, int, Part]  # role, how many alike, (torch's name of the type, shape)

BLOCK = 128  # rows and columns of a matrix that share a scale in FP8
IN_FP4 = 32  # columns of an expert that do


def stored_parts(tensors: Tensors, *, experts: str, scale: str) -> Iterator[StoredPart]:
    """The tensors of a file that stand for these, experts one by one, their gates apart from their ups.

    Matrices are in FP8 with a scale for each block of 128 x 128, of which the last may be partial. experts: "fp8", as
    they are; "fp4", with a scale of a byte for 32 columns; "bf16", without scales. scale: torch's name of the type of
    scales in FP8.
    Source: the released repositories.
    """
    for name, (shape, role) in tensors.items():
        copies = 1
        if role is roles.EXPERTS:
            copies, *shape = shape
            if name.endswith(".gate_up_proj"):
                copies, shape[0] = 2 * copies, shape[0] // 2
        for part in _parts(role, tuple(shape), experts if role is roles.EXPERTS else "fp8", scale):
            yield role, copies, part


def _parts(role: Role, shape: Shape, format: str, scale: str) -> tuple[Part, ...]:
    """Numbers, or codes and their scales."""
    if not role.is_matrix or format == "bf16":
        return (("int64" if role is roles.HASH_TABLE else "float32" if role.is_float32 else "bfloat16", shape),)
    out, size = shape
    if format == "fp4":  # two codes in a byte
        return ("int8", (out, -(-size // 2))), ("float8_e8m0fnu", (out, -(-size // IN_FP4)))
    return ("float8_e4m3fn", shape), (scale, (-(-out // BLOCK), -(-size // BLOCK)))
