"""Attention over some of the keys, and how such partial ones add up to attention over all of them.

A partial attention is (out, lse): the mix of its own values, softmax over its own keys alone, and the log of the sum
that softmax divided by. Those over disjoint keys merge exactly with weights exp(lse).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["add_up", "group_rows", "merge_partials", "partial_attention", "ungroup_rows"]

Partial = tuple[Tensor, Tensor]  # out [T, heads, d], lse [T, heads]


def partial_attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool) -> Partial:
    """Attend over these keys alone: (out [T, heads, d], lse [T, heads]), in q's dtype.

    q: float32 or float64 [T, heads, d]; k, v: [kv_heads, S, d], widened to q's dtype; causal: the queries are the last
    T of the S positions, else all keys are seen. Every query sees at least one key.
    """
    k, v, tokens = k.to(q), v.to(q), len(q)
    scores = (group_rows(q, len(k)) @ k.transpose(-1, -2)) * scale  # [kv_heads, group * T, S]
    if causal and tokens > 1:
        past = k.shape[1] - tokens
        hidden = torch.ones(tokens, tokens, dtype=torch.bool, device=q.device).triu(1)
        scores.unflatten(1, (-1, tokens))[..., past:].masked_fill_(hidden, float("-inf"))
    peak = scores.amax(-1, keepdim=True)
    weights = scores.sub_(peak).exp_()
    mass = weights.sum(-1, keepdim=True)
    return ungroup_rows((weights @ v) / mass, tokens), ungroup_rows(peak + mass.log(), tokens)[..., 0]


def merge_partials(partials: Sequence[Partial]) -> Tensor:
    """[T, heads, d] of partial attentions over disjoint sets of keys."""
    return add_up(partials)[0]


def add_up(partials: Sequence[Partial]) -> Partial:
    """Partial attentions over disjoint sets of keys, as one over all of them."""
    if len(partials) == 1:
        return partials[0]
    masses = torch.stack([lse for _, lse in partials])
    weights = masses.softmax(0)  # [partials, T, heads]
    mixed = sum((w[..., None] * out for w, (out, _) in zip(weights, partials, strict=True)), torch.zeros(()))
    return mixed, masses.logsumexp(0)


def group_rows(q: Tensor, kv_heads: int) -> Tensor:
    """[T, heads, d] -> [kv_heads, group * T, d]: one product per kv head serves all query heads that read it."""
    return q.unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3).flatten(1, 2)


def ungroup_rows(rows: Tensor, tokens: int) -> Tensor:
    """[kv_heads, group * T, d] -> [T, heads, d]."""
    return rows.unflatten(1, (-1, tokens)).permute(2, 0, 1, 3).flatten(1, 2)
