"""Hyper-connections: a residual stream of n copies, which a branch reads as one and writes back to all.

    u = sum_j pre_j X_j,    y = F(u),    X'_k = post_k y + sum_j comb[j, k] X_j

for the streams X [n, H] of each token. Manifold-constrained (mHC), all three weights are functions of the streams, and
comb is nearly doubly stochastic: what a stream receives from the others is a mean of them, whatever the depth. Plain
hyper-connections have fixed weights (`hc_static`). Weights are made and streams are mixed in float32.
Source: Zhu et al., arXiv 2409.19606; Xie et al. (mHC), arXiv 2512.24880; DeepSeek-V4, arXiv 2606.19348.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from sparing.kernels import dispatch
from sparing.kernels.shapes import expect, misfit

__all__ = ["hc_head", "hc_post", "hc_pre", "hc_static", "hyper_connection", "sinkhorn"]

MOST_STREAMS = 8  # of the native kernels


def sinkhorn(logits: Tensor, iters: int = 20, eps: float = 1e-6) -> Tensor:
    """Matrices [..., n, n] with columns (the first index) that sum to 1, to eps, and rows that nearly do.

    logits: [..., n, n], any float dtype; the result is float32, or float64 where they are. A softmax of the rows, then
    the columns are divided by their sums, then `iters - 1` times the rows and the columns; eps is added after the
    softmax and to each sum. Papers write the transposed matrix, whose columns come first: `sinkhorn(logits.mT).mT`.
    Raises ValueError where the last two dimensions differ or iters is below 1.
    Source: DeepSeek-V4 `hc_split_sinkhorn`.

    >>> sinkhorn(torch.tensor([[0.0, 1.0], [2.0, 0.0]]))
    tensor([[0.1824, 0.8176],
            [0.8176, 0.1824]])
    """
    if logits.ndim < 2 or logits.shape[-1] != logits.shape[-2]:
        raise misfit("logits", logits, "...", "n", "n")
    if iters < 1:
        raise ValueError(f"iters is {iters}, expected 1 or more")
    rows = _wide(logits).softmax(-1)
    # Tokens last: an operation then runs over long vectors, where n numbers in a row would leave most of it idle. For
    # up to four streams the sums are the same to the bit.
    matrix = rows.movedim((-2, -1), (0, 1)).contiguous() + eps  # [n, n, ...]
    matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
    for _ in range(iters - 1):
        matrix = matrix / (matrix.sum(1, keepdim=True) + eps)
        matrix = matrix / (matrix.sum(0, keepdim=True) + eps)
    return matrix.movedim((0, 1), (-2, -1)).contiguous()


def hc_pre(
    X: Tensor,
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iters: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """What a branch reads of the streams, and the weights with which they are mixed after it.

    X: [..., n, H] any float dtype; fn: [(2 + n) n, n H], base: [(2 + n) n], both in the order pre (n), post (n), comb
    (n x n, row after row); scale: [3] of the three; float32. Returns u [..., H] in X's dtype, and post [..., n] and
    comb [..., n, n], float32: comb[j, k] is what stream k receives of stream j.
    With v = rms(X) fn^T over all n H numbers, pre = sigmoid(v scale_0 + base) + eps, post = 2 sigmoid(v scale_1 +
    base), comb = sinkhorn(v scale_2 + base). Raises ValueError for other shapes.
    Source: DeepSeek-V4 `hc_pre`.
    """
    n = _expect_weights(X, fn, base, scale, 3)
    if iters < 1:
        raise ValueError(f"iters is {iters}, expected 1 or more")
    if _native_takes(X, fn, base, scale):
        return _native_pre(X, fn, base, scale, iters, eps, norm_eps)
    v, base, scale = _projected(X, fn, norm_eps), _wide(base), _wide(scale)
    pre = torch.sigmoid(v[..., :n] * scale[0] + base[:n]) + eps
    post = 2 * torch.sigmoid(v[..., n : 2 * n] * scale[1] + base[n : 2 * n])
    comb = sinkhorn((v[..., 2 * n :] * scale[2] + base[2 * n :]).unflatten(-1, (n, n)), iters, eps)
    return _collapsed(X, pre), post, comb


def hc_post(X: Tensor, y: Tensor, post: Tensor, comb: Tensor) -> Tensor:
    """The streams after a branch that ended in y: `X'_k = post_k y + sum_j comb[j, k] X_j`, rounded once.

    X: [..., n, H]; y: [..., H]; post: [..., n] and comb: [..., n, n] as `hc_pre` returns them. Returns X's shape and
    dtype. Raises ValueError for other shapes. Source: DeepSeek-V4 `hc_post`.
    """
    *tokens, n, size = _expect_streams(X)
    expect("y", y, *tokens, size)
    expect("post", post, *tokens, n)
    expect("comb", comb, *tokens, n, n)
    if _native_takes(X, post, comb) and dispatch.takes(X, y):
        X, y, post, comb = X.contiguous(), y.contiguous(), post.contiguous(), comb.contiguous()
        mixed = torch.empty_like(X)
        dispatch.native.hyper_post(
            x=X,
            y=y,
            post=post,
            comb=comb,
            out=mixed,
            tokens=math.prod(tokens),
            streams=n,
            size=size,
            bfloat16=X.dtype is torch.bfloat16,
        )
        return mixed
    mixed = torch.addcmul(_wide(comb).mT @ _wide(X), _wide(post)[..., None], _wide(y)[..., None, :])
    return mixed.to(X.dtype)


def hc_head(X: Tensor, fn: Tensor, base: Tensor, scale: Tensor, eps: float = 1e-6, norm_eps: float = 1e-6) -> Tensor:
    """The streams after the last layer as one: `sum_j (sigmoid(v_j scale + base_j) + eps) X_j`, v as in `hc_pre`.

    X: [..., n, H]; fn: [n, n H], base: [n], scale: [1], float32. Returns [..., H] in X's dtype. Raises ValueError for
    other shapes. Source: DeepSeek-V4 `hc_head`.
    """
    _expect_weights(X, fn, base, scale, 1)
    if _native_takes(X, fn, base, scale):
        return _native_pre(X, fn, base, scale, None, eps, norm_eps)[0]
    return _collapsed(X, torch.sigmoid(_projected(X, fn, norm_eps) * _wide(scale) + _wide(base)) + eps)


def hyper_connection(
    X: Tensor,
    F: Callable[[Tensor], Tensor],
    fn: Tensor,
    base: Tensor,
    scale: Tensor,
    iters: int = 20,
    eps: float = 1e-6,
    norm_eps: float = 1e-6,
) -> Tensor:
    """The streams X [..., n, H] after a branch F, a function of [..., H] to [..., H]: `hc_pre`, F, `hc_post`."""
    u, post, comb = hc_pre(X, fn, base, scale, iters, eps, norm_eps)
    return hc_post(X, F(u), post, comb)


def hc_static(X: Tensor, F: Callable[[Tensor], Tensor], a_m: Tensor, A_r: Tensor, b: Tensor) -> Tensor:
    """The streams after a branch with fixed weights: `A_r^T X + b y`, `y = F(a_m^T X)`.

    X: [..., n, H]; a_m: [n], what the branch reads of each stream; A_r: [n, n], first index the stream that gives; b:
    [n], what each receives of the branch. With a_m = e_0, A_r = I, b = 1 and streams that start alike the network is
    a plain residual one. Raises ValueError for other shapes.
    Source: Zhu et al., arXiv 2409.19606, static hyper-connections.
    """
    *tokens, n, _ = _expect_streams(X)
    expect("a_m", a_m, n)
    return hc_post(X, F(_collapsed(X, a_m)), b.expand(*tokens, n), A_r.expand(*tokens, n, n))


def _native_takes(X: Tensor, *weights: Tensor) -> bool:
    return (
        weights[0].dtype is torch.float32
        and 0 < X.shape[-2] <= MOST_STREAMS
        and X.numel() > 0
        and dispatch.takes(X)
        and dispatch.takes(*weights)
    )


def _native_pre(
    X: Tensor, fn: Tensor, base: Tensor, scale: Tensor, iters: int | None, eps: float, norm_eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """`hc_pre`, or where iters is None `hc_head`, with nothing in the other two."""
    *tokens, n, size = X.shape
    X, fn, base, scale = X.contiguous(), fn.contiguous(), base.contiguous(), scale.contiguous()
    u, mixes = X.new_empty(*tokens, size), iters is not None
    post = fn.new_empty(*tokens, n if mixes else 0)
    comb = fn.new_empty(*tokens, n, n if mixes else 0)
    dispatch.native.hyper_pre(
        x=X,
        fn=fn,
        base=base,
        scale=scale,
        u=u,
        post=post if mixes else None,
        comb=comb if mixes else None,
        tokens=math.prod(tokens),
        streams=n,
        size=size,
        iters=iters or 0,
        eps=eps,
        norm_eps=norm_eps,
        bfloat16=X.dtype is torch.bfloat16,
    )
    return u, post, comb


def _projected(X: Tensor, fn: Tensor, eps: float) -> Tensor:
    """`rms(X) fn^T` over all numbers of a token; the factor of the norm comes last, so that X is read once."""
    x = _wide(X.flatten(-2))
    mean = torch.linalg.vector_norm(x, dim=-1, keepdim=True).square() / x.shape[-1]
    return torch.nn.functional.linear(x, _wide(fn)) * (mean + eps).rsqrt()


def _collapsed(X: Tensor, weights: Tensor) -> Tensor:
    """`sum_j weights_j X_j` in X's dtype."""
    return (weights[..., None, :] @ _wide(X)).squeeze(-2).to(X.dtype)


def _wide(x: Tensor) -> Tensor:
    """float32, or float64 where x is."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _expect_streams(X: Tensor) -> torch.Size:
    if X.ndim < 2:
        raise misfit("X", X, "...", "n", "H")
    return X.shape


def _expect_weights(X: Tensor, fn: Tensor, base: Tensor, scale: Tensor, kinds: int) -> int:
    """The number of streams. kinds: 3 (pre, post and comb) or 1 (pre)."""
    *_, n, size = _expect_streams(X)
    functions = (2 + n) * n if kinds == 3 else n
    expect("fn", fn, functions, n * size)
    expect("base", base, functions)
    expect("scale", scale, kinds)
    return n
