"""Mixture of experts: routing, and the expert products with tokens grouped by expert."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.kernels.norm import rms_norm
from sparing.kernels.products import linear

__all__ = ["grouped_experts", "parallel_moe", "route_topk"]


def route_topk(
    r: Tensor, scale: Tensor, proj: Tensor, per_expert_scale: Tensor, k: int, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    """(weights float32 [M, k], expert ids int64 [M, k]) for each token of the residual stream r [M, H].

    scale: [H]; proj: [E, H]; per_expert_scale: [E]. Softmax over all experts, top k renormalised to sum 1, then
    multiplied by the expert's own scale. Unchanged when r is multiplied by a positive number.
    Source: Gemma 4 router.
    """
    z = rms_norm(r, eps=eps) * scale * r.shape[-1] ** -0.5
    probabilities = torch.softmax(linear(z, proj), -1, dtype=torch.float32)
    weights, ids = probabilities.topk(k, dim=-1)
    weights = weights / weights.sum(-1, keepdim=True)
    return weights * per_expert_scale[ids], ids


def grouped_experts(x: Tensor, weights: Tensor, ids: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """`sum_j weights[:, j] * expert[ids[:, j]](x)` with one pair of products per expert that got tokens.

    x: [M, H]; weights: float32 [M, k]; ids: [M, k]; gate_up: [E, 2I, H], gate rows first; down: [E, H, I].
    Returns [M, H] in x's dtype; the weighted sum is float32. Activation: tanh-approximated GELU.
    """
    tokens, k = ids.shape
    order = ids.flatten().argsort(stable=True)  # (token, choice) pairs, by expert
    source = order // k  # the token of each pair
    grouped = x[source]
    counts = torch.bincount(ids.flatten(), minlength=gate_up.shape[0]).tolist()
    outputs, start = [], 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        gate, up = linear(grouped[start : start + count], gate_up[expert]).chunk(2, -1)
        outputs.append(linear(F.gelu(gate, approximate="tanh") * up, down[expert]))
        start += count
    flat = torch.cat(outputs).float() * weights.flatten()[order, None]
    # Back to token order, then sum the k choices of a token in their own order: the same for every batch.
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return flat[back].view(tokens, k, -1).sum(1).to(x.dtype)


def parallel_moe(
    r: Tensor,
    *,
    dense: Tensor,
    router: tuple[Tensor, Tensor, Tensor],
    k: int,
    gate_up: Tensor,
    down: Tensor,
    norms: tuple[Tensor, Tensor, Tensor],
    eps: float = 1e-6,
) -> Tensor:
    """The two feed-forward branches of a Gemma 4 MoE layer, each normed, added: [M, H].

    r: [M, H] the residual stream, read by router and experts; dense: [M, H] output of the dense MLP;
    router: (scale, proj, per_expert_scale) of `route_topk`; gate_up, down: of `grouped_experts`;
    norms: weights [H] after the dense branch, before the experts, after the experts.
    Source: Gemma 4, `enable_moe_block`.
    """
    after_dense, before_experts, after_experts = norms
    weights, ids = route_topk(r, *router, k, eps)
    mixed = grouped_experts(rms_norm(r, before_experts, eps), weights, ids, gate_up, down)
    return rms_norm(dense, after_dense, eps) + rms_norm(mixed, after_experts, eps)
