"""Blocks of small floats that share a power of two: E2M1 in blocks of 32 (MXFP4), and casts to eight bits.

    packed  uint8  [..., n / 2]     two E2M1 codes a byte, the earlier in the low nibble (`e2m1.py`)
    scale   uint8  [..., n / 32]    UE8M0: the exponent plus 127, of 32 consecutive numbers

    number = e2m1(code) * 2^(scale - 127)

The largest float8_e4m3fn is 448 and there is no infinity: numbers are clamped before they are cast.
Source: OCP Microscaling Formats 1.0; DeepSeek-V4 `kernel.py` for the choice of the scale.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.kernels import e2m1

__all__ = ["BLOCK", "E4M3_LARGEST", "mxfp4_pack", "mxfp4_unpack", "to_e4m3", "ue8m0_decode", "ue8m0_encode"]

BLOCK = 32
E4M3_LARGEST = 448.0
SMALLEST = 6 * 2.0**-126  # largest magnitude of a block whose scale is the smallest normal float32


def ue8m0_encode(a: Tensor) -> Tensor:
    """Bytes uint8 of the powers of two just above positive float32 numbers: 2^ceil(log2 a), from the bits of a.

    Above 2^127, infinity and NaN: 255, which stands for NaN.
    """
    bits = a.float().contiguous().view(torch.int32)
    return ((bits >> 23 & 255) + ((bits & 0x7FFFFF) != 0)).clamp_(max=255).to(torch.uint8)


def ue8m0_decode(byte: Tensor) -> Tensor:
    """float32 2^(byte - 127); byte 0 is 2^-127, byte 255 NaN."""
    bits = torch.where(byte == 0, 1 << 22, byte.to(torch.int32) << 23)
    return torch.where(byte == 255, torch.nan, bits.to(torch.int32).view(torch.float32))


def to_e4m3(x: Tensor) -> Tensor:
    """float8_e4m3fn of numbers: to the nearest, beyond 448 to 448; NaN stays NaN."""
    return x.float().clamp(-E4M3_LARGEST, E4M3_LARGEST).to(torch.float8_e4m3fn)


def mxfp4_pack(w: Tensor) -> tuple[Tensor, Tensor]:
    """(packed uint8 [..., n / 2], scale uint8 [..., n / 32]) of w [..., n].

    The scale is the least power of two with which the largest magnitude of a block is at most 6: nothing saturates.
    Raises ValueError where n is not a multiple of 32.
    """
    if not w.ndim or w.shape[-1] % BLOCK:
        raise ValueError(f"MXFP4 needs a last dimension that is a multiple of {BLOCK}, found shape {list(w.shape)}")
    blocks = w.float().unflatten(-1, (-1, BLOCK))
    scale = ue8m0_encode(blocks.abs().amax(-1).clamp_min(SMALLEST) / e2m1.LARGEST)
    codes = e2m1.encode(blocks / ue8m0_decode(scale)[..., None])
    return e2m1.pack(codes.flatten(-2)), scale


def mxfp4_unpack(packed: Tensor, scale: Tensor) -> Tensor:
    """float32 [..., n] of what `mxfp4_pack` returned, or of a file's tensors."""
    values = e2m1.unpack(packed).unflatten(-1, (-1, BLOCK))
    return (values * ue8m0_decode(scale)[..., None]).flatten(-2)
