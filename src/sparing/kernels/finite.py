"""Whether numbers are finite, also found out while they are copied."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sparing.kernels import dispatch

__all__ = ["all_finite", "copy_finite"]


def all_finite(numbers: Tensor) -> bool:
    """Whether none of the numbers is NaN or infinite. numbers: any shape and floating-point type of 16 bits or more."""
    # The sum is the fastest operation that NaN and infinity survive; one of finite numbers may overflow, too.
    if not numbers.numel() or math.isfinite(numbers.sum().item()):
        return True
    return all(math.isfinite(end.item()) for end in numbers.aminmax())


def copy_finite(target: Tensor, source: Tensor) -> bool:
    """Copy numbers; whether all of them are finite as the target holds them.

    target, source: of one shape and of floating-point types. Of one type that native kernels take it is a single pass
    over memory, else the target is read once more.
    """
    plain = target.dtype == source.dtype and target.is_contiguous() and source.is_contiguous()
    if plain and target.numel() and dispatch.takes(target, source):
        return dispatch.native.copy(
            source=source, target=target, count=target.numel(), bfloat16=target.dtype is torch.bfloat16
        )
    return all_finite(target.copy_(source))
