"""Integers: eight bits with a scale for each row, four bits with a scale for 32 consecutive inputs. Symmetric.

    int8   codes  int8      [..., out, in]        -127..127
           scale  float32   [..., out]
    int4   codes  uint8     [..., out, in / 2]    two codes a byte, the earlier in the low nibble; code - 8 = -8..7
           scale  bfloat16  [..., out, in / 32]   may be negative

    weight = code * scale          weight = (code - 8) * scale

An int4 scale maps the number of largest magnitude to -8, so that all sixteen codes are in use.
Source: the row-wise int8 of LLM.int8 (arXiv 2208.07339); the Q4_0 of ggml for the signed scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.weights.weight import PackedWeight

__all__ = [
    "GROUP",
    "Int4Weight",
    "Int8Weight",
    "int4_dequantize",
    "int4_quantize",
    "int8_dequantize",
    "int8_quantize",
]

GROUP = 32


def int8_quantize(w: Tensor) -> tuple[Tensor, Tensor]:
    """(codes int8 [..., out, in], scale float32 [..., out]) of w [..., out, in]. A row of zeros has scale 1."""
    scale = w.abs().amax(-1).float() / 127
    scale = torch.where(scale > 0, scale, 1.0)
    return (w / scale[..., None]).round_().clamp_(-127, 127).to(torch.int8), scale


def int8_dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [..., out, in]."""
    return codes.float() * scale[..., None].float()


def int4_quantize(w: Tensor, group: int = GROUP) -> tuple[Tensor, Tensor]:
    """(packed uint8 [..., n / 2], scale bfloat16 [..., n / group]) of w [..., n]. A group of zeros has scale 1.

    Raises ValueError where n is not a multiple of `group`.
    """
    if not w.ndim or w.shape[-1] % group:
        raise ValueError(f"int4 needs a last dimension that is a multiple of {group}, found shape {list(w.shape)}")
    groups = w.float().unflatten(-1, (-1, group))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))  # [..., n / group, 1]
    scale = (extreme / -8).bfloat16()
    scale = torch.where(scale != 0, scale, 1.0)
    codes = ((groups / scale.float()).round_().clamp_(-8, 7) + 8).to(torch.uint8).flatten(-2)
    return codes[..., ::2] | codes[..., 1::2] << 4, scale.squeeze(-1)


def int4_dequantize(packed: Tensor, scale: Tensor) -> Tensor:
    """float32 [..., n]; the group is n over the number of scales."""
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).float().sub_(8)
    return (codes.unflatten(-1, (scale.shape[-1], -1)) * scale.float()[..., None]).flatten(-2)


class Int8Weight(PackedWeight):
    """A weight in int8, a scale for each row."""

    format = "int8"

    pack, unpack = staticmethod(int8_quantize), staticmethod(int8_dequantize)


class Int4Weight(PackedWeight):
    """A weight in int4, a scale for each group of inputs."""

    format = "int4"
    per_byte = 2
    native_rows = 16

    pack, unpack = staticmethod(int4_quantize), staticmethod(int4_dequantize)

    @property
    def is_native(self) -> bool:
        return self.scale.dtype == torch.bfloat16 and self.scale.shape[-1] * GROUP == self.shape[-1]
