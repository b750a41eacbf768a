"""The four-bit float E2M1, the element of NVFP4 and MXFP4.

    bit    3     2 1       0
           sign  exponent  mantissa

    code   0    1    2    3    4    5    6    7          8 + code: the negative
    value  0   0.5   1   1.5   2    3    4    6

Two codes a byte, the earlier one in the low nibble: `byte[j] = code[2 j] | code[2 j + 1] << 4`.
Source: OCP Microscaling Formats 1.0, 5.3.3; NVIDIA Model-Optimizer `nvfp4_tensor.py`.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["LARGEST", "VALUES", "decode", "encode", "pack", "stochastic", "unpack"]

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = 6.0


def encode(x: Tensor) -> Tensor:
    """Codes uint8 of float32 numbers: to the nearest value, ties to the even code, beyond 6 to 6; -0.0 is code 0."""
    size = x.abs()
    # In each of three ranges values lie evenly; the code is the least of the three counts, as spacing only grows.
    code = torch.minimum((size * 2).round_(), size.round().add_(2))
    code = torch.minimum(code, (size / 2).round_().add_(4)).clamp_(max=7).to(torch.uint8)
    return code | (x < 0).to(torch.uint8) << 3


def stochastic(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Codes uint8 of float32 numbers, each rounded up or down at random so that the mean is x, for |x| <= 6.

    Of the neighbours lo < hi the larger is taken with probability (|x| - lo) / (hi - lo).
    """
    size = x.abs().clamp_(max=LARGEST)
    values = torch.tensor(VALUES, device=x.device)
    low = (torch.bucketize(size, values, right=True) - 1).clamp_(max=6)
    gap = values[low + 1] - values[low]
    draw = torch.rand(x.shape, generator=generator, device=x.device)
    code = (low + ((size - values[low]) > draw * gap)).to(torch.uint8)
    return code | (x < 0).to(torch.uint8) << 3


def decode(codes: Tensor) -> Tensor:
    """float32 values of codes uint8 0..15."""
    return _table(codes.device)[codes.int()]


def pack(codes: Tensor) -> Tensor:
    """Bytes [..., n / 2] of codes [..., n]."""
    return codes[..., ::2] | codes[..., 1::2] << 4


def unpack(packed: Tensor) -> Tensor:
    """float32 values [..., 2 n] of bytes [..., n]."""
    return torch.nn.functional.embedding(packed.int(), _pairs(packed.device)).flatten(-2)


@cache
def _table(device: torch.device) -> Tensor:
    return torch.tensor([*VALUES, *(-v for v in VALUES)], device=device)


@cache
def _pairs(device: torch.device) -> Tensor:
    """[256, 2]: both values of every byte."""
    byte = torch.arange(256, device=device)
    return torch.stack([_table(device)[byte & 15], _table(device)[byte >> 4]], -1)
