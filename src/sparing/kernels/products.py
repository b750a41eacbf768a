"""Products with weights, fast also on a CPU that has no arithmetic of the weights' type."""

from __future__ import annotations

import math
from functools import cache
from typing import Any, Protocol, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.kernels import dispatch, onednn
from sparing.kernels.shapes import dimensions, expect, misfit

__all__ = [
    "Weight",
    "WeightStack",
    "activate",
    "activate_gated",
    "arithmetic_dtype",
    "expect_limit",
    "gated",
    "grouped_linear",
    "linear",
    "linear_pair",
    "look_up",
    "weighted_rows",
]

NATIVE_ROWS = 8  # above it products that keep sums in registers overtake reading the weights once
PAIRED = 32  # inputs: the native kernel for many rows takes them in multiples of this
FEW_ROWS = 4  # below it torch reads narrow weights once a row, which costs less than widening them
PIECE_BYTES = 1 << 20  # of widened weights: stays in cache between its making and its use


class Weight(Protocol):
    """A matrix [out, in] that is not a plain tensor, and knows how to multiply and to look up its rows."""

    @property
    def shape(self) -> torch.Size: ...

    @property
    def device(self) -> torch.device: ...

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor: ...

    def look_up(self, ids: Tensor) -> Tensor: ...

    def expert_operands(self, down: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """What the native kernel of packed experts reads of this as `up` and of `down`; None where it reads neither."""
        ...


class WeightStack(Protocol):
    """Matrices [E, out, in] that are not a plain tensor."""

    @property
    def shape(self) -> torch.Size: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Weight: ...

    def matmul_each(self, x: Tensor) -> Tensor: ...

    def expert_operands(self, down: Any) -> tuple[dict[str, Any], dict[str, Any]] | None: ...


def arithmetic_dtype(x: Tensor) -> torch.dtype:
    """The type to compute in: x's own, or float32 where x is bfloat16 or float16 and the CPU cannot multiply those.

    torch then multiplies matrices number by number, which takes about ten times as long as widening them first.
    """
    return x.dtype if x.device.type != "cpu" or _has_arithmetic(x.dtype) else torch.float32


def linear(x: Tensor, weight: Tensor | Weight, bias: Tensor | None = None, activation: str | None = None) -> Tensor:
    """`activate(x @ weight^T + bias)`: [..., out] for x [..., in], weight [out, in], bias [out], all of one dtype.

    A weight that is not a tensor multiplies in its own way. Few rows go through the native kernel, at the speed of
    memory, and many rows of bfloat16 where the CPU multiplies pairs of those. Where the CPU cannot multiply the type,
    weights are widened to float32 piece by piece and the result is rounded once; memory grows by one piece.
    Raises ValueError for other shapes.
    """
    if not isinstance(weight, Tensor):
        return activate(weight.matmul(x, bias), activation)
    _expect_fit(x, weight, bias)
    if _native_takes(weight, x, bias):
        return _native(x, weight, bias, activation)[0]
    wide = arithmetic_dtype(x)
    if wide == x.dtype or x.numel() < FEW_ROWS * x.shape[-1]:
        return _many_rows(x, weight, bias, activation)
    x_wide, out = x.to(wide), x.new_empty(*x.shape[:-1], len(weight))
    rows = max(1, PIECE_BYTES // (weight.shape[1] * wide.itemsize))
    for start in range(0, len(weight), rows):
        piece = slice(start, start + rows)
        piece_of_bias = None if bias is None else bias[piece].to(wide)
        out[..., piece] = _many_rows(x_wide, weight[piece].to(wide), piece_of_bias, activation)
    return out


def look_up(ids: Tensor, table: Tensor | Weight) -> Tensor:
    """The rows of these ids: [..., in] for int64 [...] and a table [out, in]."""
    return F.embedding(ids, table) if isinstance(table, Tensor) else table.look_up(ids)


def linear_pair(
    x: Tensor,
    weight: Tensor | Weight,
    other: Tensor | Weight,
    bias: Tensor | None = None,
    other_bias: Tensor | None = None,
    *,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """`linear` with two weights of one shape, each with its bias. wide: in float32, not rounded to x's type."""
    _expect_fit(x, weight, bias)
    _expect_fit(x, other, other_bias, "other", "other_bias")
    if _native_takes(weight, x, bias) and _native_takes(other, x, other_bias) and weight.shape == other.shape:
        if not wide or x.dtype == torch.float32:
            return _native(x, weight, bias, None, other, other_bias, apart=True)
        if x.numel() <= NATIVE_ROWS * x.shape[-1]:
            return _native(x, weight, bias, None, other, other_bias, apart=True, wide=True)
    if wide:
        x, weight, other = x.float(), _widened(weight), _widened(other)
        bias, other_bias = _widened(bias), _widened(other_bias)
    return linear(x, weight, bias), linear(x, other, other_bias)


def _widened(tensor: Any) -> Any:
    """float32 of a tensor; anything else as it is."""
    return tensor.float() if isinstance(tensor, Tensor) else tensor


def gated(
    x: Tensor,
    gate: Tensor | Weight,
    up: Tensor | Weight,
    activation: str,
    gate_bias: Tensor | None = None,
    up_bias: Tensor | None = None,
    limit: float = math.inf,
) -> Tensor:
    """`linear(x, gate, gate_bias, activation) * linear(x, up, up_bias)`, with gate and up of one shape.

    limit: the gate is cut off above it before the activation, its factor above and below (DeepSeek-V4, `swiglu_limit`).
    Raises ValueError for other shapes, and for a limit that is not positive.
    """
    _expect_fit(x, gate, gate_bias, "gate", "gate_bias")
    _expect_fit(x, up, up_bias, "up", "up_bias")
    expect_limit(limit)
    if isinstance(gate, Tensor) and isinstance(up, Tensor):
        expect("up", up, *gate.shape)
    if _native_takes(gate, x, gate_bias) and _native_takes(up, x, up_bias):
        return _native(x, gate, gate_bias, activation, up, up_bias, limit=limit)[0]
    if limit < math.inf:
        return activate_gated(linear(x, gate, gate_bias), linear(x, up, up_bias), activation, limit)
    left, right = linear(x, gate, gate_bias, activation), linear(x, up, up_bias)
    return left * right if torch.is_grad_enabled() else left.mul_(right)


def activate_gated(gate: Tensor, up: Tensor, activation: str, limit: float = math.inf) -> Tensor:
    """`activate(min(gate, limit), activation) * clip(up, -limit, limit)`, of one shape."""
    if limit < math.inf:
        gate, up = gate.clamp_max(limit), up.clamp(-limit, limit)
    return activate(gate, activation) * up


def expect_limit(limit: float) -> None:
    if not limit > 0:
        raise ValueError(f"limit is {limit}, expected a positive number")


def grouped_linear(x: Tensor, weight: Tensor | WeightStack) -> Tensor:
    """`linear(x[:, g], weight[g])` of each group g: [tokens, G, out] for x [tokens, G, in] and weight [G, out, in].

    Raises ValueError for other shapes. Source: DeepSeek-V4, the first of two output projections of attention.
    """
    groups, out, _ = dimensions("weight", weight, "G", "out", "in")
    _, _, size = dimensions("x", x, "tokens", "G", "in")
    expect("weight", weight, x.shape[1], out, size)
    if not isinstance(weight, Tensor):
        return weight.matmul_each(x)
    if not (0 < len(x) <= NATIVE_ROWS and dispatch.takes(x, weight) and weight.is_contiguous()):
        return torch.stack([linear(x[:, g], weight[g]) for g in range(groups)], 1)
    x, y = x.transpose(0, 1).contiguous(), x.new_empty(groups, len(x), out)
    dispatch.native.product(
        x=x,
        w=weight,
        y=y,
        rows=x.shape[1],
        inputs=size,
        outputs=out,
        groups=groups,
        bfloat16=x.dtype is torch.bfloat16,
    )
    return y.transpose(0, 1)


def _expect_fit(
    x: Tensor, weight: Tensor | Weight, bias: Tensor | None, name: str = "weight", bias_name: str = "bias"
) -> None:
    """Raises ValueError unless a matrix and its bias fit x; a weight that is not a tensor sees to that itself."""
    if not isinstance(weight, Tensor):
        return
    out, size = dimensions(name, weight, "out", "in")
    if size != x.shape[-1]:
        raise misfit(name, weight, out, x.shape[-1])
    if bias is not None:
        expect(bias_name, bias, out)


def activate(x: Tensor, activation: str | None) -> Tensor:
    """Each element through "silu", "gelu" (its tanh approximation) or nothing (None)."""
    if activation is None:
        return x
    return F.silu(x) if activation == "silu" else F.gelu(x, approximate="tanh")


def _many_rows(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None) -> Tensor:
    if onednn.takes(x, weight):
        return onednn.product(x, weight, bias, activation)
    return activate(F.linear(x, weight, bias), activation)


def _native_takes(weight: Tensor | Weight, x: Tensor, bias: Tensor | None) -> TypeGuard[Tensor]:
    size = x.shape[-1]
    return (
        (0 < x.numel() <= NATIVE_ROWS * size or (x.numel() > 0 and size % PAIRED == 0 and _multiplies_pairs(x.dtype)))
        and isinstance(weight, Tensor)
        and dispatch.takes(x, weight, bias)
        and weight.is_contiguous()
    )


def _multiplies_pairs(dtype: torch.dtype) -> bool:
    """Whether native products of many rows are the fastest: oneDNN's are on CPUs with tiles of bfloat16."""
    return dtype is torch.bfloat16 and dispatch.active() == "avx512_bf16" and not torch.cpu._is_amx_tile_supported()


def _native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    activation: str | None,
    other: Tensor | None = None,
    other_bias: Tensor | None = None,
    apart: bool = False,
    limit: float = math.inf,
    wide: bool = False,
) -> tuple[Tensor, Tensor]:
    """Products with one weight or two, by the native kernel. apart: both, and otherwise what is left of them, twice.

    wide: in float32.
    """
    out_size, size = weight.shape
    x = x.contiguous()
    bias = None if bias is None else bias.contiguous()
    other_bias = None if other_bias is None else other_bias.contiguous()
    out = x.new_empty((*x.shape[:-1], out_size), dtype=torch.float32 if wide else x.dtype)
    out_2 = torch.empty_like(out) if apart else out
    dispatch.native.product(
        x=x,
        w=weight,
        bias=bias,
        w2=other,
        bias2=other_bias,
        y=out,
        y2=out_2 if apart else None,
        rows=x.numel() // size,
        inputs=size,
        outputs=out_size,
        activation=activation or "none",
        limit=limit,
        wide=wide,
        bfloat16=x.dtype is torch.bfloat16,
    )
    return out, out_2


def weighted_rows(weights: Tensor, table: Tensor) -> Tensor:
    """`weights @ table` in float32: [..., D] for weights [..., V] and table [V, D] of one dtype.

    Widened piece by piece as in `linear`.
    """
    wide = arithmetic_dtype(table)
    if wide == table.dtype:
        return (weights @ table).float()
    out = weights.new_zeros(*weights.shape[:-1], table.shape[1], dtype=wide)
    rows = max(1, PIECE_BYTES // (table.shape[1] * wide.itemsize))
    for start in range(0, len(table), rows):
        piece = slice(start, start + rows)
        out += weights[..., piece].to(wide) @ table[piece].to(wide)
    return out


@cache
def _has_arithmetic(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if dtype == torch.float16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_fp16_supported()
    return True
