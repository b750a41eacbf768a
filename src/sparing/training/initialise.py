"""Weights to start from."""

from __future__ import annotations

import math

import torch

from sparing.config.roles import BIAS, CORRECTION, DECAY, HASH_TABLE, POSITION_BIAS, QK_NORM, SINK, TIME_STEP
from sparing.models.layers import Network

__all__ = ["initialise"]


@torch.no_grad()
def initialise(model: Network, generator: torch.Generator) -> None:
    """Fill every tensor of a model: products keep the size of what they multiply, norms and scalars are one,
    biases and sinks zero.

    The query and key norms together scale attention scores by 1 / sqrt(head_dim), as the model itself does not. Mamba's
    heads decay at rates of 1, 2, ... an input, times steps between 0.001 and 0.1, evenly on a logarithmic scale.
    """
    for _, role, _, tensor in model.parts():
        if role is QK_NORM:
            tensor.fill_(len(tensor) ** -0.25)
        elif role is DECAY:
            tensor.copy_(torch.arange(1, len(tensor) + 1).log())
        elif role is TIME_STEP:
            low, high = math.log(1e-3), math.log(1e-1)
            steps = tensor.uniform_(low, high, generator=generator).exp_()
            steps.add_(torch.log(-torch.expm1(-steps)))  # softplus of this is the step
        elif role in (BIAS, CORRECTION, POSITION_BIAS, SINK, HASH_TABLE):  # a recipe fills the table
            tensor.zero_()
        elif tensor.ndim < 2:
            tensor.fill_(1.0)
        else:
            tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
