"""Root-mean-square norms and logit soft cap."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.kernels import dispatch

__all__ = ["rms_norm", "softcap"]


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * weight` over the last dimension, in float32, rounded once.

    x: [..., D] any float dtype; weight: [D] or None; returns x's shape and dtype.
    Source: Gemma 4 (the weight is stored as is: not `1 + weight`).

    >>> rms_norm(torch.tensor([3.0, 4.0]))
    tensor([0.8485, 1.1314])
    """
    if x.numel() and dispatch.takes(x, weight):
        return _native_norm(x, weight, eps)
    x32 = x.float()
    y = x32 * (x32.square().mean(-1, keepdim=True) + eps).pow(-0.5)
    if weight is not None:
        y = y * weight.float() if torch.is_grad_enabled() else y.mul_(weight)
    return y.to(x.dtype)


def _native_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    x = x.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    dispatch.native.norm(
        x.dtype is torch.bfloat16,
        x.data_ptr(),
        0 if weight is None else weight.contiguous().data_ptr(),
        y.data_ptr(),
        x.numel() // size,
        size,
        eps,
        torch.get_num_threads(),
    )
    return y


def softcap(logits: Tensor, cap: float) -> Tensor:
    """`cap * tanh(logits / cap)`: odd, monotone, bounded by `cap`. Any shape and float dtype.

    Source: Gemma 4, `final_logit_softcapping`.
    """
    return torch.tanh(logits / cap) * cap
