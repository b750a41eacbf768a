"""Attention of layers that project keys and values with one matrix: keys are made from values as they are read.

With u the shared projection, v = rms(u) and k = rope(rms(u) * w, position), so k = rope(v * w, position).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparing.config.rope import RopeParameters
from sparing.kernels import dispatch
from sparing.kernels.attention import OneRow, attention, expect_heads, expect_seen, native_attention
from sparing.kernels.rope import RotationTable, inverse_frequencies, rope_tables, rotate, rotation_table
from sparing.kernels.shapes import dimensions, expect, expect_indices

__all__ = ["KeysFromValues", "attention_over_values"]

LARGEST = 2**31  # no text has as many tokens


class KeysFromValues:
    """How the keys of one layer follow from its values: `rope(v * weight, position)`.

    weight: [head_dim] of the norm of keys; rope: the layer's rotation, whose frequencies do not depend on the length.
    Source: Gemma 4, `attention_k_eq_v`.
    """

    def __init__(self, weight: Tensor, rope: RopeParameters):
        self.weight, self.rope = weight, rope
        inv_freq, _ = inverse_frequencies(rope, len(weight))
        # Of "proportional" RoPE three quarters of the pairs (m, m + head_dim / 2), the last ones, do not turn.
        self._inv_freq = inv_freq[: int(inv_freq.count_nonzero())]
        self._tables: dict[torch.dtype, RotationTable] = {}

    @property
    def turning(self) -> int:
        """How many pairs (m, m + head_dim / 2), the first ones, turn with the position."""
        return len(self._inv_freq)

    def __call__(self, values: Tensor, positions: Tensor) -> Tensor:
        """The keys of values [kv_heads, n, head_dim] at positions [n] or [kv_heads, n]; returns the values' shape."""
        keys = (values * self.weight.float()).to(values.dtype)
        pairs = keys.unflatten(-1, (2, -1))[..., : self.turning]  # [kv_heads, n, 2, turning]
        tables = rope_tables(positions, self._inv_freq, values.dtype)
        turned = rotate(pairs.flatten(-2)[..., None, :], *tables)  # [kv_heads, n, 1, 2 * turning]
        pairs.copy_(turned.squeeze(-2).unflatten(-1, (2, -1)))
        return keys

    def table(self, n: int, dtype: torch.dtype) -> Tensor:
        """cos and sin of the pairs that turn at positions 0..n-1 at least: [.., 2, turning]."""
        if dtype not in self._tables:
            cpu = torch.device("cpu")  # native kernels alone read it
            self._tables[dtype] = rotation_table(self.rope, len(self.weight), dtype, cpu, self.turning)
        return self._tables[dtype].upto(n)


def expect_positions(where: int | Tensor, kv_heads: int, n: int) -> int | Tensor:
    """The first of n consecutive positions, or int64 [kv_heads, n] all of them; raises ValueError for anything else."""
    if isinstance(where, Tensor):
        expect("where", where, kv_heads, n)
        return expect_indices("where", where, LARGEST)
    if not 0 <= where < LARGEST:
        raise ValueError(f"where is {where}, expected a number from 0 to {LARGEST - 1}")
    return where


def native_tied(keys: KeysFromValues, weight: Tensor, rows: int, dtype: torch.dtype) -> dict[str, Any]:
    """The fields of the native kernels' TiedKeys. rows: positions that there may be; weight, dtype: of theirs."""
    table = keys.table(rows, dtype)  # [.., 2, turning]
    return {"weight": weight, "table": table, "turning": keys.turning}


def native_positions(where: int | Tensor, n: int) -> tuple[Tensor | None, int, int]:
    """(positions in int32, or None where n follow one another; the first of those; one more than the largest)."""
    if isinstance(where, Tensor):
        return where.int().contiguous(), 0, int(where.max()) + 1
    return None, where, where + n


def attention_over_values(
    q: Tensor,
    v: Tensor,
    keys: KeysFromValues,
    where: int | Tensor,
    *,
    scale: float = 1.0,
    causal: bool = True,
    window: int | None = None,
) -> Tensor:
    """`attention` from the last T of S positions, with keys that follow from the values v [kv_heads, S, d].

    where: the first of S consecutive positions, or int64 [kv_heads, S] all of them. The rest, what is returned and what
    is raised: as in `attention`. In float32 bit for bit what it gives for stored keys. The native kernel makes keys in
    tiles and reads values once; plain PyTorch makes them all.
    """
    d = len(keys.weight)
    tokens, heads, _ = dimensions("q", q, "T", "heads", "d")
    kv_heads, n, _ = dimensions("v", v, "kv_heads", "S", "d")
    expect("q", q, tokens, heads, d)
    expect("v", v, kv_heads, n, d)
    expect_heads(heads, kv_heads)
    expect_seen(tokens, n, causal, window)
    where = expect_positions(where, kv_heads, n)
    if tokens and dispatch.takes(q, v, keys.weight):
        positions, first, rows = native_positions(where, n)
        row = OneRow(tokens, None, [v], causal, window, first if positions is None else positions)
        return native_attention(q, row, 0, kv_heads, d, scale, native_tied(keys, keys.weight, rows, v.dtype))
    if isinstance(where, int):
        where = torch.arange(where, where + v.shape[1], device=v.device)
    return attention(q, keys(v, where.to(v.device)), v, scale=scale, causal=causal, window=window)
