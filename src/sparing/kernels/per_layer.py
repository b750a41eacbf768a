"""Per-layer input embeddings: a second, small embedding that every layer mixes in through a gate."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.kernels.norm import residual, rms_norm
from sparing.kernels.products import Weight, linear, look_up

__all__ = ["per_layer_gate", "per_layer_inputs"]


def per_layer_inputs(
    ids: Tensor,
    scaled_embeds: Tensor,
    table: Tensor | Weight,
    proj: Tensor | Weight,
    norm_weight: Tensor,
    num_layers: int,
    eps: float = 1e-6,
) -> Tensor:
    """The vector each layer will mix in: [..., num_layers, P].

    ids: int64 [...]; scaled_embeds: [..., H] token embeddings times sqrt(H); table: [V, num_layers * P], layer-major;
    proj: [num_layers * P, H]; norm_weight: [P]. Result: (rms(context) + token row * sqrt(P)) / sqrt(2).
    Source: Gemma 4, `get_per_layer_inputs` and `project_per_layer_inputs`.
    """
    size = norm_weight.shape[0]
    rows = look_up(ids.to(table.device), table).to(scaled_embeds.device, scaled_embeds.dtype)
    root = torch.tensor(size**0.5).to(scaled_embeds.dtype)  # rounded like the embedding scale
    token = (rows * root).unflatten(-1, (num_layers, size))
    context = (linear(scaled_embeds, proj) * proj.shape[1] ** -0.5).unflatten(-1, (num_layers, size))
    return (rms_norm(context, norm_weight, eps) + token) * 2**-0.5


def per_layer_gate(
    x: Tensor, ple_i: Tensor, w_gate: Tensor, w_proj: Tensor, norm_weight: Tensor, eps: float = 1e-6
) -> Tensor:
    """`x + rms(w_proj (gelu(w_gate x) * ple_i))`: x exactly where ple_i is 0.

    x: [..., H]; ple_i: [..., P] one layer's slice of `per_layer_inputs`; w_gate: [P, H]; w_proj: [H, P];
    norm_weight: [H]. Source: Gemma 4 decoder layer, `per_layer_input_gate`.
    """
    gated = linear(x, w_gate, activation="gelu") * ple_i
    return residual(x, linear(gated, w_proj), norm_weight, eps=eps)
