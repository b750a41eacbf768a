"""Root-mean-square norms and logit soft cap."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.kernels import dispatch
from sparing.kernels.shapes import expect

__all__ = ["residual", "residual_norm", "rms_norm", "softcap"]


def rms_norm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6, shift: float = 0.0) -> Tensor:
    """`x / sqrt(mean(x^2) + eps) * (weight + shift)` over the last dimension, in float32, rounded once.

    x: [..., D] any float dtype; weight: [D] or None, which is 1 whatever the shift; shift: 1.0 where weights are stored
    around zero, as Gemma 3's are; returns x's shape and dtype.
    Raises ValueError for a weight of another shape. Source: Gemma 3 (`1 + weight`), Gemma 4 (the weight as it is).

    >>> rms_norm(torch.tensor([3.0, 4.0]))
    tensor([0.8485, 1.1314])
    """
    if weight is not None:
        expect("weight", weight, x.shape[-1])
    if x.numel() and dispatch.takes(x, weight):
        return _native_norm(x, weight, eps, shift)
    x32 = x.float()
    y = x32 * (x32.square().mean(-1, keepdim=True) + eps).pow(-0.5)
    if weight is not None:
        factor = weight.float() + shift if shift else weight
        y = y * factor.float() if torch.is_grad_enabled() else y.mul_(factor)
    return y.to(x.dtype)


def _native_norm(x: Tensor, weight: Tensor | None, eps: float, shift: float) -> Tensor:
    x, weight = x.contiguous(), None if weight is None else weight.contiguous()
    y, size = torch.empty_like(x), x.shape[-1]
    dispatch.native.norm(
        x=x,
        weight=weight,
        y=y,
        rows=x.numel() // size,
        size=size,
        eps=eps,
        shift=shift,
        bfloat16=x.dtype is torch.bfloat16,
    )
    return y


def residual(
    x: Tensor,
    y: Tensor,
    norm: Tensor | None = None,
    scale: Tensor | None = None,
    eps: float = 1e-6,
    shift: float = 0.0,
) -> Tensor:
    """`(x + rms_norm(y, norm)) * scale`: the residual x [..., D] after a branch that ended in y [..., D].

    norm: [D], None leaves y as it is; scale: [1] or None; shift: as in `rms_norm`. Raises ValueError for other shapes.
    """
    _expect_branch(x, y, norm)
    if scale is not None:
        expect("scale", scale, 1)
    if x.numel() and dispatch.takes(x, y, norm, scale):
        return _native_residual(x, y, norm, scale, None, eps, shift)[0]
    x = x + (y if norm is None else rms_norm(y, norm, eps, shift))
    return x if scale is None else x * scale


def residual_norm(
    x: Tensor, y: Tensor, weight: Tensor, norm: Tensor | None = None, eps: float = 1e-6, shift: float = 0.0
) -> tuple[Tensor, Tensor]:
    """(`residual(x, y, norm)`, its `rms_norm` with `weight` [D]): what a branch leaves, and the next one reads.

    shift: of both norms.
    """
    _expect_branch(x, y, norm)
    expect("weight", weight, x.shape[-1])
    if x.numel() and dispatch.takes(x, y, norm, weight):
        return _native_residual(x, y, norm, None, weight, eps, shift)
    x = residual(x, y, norm, eps=eps, shift=shift)
    return x, rms_norm(x, weight, eps, shift)


def _expect_branch(x: Tensor, y: Tensor, norm: Tensor | None) -> None:
    expect("y", y, *x.shape)
    if norm is not None:
        expect("norm", norm, x.shape[-1])


def _native_residual(
    x: Tensor, y: Tensor, before: Tensor | None, scale: Tensor | None, after: Tensor | None, eps: float, shift: float
) -> tuple[Tensor, Tensor]:
    """The sum and its norm, or the sum twice."""
    x, y, size = x.contiguous(), y.contiguous(), x.shape[-1]
    before, after = (None if weight is None else weight.contiguous() for weight in (before, after))
    total = torch.empty_like(x)
    normed = total if after is None else torch.empty_like(x)
    dispatch.native.residual(
        x=x,
        y=y,
        before=before,
        scale=scale,
        after=after,
        sum=total,
        normed=None if after is None else normed,
        rows=x.numel() // size,
        size=size,
        eps=eps,
        shift=shift,
        bfloat16=x.dtype is torch.bfloat16,
    )
    return total, normed


def softcap(logits: Tensor, cap: float) -> Tensor:
    """`cap * tanh(logits / cap)`: odd, monotone, bounded by `cap`. Any shape and float dtype.

    Source: Gemma 4, `final_logit_softcapping`.
    """
    return torch.tanh(logits / cap) * cap
