"""Mixture of experts: the expert products with tokens grouped by expert, and the MLPs of one expert."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.kernels import dispatch
from sparing.kernels.norm import rms_norm
from sparing.kernels.products import (
    NATIVE_ROWS,
    Weight,
    WeightStack,
    activate_gated,
    expect_limit,
    gated,
    linear,
)
from sparing.kernels.routing import route_topk
from sparing.kernels.shapes import dimensions, expect, expect_indices, misfit

__all__ = [
    "gated_gelu",
    "gated_mlp",
    "gated_silu",
    "grouped_experts",
    "latent_moe",
    "parallel_moe",
    "relu2",
    "squared_mlp",
]


def gated_gelu(gate_up: Tensor, limit: float = math.inf) -> Tensor:
    """[n, I] from [n, 2I], gate first; tanh-approximated. limit: as in `gated`."""
    gate, up = gate_up.chunk(2, -1)
    return activate_gated(gate, up, "gelu", limit)


def gated_silu(gate_up: Tensor, limit: float = math.inf) -> Tensor:
    """SwiGLU: [n, I] from [n, 2I], gate first. limit: as in `gated`."""
    gate, up = gate_up.chunk(2, -1)
    return activate_gated(gate, up, "silu", limit)


def relu2(x: Tensor) -> Tensor:
    """The square of what is positive."""
    return F.relu(x).square() if torch.is_grad_enabled() else F.relu(x).square_()


GATED = (gated_gelu, gated_silu)
ACTIVATIONS = (relu2, *GATED)  # that native kernels know, by these names


def grouped_experts(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    up: Tensor | WeightStack,
    down: Tensor | WeightStack,
    activation: Callable[..., Tensor] = gated_gelu,
    limit: float = math.inf,
) -> Tensor:
    """`sum_j weights[:, j] * expert[ids[:, j]](x)` with one pair of products per expert that got tokens.

    x: [M, H]; weights: float32 [M, k]; ids: [M, k]; up: [E, U, H], for `gated_gelu` and `gated_silu` U = 2I with the
    gate's rows first; activation: from [n, U] to [n, I]; down: [E, H, I]; limit: of gated activations, as in `gated`.
    Returns [M, H] in x's dtype; the weighted sum is float32.
    Raises ValueError for other shapes, for ids that are not integers below E, and for a limit of another activation.
    """
    if activation in GATED:
        expect_limit(limit)
    elif limit != math.inf:
        raise ValueError(f"limit is {limit}, and {activation.__name__} has none: use gated_gelu or gated_silu")
    tokens, size = dimensions("x", x, "M", "H")
    _, k = dimensions("ids", ids, "M", "k")
    expect("ids", ids, tokens, k)
    expect("weights", weights, tokens, k)
    experts = _expect_experts(up, down, size, activation)
    return _mixed(x, weights, expect_indices("ids", ids, experts), up, down, activation, limit)


def _expect_experts(
    up: Tensor | WeightStack, down: Tensor | WeightStack, size: int, activation: Callable[..., Tensor]
) -> int:
    """The number of experts; raises ValueError unless their matrices fit each other and inputs of this size."""
    experts, rows, _ = dimensions("up", up, "E", "U", "H")
    expect("up", up, experts, rows, size)
    width = dimensions("down", down, "E", "H", "I")[2]
    if activation in ACTIVATIONS:
        width = rows // 2 if activation in GATED else rows
    expect("down", down, experts, size, width)
    if activation in GATED and rows % 2:
        raise misfit("up", up, experts, 2 * width, size)
    return experts


def _mixed(
    x: Tensor,
    weights: Tensor,
    ids: Tensor,
    up: Tensor | WeightStack,
    down: Tensor | WeightStack,
    activation: Callable[..., Tensor],
    limit: float = math.inf,
) -> Tensor:
    """`grouped_experts` of what fits together, ids int64."""
    if not ids.numel():
        return torch.zeros_like(x)
    if weights.dtype == torch.float32:
        native = _few_tokens(x, up, down, activation, ids, weights, limit)
        if native is not None:
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
        hidden = linear(grouped[start : start + count], up[expert])
        hidden = activation(hidden, limit) if limit < math.inf else activation(hidden)
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


def gated_mlp(
    x: Tensor,
    gate: Tensor | Weight,
    up: Tensor | Weight,
    down: Tensor | Weight,
    activation: str,
    limit: float = math.inf,
    biases: tuple[Tensor | None, Tensor | None, Tensor | None] = (None, None, None),
) -> Tensor:
    """`down(gated(x, gate, up, activation, limit=limit))`: [..., H] for x [..., H], gate and up [I, H], down [H, I].

    biases: of gate and up [I], and of down [H]. Raises ValueError for other shapes.
    """
    width, size = dimensions("gate", gate, "I", "H")[0], x.shape[-1]
    expect("gate", gate, width, size)
    expect("up", up, width, size)
    expect("down", down, size, width)
    expect_limit(limit)
    if biases == (None, None, None) and not isinstance(gate, Tensor):
        of_both = gated_silu if activation == "silu" else gated_gelu
        if (native := _few_tokens(x, up, down, of_both, limit=limit, gate=gate)) is not None:
            return native
    hidden = gated(x, gate, up, activation, biases[0], biases[1], limit)
    return linear(hidden, down, biases[2])


def _few_tokens(
    x: Tensor,
    up: Tensor | Weight | WeightStack,
    down: Tensor | Weight | WeightStack,
    activation: Callable[..., Tensor],
    ids: Tensor | None = None,
    weights: Tensor | None = None,
    limit: float = math.inf,
    gate: Weight | None = None,
) -> Tensor | None:
    """The native products where tokens are so few that one reading of what was chosen serves them all, else None.

    Hidden units are rounded once; without ids and weights up and down are one expert's. gate: where `up` does not hold
    its rows too.
    """
    if x.ndim != 2 or not 0 < len(x) <= NATIVE_ROWS or activation not in ACTIVATIONS or not dispatch.takes(x):
        return None
    if ids is not None and weights is not None and not (ids.is_cpu and weights.is_cpu):
        return None
    operands = gate_read = None
    if not isinstance(up, Tensor):
        if (operands := up.expert_operands(down)) is None:
            return None
        if gate is not None:
            if (both := gate.expert_operands(up)) is None:
                return None
            gate_read = both[0]
    elif not (isinstance(down, Tensor) and dispatch.takes(x, up, down) and up.is_contiguous() and down.is_contiguous()):
        return None
    x = x.contiguous()
    y = torch.empty_like(x)
    ids = None if ids is None else ids.contiguous()
    weights = None if weights is None else weights.contiguous()
    k, bfloat16 = 1 if ids is None else ids.shape[1], x.dtype is torch.bfloat16
    rows = {"x": x, "ids": ids, "weights": weights, "y": y, "tokens": x.shape[0], "k": k}
    rows |= {"activation": activation.__name__, "limit": limit, "bfloat16": bfloat16}
    if operands is None:
        dispatch.native.experts(up=up, down=down, inputs=x.shape[1], width=down.shape[-1], **rows)
    else:
        dispatch.native.packed_experts(up=operands[0], down=operands[1], gate=gate_read, **rows)
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
