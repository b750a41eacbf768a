"""How much of a GPU a launch fills, and how its tensor cores multiply float32: what the Triton kernels agree on."""

from __future__ import annotations

from functools import cache

import torch

__all__ = ["PROGRAMS", "multiprocessors", "power", "precision"]

PROGRAMS = 4  # for each multiprocessor


@cache
def multiprocessors(device: torch.device) -> int:
    """How many there are; 1 on a CPU, where kernels are interpreted."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 1


def power(n: int) -> int:
    """The next power of two: Triton's tensors have no other sizes."""
    return 1 << (n - 1).bit_length()


def precision(device: torch.device, exact: bool = True) -> str:
    """How products of float32 are made: of three in bfloat16, good to 2^-16, or of one in TF32, good to 2^-11, if they
    need not be exact or `torch.set_float32_matmul_precision` says so."""
    if device.type == "cpu":  # interpreted
        return "ieee"
    return "bf16x3" if exact and torch.get_float32_matmul_precision() == "highest" else "tf32"
