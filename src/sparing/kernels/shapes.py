"""What callers hand in, checked where an operation is entered: native kernels take addresses and check nothing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["dimensions", "expect", "expect_indices", "misfit"]

FEW = 64  # indices: so few are looked at in Python, which is faster than to call an operation of torch


class Shaped(Protocol):
    @property
    def shape(self) -> torch.Size: ...


def dimensions(name: str, tensor: Shaped, *names: str) -> torch.Size:
    """The shape of a tensor; raises ValueError unless it has as many dimensions as are named."""
    shape = tensor.shape
    if len(shape) != len(names):
        raise misfit(name, tensor, *names)
    return shape


def expect(name: str, tensor: Shaped, *sizes: int) -> None:
    """Raises ValueError unless a tensor has these sizes."""
    if tensor.shape != sizes:
        raise misfit(name, tensor, *sizes)


def expect_indices(name: str, tensor: Tensor, count: int) -> Tensor:
    """An integer tensor [m, n] as int64; raises ValueError unless all it holds are indices of `count` things."""
    if tensor.dtype != torch.int64:
        if tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool:
            raise ValueError(f"{name} has dtype {str(tensor.dtype).removeprefix('torch.')}, expected int64")
        tensor = tensor.long()
    if numbers := tensor.numel():
        rows = tensor.tolist() if numbers <= FEW and tensor.is_cpu else [torch.stack(tensor.aminmax()).tolist()]
        least, most = min(map(min, rows)), max(map(max, rows))
        if least < 0 or most >= count:
            raise ValueError(f"{name} holds {least if least < 0 else most}, expected numbers from 0 to {count - 1}")
    return tensor


def misfit(name: str, tensor: Shaped, *expected: int | str) -> ValueError:
    """What is raised for a tensor that should have another shape."""
    return ValueError(f"{name} has shape {_listed(tensor.shape)}, expected {_listed(expected)}")


def _listed(sizes: Sequence[int | str]) -> str:
    return f"[{', '.join(map(str, sizes))}]"
