"""Weights to start from."""

from __future__ import annotations

import torch

from sparing.models.diffusion_gemma import DiffusionGemma

__all__ = ["initialise"]


@torch.no_grad()
def initialise(model: DiffusionGemma, generator: torch.Generator) -> None:
    """Fill every tensor of a model: products keep the size of what they multiply, norms and scalars are one.

    The query and key norms together scale attention scores by 1 / sqrt(head_dim), as the model itself does not.
    """
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            tensor.fill_(len(tensor) ** -0.25)
        elif tensor.ndim < 2:
            tensor.fill_(1.0)
        else:
            tensor.normal_(std=tensor.shape[-1] ** -0.5, generator=generator)
