"""Rounding to 16 bits that is right on average: small additions survive where rounding to nearest loses them all."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["stochastic_round"]


def stochastic_round(x: Tensor, dtype: torch.dtype, generator: torch.Generator | None = None) -> Tensor:
    """x rounded to one of its two neighbours in `dtype`, the nearer one more often: the expectation is x.

    x: float32, any shape; dtype: bfloat16 or float16; numbers beyond its range become its largest. generator: on x's
    device. Numbers that `dtype` holds stay as they are.
    Source: P(up) = (|x| - down) / (up - down).
    """
    largest = torch.finfo(dtype).max
    x = x.clamp(-largest, largest)
    near = x.to(dtype)
    bits = near.view(torch.int16)
    down = bits - (near.float().abs() > x.abs()).short()  # sign and magnitude: one less is one step towards zero
    low, high = down.view(dtype).float(), (down + 1).view(dtype).float()
    up = torch.rand(x.shape, generator=generator, device=x.device) * (high - low).abs() < (x - low).abs()
    return (down + up.short()).view(dtype)
