"""Weights to start from."""

from __future__ import annotations

import math

import torch
from torch import nn

__all__ = ["initialise"]


@torch.no_grad()
def initialise(model: nn.Module, generator: torch.Generator) -> None:
    """Fill every tensor of a model: products keep the size of what they multiply, norms and scalars are one.

    The query and key norms together scale attention scores by 1 / sqrt(head_dim), as the model itself does not. Mamba's
    heads decay at rates of 1, 2, ... an input, times steps between 0.001 and 0.1, evenly on a logarithmic scale.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            tensor.fill_(len(tensor) ** -0.25)
        elif name.endswith("A_log"):
            tensor.copy_(torch.arange(1, len(tensor) + 1).log())
        elif name.endswith("dt_bias"):
            low, high = math.log(1e-3), math.log(1e-1)
            steps = tensor.uniform_(low, high, generator=generator).exp_()
            steps.add_(torch.log(-torch.expm1(-steps)))  # softplus of this is the step
        elif name.endswith(("conv1d.bias", "e_score_correction_bias")):
            tensor.zero_()
        elif tensor.ndim < 2:
            tensor.fill_(1.0)
        else:
            tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
