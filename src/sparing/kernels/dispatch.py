"""Which native CPU kernels and Triton kernels there are, and which run.

Every operation is a plain PyTorch function; some have a native twin, which its own file calls when `takes` allows it,
and some a twin for GPUs, which `on_gpu` finds. The instruction set is that of the machine the program runs on.
SPARING_KERNELS=reference, portable, avx2, avx512 or avx512_bf16 forces another: "reference" is PyTorch alone, also on
a GPU.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch import Tensor

__all__ = ["REFERENCE", "active", "available", "native", "on_gpu", "takes", "use"]

REFERENCE = "reference"
TYPES = (torch.bfloat16, torch.float32)
COPIED = (*TYPES, torch.uint8)  # of numbers that are moved as they are

native: Any = None  # the compiled module: kernels that take the fields of cpu/kernels.hpp by name and check no shapes
with suppress(ImportError):  # built without a compiler
    native = import_module("sparing.kernels._native")
    native.attach(torch.get_num_threads, torch.Tensor.data_ptr)

_active = REFERENCE
_plain = False  # the reference was asked for; without a compiler it is active on its own


def available() -> list[str]:
    """Names of the sets this machine can run, the slowest first."""
    return [REFERENCE, *(native.sets() if native is not None else [])]


def active() -> str:
    """The set that runs now."""
    return _active


def use(name: str | None) -> None:
    """Run with another set from now on, None: the fastest. Raises ValueError for one that is not available."""
    global _active, _plain
    chosen = name or available()[-1]
    if chosen not in available():
        raise ValueError(f"SPARING_KERNELS: no kernels named {name!r} here, choose from {', '.join(available())}")
    if chosen != REFERENCE:
        native.use(chosen)
    _active, _plain = chosen, name == REFERENCE


def takes(*tensors: Tensor | None, types: tuple[torch.dtype, ...] = TYPES) -> bool:
    """Whether native kernels can compute with these: on the CPU, all of one of these types, no gradient to follow."""
    if _active == REFERENCE:
        return False
    dtype, records = None, torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        dtype = dtype or tensor.dtype
        if tensor.dtype != dtype or not tensor.is_cpu or (records and tensor.requires_grad):
            return False
    return dtype in types


def on_gpu(name: str, *tensors: Tensor | None) -> Any:
    """The module `kernels.gpu.<name>` if it can compute with these tensors, else None.

    It can on a CUDA device, where Triton is installed and no gradient is to follow. Only then is Triton imported.
    """
    records = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (not tensor.is_cuda or (records and tensor.requires_grad)):
            return None
    return None if _plain else _gpu_module(name)


@cache
def _gpu_module(name: str) -> Any:
    with suppress(ImportError):  # Triton is not installed
        return import_module(f"sparing.kernels.gpu.{name}")
    return None


use(os.environ.get("SPARING_KERNELS"))
