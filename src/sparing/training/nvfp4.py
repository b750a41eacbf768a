"""Training with NVFP4 products, emulated: each operand is rounded to the format and multiplied in float32.

The three products of a linear layer, T tokens:

    y  = x W^T     x in blocks of 16 inputs, W in blocks of 16 x 16, both to nearest
    dx = dy W      dy in blocks of 16 outputs, at random; the same W, which its square blocks make possible
    dW = dy^T x    both in blocks of 16 tokens after a Hadamard transform with random signs along the tokens, which
                   spreads outliers and cancels in the product; dy at random, x to nearest

Rounding at random keeps gradients unbiased. Weights and their gradients stay float32.
Source: NVFP4 pretraining, arXiv 2509.25149; NVIDIA TransformerEngine's reference quantiser (signs of the transform).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from sparing.config.formats import is_packed
from sparing.config.roles import Role
from sparing.memory.turboquant.rotation import Rotation
from sparing.models.layers import Network
from sparing.training.masters import MasterWeight, replace_parameter
from sparing.weights.nvfp4 import BLOCK, nvfp4_round

__all__ = ["Draws", "NVFP4Training", "draw_from", "nvfp4_product", "use_nvfp4"]

SIGNS = (1, 1, 1, -1, 1, -1, -1, -1, -1, -1, -1, 1, -1, 1, -1, -1)


class Draws:
    """The generator of all rounding at random; set it before each step. None: to nearest."""

    generator: torch.Generator | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Draws:
        return self  # a copy of a model, as its moving average, takes no gradients


def nvfp4_product(x: Tensor, weight: Tensor, draws: Draws | None = None) -> Tensor:
    """`x @ weight^T` with gradients, all three products of NVFP4 operands: [..., out] in x's type.

    x: [..., in]; weight: [out, in], both sizes multiples of 16; draws: for gradients, None rounds them to nearest.
    Raises ValueError for other sizes.
    """
    if any(size % BLOCK for size in weight.shape):
        raise ValueError(f"NVFP4 products need a weight of multiples of {BLOCK}, found {list(weight.shape)}")
    rows = x.reshape(-1, x.shape[-1])
    y: Any = _Product.apply(rows, weight, draws or Draws())
    return y.view(*x.shape[:-1], len(weight)).to(x.dtype)


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, draws: Draws) -> Tensor:
        rounded = nvfp4_round(weight, "2d")
        ctx.save_for_backward(x, rounded)
        ctx.draws, ctx.weight_dtype = draws, weight.dtype
        return nvfp4_round(x) @ rounded.T

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        (dy,), (x, rounded), generator = gradients, ctx.saved_tensors, ctx.draws.generator
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = (nvfp4_round(dy, generator=generator) @ rounded).to(x.dtype)
        if ctx.needs_input_grad[1]:
            dy_turned = nvfp4_round(_turn_tokens(dy), generator=generator)  # [out, T]
            dw = (dy_turned @ nvfp4_round(_turn_tokens(x)).T).to(ctx.weight_dtype)
        return dx, dw, None


def _turn_tokens(rows: Tensor) -> Tensor:
    """Rows [T, n] as columns, float32 [n, T], filled up with zeros to multiples of 16, each 16 of a column turned."""
    filled = nn.functional.pad(rows.float().T, (0, -len(rows) % BLOCK))
    return _rotation().apply(filled.unflatten(-1, (-1, BLOCK))).flatten(-2)


@cache
def _rotation() -> Rotation:
    return Rotation(BLOCK, signs=torch.tensor(SIGNS))


class NVFP4Training(MasterWeight):
    """Multiplies in NVFP4. dtype: that x is rounded to first and the results have (None: x's own)."""

    def __init__(self, master: nn.Parameter | Tensor, draws: Draws, dtype: torch.dtype | None = None):
        super().__init__(master)
        self.draws, self.dtype = draws, dtype

    def like(self, master: Tensor) -> NVFP4Training:
        return NVFP4Training(master, self.draws, self.dtype)

    def product(self, x: Tensor) -> Tensor:
        return nvfp4_product(x if self.dtype is None else x.to(self.dtype), self.master, self.draws)


def use_nvfp4(
    model: Network,
    *,
    dense: Callable[[str, Role], bool] = lambda name, role: False,
    last: float = 0.15,
    dtype: torch.dtype | None = None,
) -> Draws:
    """Let the matrices of a model multiply in NVFP4 while it trains; returns what decides their rounding.

    Those that `load(weights="nvfp4")` packs, except: those of which `dense(name, role)` is true; the last share `last`
    of the layers; matrices whose output size is not a multiple of 16. dtype: of `NVFP4Training`.
    """
    draws, roles = Draws(), model.roles()
    layers = [int(match[1]) for name, _ in model.named_parameters() if (match := re.search(r"layers\.(\d+)\.", name))]
    first_dense = round((max(layers, default=-1) + 1) * (1 - last))
    for name, parameter in list(model.named_parameters()):
        layer = re.search(r"layers\.(\d+)\.", name)
        kept = dense(name, roles[name]) or (layer and int(layer[1]) >= first_dense)
        if not kept and is_packed(roles[name], parameter.shape, "nvfp4") and parameter.shape[-2] % BLOCK == 0:
            replace_parameter(model, name, NVFP4Training(parameter, draws, dtype))
    return draws


def draw_from(model: nn.Module, generator: torch.Generator) -> None:
    """Let all rounding at random of a model draw from this generator."""
    for module in model.modules():
        if isinstance(module, NVFP4Training):
            module.draws.generator = generator
