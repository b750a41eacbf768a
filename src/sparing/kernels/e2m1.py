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

__all__ = ["LARGEST", "VALUES", "decode", "encode", "pack", "rounded", "unpack"]

VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
LARGEST = 6.0


def encode(x: Tensor) -> Tensor:
    """Codes uint8 of float32 numbers: to the nearest value, ties to the even code, beyond 6 to 6; -0.0 is code 0."""
    size = x.abs()
    # In each of three ranges values lie evenly; the code is the least of the three counts, as spacing only grows.
    code = torch.minimum((size * 2).round_(), size.round().add_(2))
    code = torch.minimum(code, (size / 2).round_().add_(4)).clamp_(max=7).to(torch.uint8)
    return code | (x < 0).to(torch.uint8) << 3


def rounded(x: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """float32 numbers as the values that stand for them: `decode(encode(x))`, or at random with a generator.

    Of the neighbours lo < hi of |x| the larger is then taken with probability (|x| - lo) / (hi - lo), to 2^-17: the
    mean is x for |x| <= 6.
    """
    size = x.abs().clamp_(max=LARGEST)
    spacing = (size >= 2).float().add_(1).mul_(0.5).add_(size >= 4)  # 0.5 below 2, 1 below 4, 2 above
    size /= spacing
    size = size.round_() if generator is None else size.add_(_uniform(size, generator)).floor_()
    return size.mul_(spacing).copysign_(x)


def _uniform(like: Tensor, generator: torch.Generator) -> Tensor:
    """Numbers in (0, 1), multiples of 2^-17: 16 random bits each, four from every draw of a generator."""
    bits = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device)
    bits.random_(-(2**63), None, generator=generator)
    draws = bits.view(torch.int16)[: like.numel()].view(like.shape)
    return draws.float().add_(32768.5).mul_(2**-16)


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
