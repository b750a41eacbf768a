"""Which native CPU kernels there are, and which run.

Every operation is a plain PyTorch function; some have a native twin, which its own file calls when `takes` allows it.
The instruction set is that of the machine the program runs on. SPARING_KERNELS=reference, portable, avx2, avx512 or
avx512_bf16 forces another: "reference" is PyTorch alone.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["active", "available", "native", "takes", "using"]

REFERENCE = "reference"
TYPES = (torch.bfloat16, torch.float32)

native: Any = None  # the compiled module; its functions take addresses and check nothing
with suppress(ImportError):  # built without a compiler
    native = import_module("sparing.kernels._native")

_active = REFERENCE


def available() -> list[str]:
    """Names of the sets this machine can run, the slowest first."""
    return [REFERENCE, *(native.sets() if native is not None else [])]


def active() -> str:
    """The set that runs now."""
    return _active


def _use(name: str) -> None:
    global _active
    if name not in available():
        raise ValueError(f"SPARING_KERNELS: no kernels named {name!r} here, choose from {', '.join(available())}")
    if name != REFERENCE:
        native.use(name)
    _active = name


@contextmanager
def using(name: str) -> Iterator[None]:
    """Run with another set for a while. Raises ValueError for one that is not available."""
    before = _active
    _use(name)
    try:
        yield
    finally:
        _use(before)


def takes(*tensors: Tensor | None) -> bool:
    """Whether native kernels can compute with these: on the CPU, all float32 or all bfloat16, no gradient to follow."""
    if _active == REFERENCE:
        return False
    dtype, records = None, torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        dtype = dtype or tensor.dtype
        if tensor.dtype != dtype or not tensor.is_cpu or (records and tensor.requires_grad):
            return False
    return dtype in TYPES


_use(os.environ.get("SPARING_KERNELS") or available()[-1])
