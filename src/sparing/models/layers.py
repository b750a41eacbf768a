"""The modules that several architectures truly share. Parameter names are those of the checkpoints."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from sparing import kernels

__all__ = ["Embedding", "GatedMLP", "Linear", "RMSNorm"]


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing: a checkpoint or the training recipe fills the weights, and torch loads SymPy to draw on "meta"."""

    def forward(self, input: Tensor) -> Tensor:
        return kernels.look_up(input, self.weight)


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing, as in `Embedding`."""

    def forward(self, input: Tensor, activation: str | None = None) -> Tensor:
        return kernels.linear(input, self.weight, self.bias, activation)


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps)


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`; activation is "silu" or "gelu" (its tanh approximation)."""

    def __init__(self, size: int, width: int, activation: str, bias: bool = False):
        super().__init__()
        self.gate_proj = Linear(size, width, bias)
        self.up_proj = Linear(size, width, bias)
        self.down_proj = Linear(width, size, bias)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_proj, self.up_proj
        return self.down_proj(kernels.gated(x, gate.weight, up.weight, self.activation, gate.bias, up.bias))
