"""The modules that several architectures truly share. Parameter names are those of the checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Self

import torch
from torch import Tensor, nn

from sparing import kernels
from sparing.config.roles import Role, Tensors

__all__ = ["Embedding", "GatedMLP", "Linear", "Network", "RMSNorm", "ScaledEmbedding"]


class Network(nn.Module):
    """A module whose parameters and buffers have roles: those that stay float32 do so when its type changes."""

    def tensors(self) -> Tensors:
        """Name of a parameter or buffer -> (shape, role)."""
        raise TypeError(f"{type(self).__name__} does not define tensors")

    def roles(self) -> dict[str, Role]:
        """Name of a parameter or buffer -> what it is for."""
        return {name: role for name, (_, role) in self.tensors().items()}

    def parts(self) -> Iterator[tuple[str, Role | None, str, Tensor]]:
        """(name, role, part, tensor) of every parameter and buffer. part: what of a packed weight it is, else ""."""
        roles = self.roles()
        for name, tensor in chain(self.named_parameters(), self.named_buffers()):
            if name in roles:
                yield name, roles[name], "", tensor
            else:
                weight, _, part = name.rpartition(".")
                yield weight, roles.get(weight), part, tensor

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        roles = self.roles()
        own = chain(self.named_parameters(), self.named_buffers())
        kept = [tensor for name, tensor in own if name in roles and roles[name].is_float32]
        kept += [tensor.grad for tensor in kept if tensor.grad is not None]
        ids = {id(tensor) for tensor in kept}

        def moved(tensor: Tensor) -> Tensor:
            result = fn(tensor)
            is_rounded = result.dtype.itemsize < 4 and id(tensor) in ids
            return tensor.to(result.device, torch.float32) if is_rounded else result

        return super()._apply(moved, recurse)


class Embedding(nn.Embedding):
    def reset_parameters(self) -> None:
        """Nothing: a checkpoint or the training recipe fills the weights, and torch loads SymPy to draw on "meta"."""

    def forward(self, input: Tensor) -> Tensor:
        return kernels.look_up(input, self.weight)


class ScaledEmbedding(Embedding):
    """Multiplied by the root of its width, as Gemma's are."""

    def scale(self) -> Tensor:
        """Rounded to the weights' type, as the reference does."""
        return torch.tensor(self.embedding_dim**0.5).to(self.weight.device, self.weight.dtype)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input) * self.scale()


class Linear(nn.Linear):
    def reset_parameters(self) -> None:
        """Nothing, as in `Embedding`."""

    def forward(self, input: Tensor, activation: str | None = None) -> Tensor:
        return kernels.linear(input, self.weight, self.bias, activation)


class RMSNorm(nn.Module):
    """shift: what is added to the weight, as in `kernels.rms_norm`."""

    def __init__(self, size: int, eps: float, shift: float = 0.0):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(size))
        self.eps, self.shift = eps, shift

    def forward(self, x: Tensor) -> Tensor:
        return kernels.rms_norm(x, self.weight, self.eps, self.shift)


class GatedMLP(nn.Module):
    """`down(activation(gate(x)) * up(x))`; activation is "silu" or "gelu" (its tanh approximation).

    limit: what gate and up are cut off at, as in `kernels.gated`.
    """

    def __init__(self, size: int, width: int, activation: str, bias: bool = False, limit: float = math.inf):
        super().__init__()
        self.gate_proj = Linear(size, width, bias)
        self.up_proj = Linear(size, width, bias)
        self.down_proj = Linear(width, size, bias)
        self.activation, self.limit = activation, limit

    def forward(self, x: Tensor) -> Tensor:
        gate, up, down = self.gate_proj, self.up_proj, self.down_proj
        biases = (gate.bias, up.bias, down.bias)
        return kernels.gated_mlp(x, gate.weight, up.weight, down.weight, self.activation, self.limit, biases)
