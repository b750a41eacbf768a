"""Mixture of experts: two routers, and the expert products with tokens grouped by expert."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.kernels import dispatch
from sparing.kernels.norm import rms_norm
from sparing.kernels.products import NATIVE_ROWS, Weight, WeightStack, linear
from sparing.kernels.shapes import dimensions, expect, expect_indices, misfit

__all__ = ["gated_gelu", "grouped_experts", "latent_moe", "parallel_moe", "relu2", "route", "route_topk", "squared_mlp"]


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
    bias: Tensor,
    k: int,
    n_group: int = 1,
    topk_group: int = 1,
    normalize: bool = True,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """(expert ids int64 [M, k], weights float32 [M, k]) for each token x [M, H], in float32 whatever x is.

    gate: [E, H]; bias: [E], added to the scores sigmoid(x gate^T) to choose experts and never part of the weights.
    Only experts of the `topk_group` best of `n_group` runs of experts may be chosen; a group counts as the sum of its
    two best. normalize: weights sum to 1 before they are multiplied by scale. Of equals the lowest index is taken.
    Raises ValueError if E is not a multiple of n_group, or those groups do not hold k experts, and for other shapes.
    Source: Nemotron 3 and DeepSeek-V3, routing without auxiliary loss.
    """
    _, width = dimensions("x", x, "M", "H")
    experts, _ = dimensions("gate", gate, "E", "H")
    expect("gate", gate, experts, width)
    expect("bias", bias, experts)
    size = experts // n_group if n_group > 0 else 0
    if n_group < 1 or experts % n_group or topk_group > n_group or not 0 < k <= topk_group * size:
        raise ValueError(f"cannot choose {k} of {experts} experts in {topk_group} of {n_group} groups")
    if 0 < len(x) <= NATIVE_ROWS and dispatch.takes(x, gate) and dispatch.takes(bias) and bias.dtype == torch.float32:
        return _native_route(x, gate, bias, k, n_group, topk_group, normalize, scale)
    scores = torch.sigmoid(F.linear(x.float(), gate.float()))
    biased = scores + bias.float()
    if topk_group < n_group:
        grouped = biased.view(-1, n_group, size)
        strength = grouped.topk(min(2, size), -1).values.sum(-1)  # [M, n_group]
        closed = torch.ones_like(strength, dtype=torch.bool).scatter_(-1, _best(strength, topk_group), False)
        biased = grouped.masked_fill(closed[..., None], float("-inf")).flatten(1)
    ids = _best(biased, k)
    weights = scores.gather(-1, ids)
    if normalize:
        weights = weights / (weights.sum(-1, keepdim=True) + 1e-20)
    return ids, weights * scale


def _native_route(
    x: Tensor, gate: Tensor, bias: Tensor, k: int, n_group: int, topk_group: int, normalize: bool, scale: float
) -> tuple[Tensor, Tensor]:
    x, gate, bias = x.contiguous(), gate.contiguous(), bias.contiguous()
    ids, weights = x.new_empty(len(x), k, dtype=torch.int64), x.new_empty(len(x), k, dtype=torch.float32)
    dispatch.native.route(
        x=x,
        gate=gate,
        bias=bias,
        ids=ids,
        weights=weights,
        tokens=x.shape[0],
        inputs=x.shape[1],
        experts=gate.shape[0],
        k=k,
        n_group=n_group,
        topk_group=topk_group,
        normalize=normalize,
        scale=scale,
        bfloat16=x.dtype is torch.bfloat16,
    )
    return ids, weights


def _best(scores: Tensor, k: int) -> Tensor:
    """Indices [M, k] of the largest scores [M, n], the lowest index first among equals."""
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]


def gated_gelu(gate_up: Tensor) -> Tensor:
    """[n, I] from [n, 2I], gate first; tanh-approximated."""
    gate, up = gate_up.chunk(2, -1)
    return F.gelu(gate, approximate="tanh") * up


def relu2(x: Tensor) -> Tensor:
    """The square of what is positive."""
    return F.relu(x).square() if torch.is_grad_enabled() else F.relu(x).square_()


def grouped_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    up: Tensor | WeightStack,
    down: Tensor | WeightStack,
    activation: Callable[[Tensor], Tensor] = gated_gelu,
) -> Tensor:
    """`sum_j weights[:, j] * expert[ids[:, j]](x)` with one pair of products per expert that got tokens.

    x: [M, H]; weights: float32 [M, k]; ids: [M, k]; up: [E, U, H], for `gated_gelu` U = 2I with the gate's rows first;
    activation: from [n, U] to [n, I]; down: [E, H, I]. Returns [M, H] in x's dtype; the weighted sum is float32.
    Raises ValueError for other shapes, and for ids that are not integers below E.
    """
    tokens, size = dimensions("x", x, "M", "H")
    _, k = dimensions("ids", ids, "M", "k")
    expect("ids", ids, tokens, k)
    expect("weights", weights, tokens, k)
    experts = _expect_experts(up, down, size, activation)
    return _mixed(x, weights, expect_indices("ids", ids, experts), up, down, activation)


def _expect_experts(
    up: Tensor | WeightStack, down: Tensor | WeightStack, size: int, activation: Callable[[Tensor], Tensor]
) -> int:
    """The number of experts; raises ValueError unless their matrices fit each other and inputs of this size."""
    experts, rows, _ = dimensions("up", up, "E", "U", "H")
    expect("up", up, experts, rows, size)
    width = dimensions("down", down, "E", "H", "I")[2]
    if activation in ACTIVATIONS:
        width = rows if activation is relu2 else rows // 2
    expect("down", down, experts, size, width)
    if activation is gated_gelu and rows % 2:
        raise misfit("up", up, experts, 2 * width, size)
    return experts


def _mixed(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    up: Tensor | WeightStack,
    down: Tensor | WeightStack,
    activation: Callable[[Tensor], Tensor],
) -> Tensor:
    """`grouped_experts` of what fits together, ids int64."""
    if not ids.numel():
        return torch.zeros_like(x)
    if weights.dtype == torch.float32 and (native := _few_tokens(x, up, down, activation, ids, weights)) is not None:
        return native
    tokens, k = ids.shape
    # Each expert's tokens are made contiguous, so that it is one pair of products; `order` also leads back.
    order = ids.flatten().argsort(stable=True)  # (token, choice) pairs, by expert
    source = order // k  # the token of each pair
    grouped = x[source]
    counts = torch.bincount(ids.flatten(), minlength=len(up)).tolist()
    outputs, start = [], 0
    for expert, count in enumerate(counts):
        if count == 0:
            continue
        hidden = activation(linear(grouped[start : start + count], up[expert]))
        outputs.append(linear(hidden, down[expert]))
        start += count
    flat = torch.cat(outputs).float() * weights.flatten()[order, None]
    # Back to token order, then sum the k choices of a token in their own order: the same for every batch.
    back = torch.empty_like(order)
    back[order] = torch.arange(len(order), device=order.device)
    return flat[back].view(tokens, k, -1).sum(1).to(x.dtype)


def squared_mlp(
    x: Tensor, up: Tensor | Weight, down: Tensor | Weight, biases: tuple[Tensor | None, Tensor | None] = (None, None)
) -> Tensor:
    """`down(relu2(up(x)))`: [M, H] for x [M, H], up [I, H], down [H, I], biases [I] and [H].

    Raises ValueError for other shapes.
    """
    width, size = dimensions("up", up, "I", "H")[0], x.shape[-1]
    expect("up", up, width, size)
    expect("down", down, size, width)
    if biases == (None, None) and (native := _few_tokens(x, up, down, relu2)) is not None:
        return native
    return linear(relu2(linear(x, up, biases[0])), down, biases[1])


ACTIVATIONS = (relu2, gated_gelu)  # that native kernels know, by these names


def _few_tokens(
    x: Tensor,
    up: Tensor | Weight | WeightStack,
    down: Tensor | Weight | WeightStack,
    activation: Callable[[Tensor], Tensor],
    ids: Tensor | None = None,
    weights: Tensor | None = None,
) -> Tensor | None:
    """The native products where tokens are so few that one reading of what was chosen serves them all, else None.

    Hidden units are rounded once; without ids and weights up and down are one expert's.
    """
    if x.ndim != 2 or not 0 < len(x) <= NATIVE_ROWS or activation not in ACTIVATIONS or not dispatch.takes(x):
        return None
    if ids is not None and weights is not None and not (ids.is_cpu and weights.is_cpu):
        return None
    operands = None
    if not isinstance(up, Tensor):
        if (operands := up.expert_operands(down)) is None:
            return None
    elif not (isinstance(down, Tensor) and dispatch.takes(x, up, down) and up.is_contiguous() and down.is_contiguous()):
        return None
    x = x.contiguous()
    y = torch.empty_like(x)
    ids = None if ids is None else ids.contiguous()
    weights = None if weights is None else weights.contiguous()
    k, bfloat16 = 1 if ids is None else ids.shape[1], x.dtype is torch.bfloat16
    if operands is not None:
        up_read, down_read = operands
        dispatch.native.packed_experts(
            x=x,
            up=up_read,
            down=down_read,
            ids=ids,
            weights=weights,
            y=y,
            tokens=x.shape[0],
            k=k,
            activation=activation.__name__,
            bfloat16=bfloat16,
        )
    else:
        dispatch.native.experts(
            x=x,
            up=up,
            down=down,
            ids=ids,
            weights=weights,
            y=y,
            tokens=x.shape[0],
            k=k,
            inputs=x.shape[1],
            width=down.shape[-1],
            activation=activation.__name__,
            bfloat16=bfloat16,
        )
    return y


def latent_moe(
    x: Tensor,
    fc1: Tensor | Weight | None,
    fc2: Tensor | Weight | None,
    up: Tensor | WeightStack,
    down: Tensor | WeightStack,
    idx: Tensor,
    w: Tensor,
    shared: Callable[[Tensor], Tensor] | None = None,
    biases: tuple[Tensor | None, Tensor | None] = (None, None),
) -> Tensor:
    """Routed experts in a narrow space, and the expert that sees every token in full width: [M, H].

    x: [M, H]; fc1: [L, H], fc2: [H, L], or both None for L = H without projections; up: [E, F, L]; down: [E, L, F];
    idx, w: of `route`, [M, k]; shared: from [M, H] to [M, H]; biases: of fc1 and fc2.
    The weighted sum over experts is taken in the latent space, in float32, before the one product with fc2.
    Raises ValueError for other shapes, and for idx that are not integers below E.
    Source: Nemotron 3, LatentMoE; activation relu(x)^2.
    """
    tokens, size = dimensions("x", x, "M", "H")
    latent_size = size
    if fc1 is not None:
        latent_size, _ = dimensions("fc1", fc1, "L", "H")
        expect("fc1", fc1, latent_size, size)
    if fc2 is not None:
        expect("fc2", fc2, size, latent_size)
    _, k = dimensions("idx", idx, "M", "k")
    expect("idx", idx, tokens, k)
    expect("w", w, tokens, k)
    idx = expect_indices("idx", idx, _expect_experts(up, down, latent_size, relu2))
    latent = x if fc1 is None else linear(x, fc1, biases[0])
    mixed = _mixed(latent, w, idx, up, down, relu2)
    routed = mixed if fc2 is None else linear(mixed, fc2, biases[1])
    return routed if shared is None else routed + shared(x)


def parallel_moe(
    r: Tensor,
    *,
    dense: Tensor,
    router: tuple[Tensor, Tensor, Tensor],
    k: int,
    gate_up: Tensor | WeightStack,
    down: Tensor | WeightStack,
    norms: tuple[Tensor, Tensor, Tensor],
    eps: float = 1e-6,
) -> Tensor:
    """The two feed-forward branches of a Gemma 4 MoE layer, each normed, added: [M, H].

    r: [M, H] the residual, read by router and experts; dense: [M, H] output of the dense MLP;
    router: (scale, proj, per_expert_scale) of `route_topk`; gate_up, down: of `grouped_experts`;
    norms: weights [H] after the dense branch, before the experts, after the experts.
    Source: Gemma 4, `enable_moe_block`.
    """
    after_dense, before_experts, after_experts = norms
    weights, ids = route_topk(r, *router, k, eps)
    mixed = grouped_experts(rms_norm(r, before_experts, eps), weights, ids, gate_up, down)
    return rms_norm(dense, after_dense, eps) + rms_norm(mixed, after_experts, eps)
