"""Which experts a token goes to, and with what weights: two routers."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.kernels import dispatch
from sparing.kernels.norm import rms_norm
from sparing.kernels.products import NATIVE_ROWS, linear
from sparing.kernels.shapes import dimensions, expect, expect_indices

__all__ = ["route", "route_topk", "router_scores"]

LEAST_LOGIT = -87.0  # of a softplus: the root of it has a gradient in float32 as long as it is not 0


def route_topk(
    r: Tensor, scale: Tensor, proj: Tensor, per_expert_scale: Tensor, k: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(weights float32 [M, k], expert ids int64 [M, k]) for each token of the residual r [M, H].

    scale: [H]; proj: [E, H]; per_expert_scale: [E]. Softmax over all experts, top k renormalised to sum 1, then
    multiplied by the expert's own scale. Unchanged when r is multiplied by a positive number.
    Source: Gemma 4 router.
    """
    z = rms_norm(r, eps=eps) * scale * r.shape[-1] ** -0.5
    probabilities = torch.softmax(linear(z, proj), -1, dtype=torch.float32)
    weights, ids = probabilities.topk(k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights * per_expert_scale[ids], ids


def route(
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
    *,
    scoring: str = "sigmoid",
    ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(expert ids int64 [M, k], weights float32 [M, k]) for each token x [M, H], in float32 whatever x is.

    gate: [E, H]; bias: [E], added to the scores to choose experts and never part of the weights, None adds nothing.
    scoring: what makes scores of x gate^T, "sigmoid", "sqrtsoftplus" or "softmax" over all experts.
    Only experts of the `topk_group` best of `n_group` runs of experts may be chosen; a group counts as the sum of its
    two best. ids: [M, k] experts that are chosen already, so that bias and groups are not asked.
    normalize: weights sum to 1 before they are multiplied by scale. Of equals the lowest index is taken.
    Raises ValueError if E is not a multiple of n_group, or those groups do not hold k experts, for ids that are not
    integers below E, for another scoring, and for other shapes.
    Source: Nemotron 3 and DeepSeek-V3, routing without auxiliary loss; DeepSeek-V4, experts by token ("hash" layers).
    """
    tokens, width = dimensions("x", x, "M", "H")
    experts, _ = dimensions("gate", gate, "E", "H")
    expect("gate", gate, experts, width)
    if bias is not None:
        expect("bias", bias, experts)
    if scoring not in SCORES:
        raise ValueError(f"scoring is {scoring!r}, expected one of {', '.join(SCORES)}")
    size = experts // n_group if n_group > 0 else 0
    if ids is not None:
        expect("ids", ids, tokens, k)
        ids = expect_indices("ids", ids, experts)
    elif n_group < 1 or experts % n_group or topk_group > n_group or not 0 < k <= topk_group * size:
        raise ValueError(f"cannot choose {k} of {experts} experts in {topk_group} of {n_group} groups")
    if gate.dtype is torch.float32 and x.dtype is not torch.float32:
        x = x.float()
    if (
        0 < tokens <= NATIVE_ROWS
        and dispatch.takes(x, gate)
        and (bias is None or (bias.dtype is torch.float32 and dispatch.takes(bias)))
    ):
        return _native_route(x, gate, bias, k, n_group, topk_group, normalize, scale, scoring, ids)
    scores = router_scores(x, gate, scoring)
    if ids is None:
        ids = _choice(scores if bias is None else scores + bias.float(), k, n_group, topk_group)
    weights = scores.gather(-1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale


def router_scores(x: Tensor, gate: Tensor, scoring: str = "sigmoid") -> Tensor:
    """What `route` chooses by, before any bias: float32 [M, E], above 0, of tokens x [M, H] and gate [E, H]."""
    return SCORES[scoring](F.linear(x.float(), gate.float()))


def _sqrtsoftplus(logits: Tensor) -> Tensor:
    return F.softplus(logits.clamp_min(LEAST_LOGIT)).sqrt()


def _softmax(logits: Tensor) -> Tensor:
    return logits.softmax(-1)


SCORES = {"sigmoid": torch.sigmoid, "sqrtsoftplus": _sqrtsoftplus, "softmax": _softmax}


def _choice(scores: Tensor, k: int, n_group: int, topk_group: int) -> Tensor:
    """Ids [M, k] of the best of scores [M, E], in the best groups."""
    if topk_group < n_group:
        grouped = scores.unflatten(-1, (n_group, -1))
        strength = grouped.topk(min(2, grouped.shape[-1]), -1).values.sum(-1)  # [M, n_group]
        closed = torch.ones_like(strength, dtype=torch.bool).scatter_(-1, _best(strength, topk_group), False)
        scores = grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)
    return _best(scores, k)


def _native_route(
    x: Tensor,
    gate: Tensor,
    bias: Tensor | None,
    k: int,
    n_group: int,
    topk_group: int,
    normalize: bool,
    scale: float,
    scoring: str,
    given: Tensor | None,
) -> tuple[Tensor, Tensor]:
    x, gate, bias = x.contiguous(), gate.contiguous(), None if bias is None else bias.contiguous()
    tokens, size = x.shape
    ids = x.new_empty(tokens, k, dtype=torch.int64) if given is None else given.contiguous()
    weights = x.new_empty(tokens, k, dtype=torch.float32)
    if given is not None:
        n_group = topk_group = 1
    dispatch.native.route(
        x=x,
        gate=gate,
        bias=bias,
        given=None if given is None else ids,
        ids=ids,
        weights=weights,
        tokens=tokens,
        inputs=size,
        experts=gate.shape[0],
        k=k,
        n_group=n_group,
        topk_group=topk_group,
        scoring=scoring,
        normalize=normalize,
        scale=scale,
        bfloat16=x.dtype is torch.bfloat16,
    )
    return ids, weights


def _best(scores: Tensor, k: int) -> Tensor:
    """Indices [M, k] of the largest scores [M, n], the lowest index first among equals."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
