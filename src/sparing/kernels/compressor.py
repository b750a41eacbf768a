"""Windows of m tokens made into one entry each: a softmax per channel over the tokens of a window, weighted by gates.

A window that is still open is held as three numbers a channel: the largest gate so far, the sum of e^(gate - largest)
and the same sum weighted by the tokens' values. Tokens are folded in one after the other, in float32, so that a text
gives the same bits wherever it is cut.
With one series (`c` = 1, HCA) a window's entry is made of its own tokens. With two (CSA) each token brings two gates
and values: the second half of its channels is for the window it lies in, the first half for the one after, whose entry
is then made of 2 m tokens.
Source: DeepSeek-V4, heavily compressed and compressed sparse attention.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.kernels import dispatch
from sparing.kernels.shapes import dimensions, expect, misfit

__all__ = ["OpenWindows", "PoolTable", "PooledRow", "compress_windows", "csa_compress", "empty_windows", "pool_rows"]


def empty_windows(*sizes: int, dtype: torch.dtype = torch.float32, device: torch.device | None = None) -> Tensor:
    """Windows that no token has been folded into: [*sizes[:-1], 3, sizes[-1]], minus infinity and zeros."""
    windows = torch.zeros(*sizes[:-1], 3, sizes[-1], dtype=dtype, device=device)
    windows[..., 0, :] = -torch.inf
    return windows


@dataclass
class PooledRow:
    """What one row brings to `pool_rows`.

    tokens: how many it adds; first: position of the first of them; before: float32 [layers, c, 3, d], the window that
    is open before it: [:, 0] the entry of this window so far, [:, 1], with two series, the one after it; after: of
    the same shape, where the window that is open then is written. It may be `before`.
    """

    tokens: int
    first: int
    before: Tensor
    after: Tensor

    def closed(self, m: int) -> int:
        """How many windows of m tokens it closes."""
        return (self.first + self.tokens) // m - self.first // m

    def numbers(self) -> tuple[int, ...]:
        """`PooledRow` of kernels/cpu/kernels.hpp."""
        before, after = self.before, self.after
        return self.tokens, self.first, before.data_ptr(), before.stride(0), after.data_ptr(), after.stride(0)


class PoolTable:
    """Rows whose tokens follow one another in what layers make of a batch."""

    def __init__(self, rows: Sequence[PooledRow]):
        self.rows = rows
        self.tokens = sum(row.tokens for row in rows)
        self._rows = array("q")
        for row in rows:
            self._rows.extend(row.numbers())

    @property
    def address(self) -> int:
        return self._rows.buffer_info()[0]

    def closed(self, m: int) -> int:
        """How many windows of m tokens all rows close."""
        return sum(row.closed(m) for row in self.rows)


def pool_rows(kv: Tensor, gate: Tensor, ape: Tensor, table: PoolTable, layer: int) -> Tensor:
    """Entries of the windows that the rows' tokens close, row by row: float32 [closed windows, d].

    kv, gate: [all tokens, c * d], values and gates as projected; ape: float32 [m, c * d], added to the gates by a
    token's place in its window; layer: of those that the rows' windows hold. Writes `after` of each row.
    Raises ValueError for other shapes.
    """
    row = table.rows[0]
    _, c, _, d = row.before.shape
    expect("kv", kv, table.tokens, c * d)
    expect("gate", gate, table.tokens, c * d)
    expect("ape", ape, ape.shape[0], c * d)
    if dispatch.takes(kv, gate) and dispatch.takes(ape, row.before, row.after):
        return _native_pool(kv, gate, ape, table, layer)
    entries, at = list[Tensor](), 0
    for row in table.rows:
        some = slice(at, at + row.tokens)
        found, after = _pool(kv[some], gate[some], ape, row.before[layer], row.first)
        row.after[layer].copy_(after)
        entries.append(found)
        at += row.tokens
    return entries[0] if len(entries) == 1 else torch.cat(entries)


def _native_pool(kv: Tensor, gate: Tensor, ape: Tensor, table: PoolTable, layer: int) -> Tensor:
    _, series, _, d = table.rows[0].before.shape
    kv, gate = kv if kv.stride(1) == 1 else kv.contiguous(), gate if gate.stride(1) == 1 else gate.contiguous()
    entries = ape.new_empty(table.closed(len(ape)), d)
    dispatch.native.pool(
        kv=kv,
        gate=gate,
        ape=ape.contiguous(),
        entries=entries,
        rows=table.address,
        num_rows=len(table.rows),
        layer=layer,
        kv_row=kv.stride(0),
        gate_row=gate.stride(0),
        m=len(ape),
        series=series,
        d=d,
        bfloat16=kv.dtype is torch.bfloat16,
    )
    return entries


def compress_windows(kv: Tensor, gate: Tensor, ape: Tensor) -> Tensor:
    """One entry for each m tokens: [B, T // m, d], float32, or float64 where kv is.

    kv, gate: [B, T, d], values and gates; ape: [m, d], added to the gates by a token's place in its window. Per
    channel, an entry is the mean of its window's values, weighted by the softmax of their gates. Tokens after the last
    whole window are left out. Raises ValueError for other shapes. Source: DeepSeek-V4, HCA before norm and rotation.
    """
    batch, _, d = _measure(kv, gate, ape, 1)
    return _pool(kv, gate, ape, empty_windows(batch, 1, d, dtype=_wide(kv), device=kv.device), 0)[0]


class OpenWindows(NamedTuple):
    """Where `csa_compress` goes on: what is folded so far, [B, 2, 3, d], and how many tokens came before."""

    sums: Tensor
    tokens: int


def csa_compress(kv: Tensor, gate: Tensor, ape: Tensor, state: OpenWindows | None = None) -> tuple[Tensor, OpenWindows]:
    """Entries [B, n, d] of windows that overlap, of the n that these tokens close, and the state to go on from.

    kv, gate: [B, T, 2 d]: channels [d:] of a token count for its own window, [:d] for the next; ape: [m, 2 d], added to
    the gates by a token's place in its window; state: after the tokens before these (None: these are the first), left
    as it is. Any way to cut a text gives the same entries. float32, or float64 where kv is.
    Raises ValueError for other shapes. Source: DeepSeek-V4, CSA before norm and rotation.
    """
    batch, tokens, d = _measure(kv, gate, ape, 2)
    if state is None:
        state = OpenWindows(empty_windows(batch, 2, d, dtype=_wide(kv), device=kv.device), 0)
    expect("state.sums", state.sums, batch, 2, 3, d)
    entries, sums = _pool(kv, gate, ape, state.sums, state.tokens)
    return entries, OpenWindows(sums, state.tokens + tokens)


def _measure(kv: Tensor, gate: Tensor, ape: Tensor, series: int) -> tuple[int, int, int]:
    batch, tokens, channels = dimensions("kv", kv, "B", "T", "d" if series == 1 else "2 d")
    if channels % series:
        raise misfit("kv", kv, batch, tokens, "2 d")
    expect("gate", gate, batch, tokens, channels)
    m, _ = dimensions("ape", ape, "m", str(channels))
    expect("ape", ape, max(m, 1), channels)
    return batch, tokens, channels // series


def _wide(x: Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _pool(kv: Tensor, gate: Tensor, ape: Tensor, before: Tensor, first: int) -> tuple[Tensor, Tensor]:
    """(entries [..., n, d], the window open after them [..., c, 3, d]) of T tokens from position `first` on.

    kv, gate: [..., T, c * d]; before: [..., c, 3, d]. All windows are folded side by side, slot by slot.
    """
    m, (c, _, d), tokens = ape.shape[0], before.shape[-3:], kv.shape[-2]
    start = first % m
    closed, touched = (start + tokens) // m, -(-(start + tokens) // m)
    if tokens == 0:
        return before.new_zeros(*kv.shape[:-2], 0, d), before
    slots = (start + torch.arange(tokens, device=kv.device)) % m
    values, scores = kv.to(before.dtype), gate.to(before.dtype) + ape.to(before.dtype)[slots]
    if touched > 1:  # slots without a token take no part: their gates are minus infinity
        room = (0, 0, start, touched * m - start - tokens)
        values, scores = F.pad(values, room), F.pad(scores, room, value=-torch.inf)
    # [..., touched, slots, d], one for each series.
    series = [x.unflatten(-1, (c, d)).unflatten(-3, (touched, -1)).unbind(-2) for x in (values, scores)]
    fresh = empty_windows(*kv.shape[:-2], touched, d, dtype=before.dtype, device=kv.device)
    rest = fresh[..., 1:, :, :]
    own, ahead = torch.cat([before[..., :1, :, :], rest], -3), fresh  # [..., touched, 3, d]
    if c == 2:
        ahead = _fold(torch.cat([before[..., 1:, :, :], rest], -3), series[0][0], series[1][0])
        own = torch.cat([before[..., :1, :, :], ahead[..., :-1, :, :]], -3)
    own = _fold(own, series[0][-1], series[1][-1])
    entries = own[..., :closed, 2, :] / own[..., :closed, 1, :]
    if closed == touched:  # the next window has begun with what this one left it
        after = [ahead[..., -1:, :, :], fresh[..., :1, :, :]][:c]
    else:
        after = [own[..., -1:, :, :], ahead[..., -1:, :, :]][:c]
    return entries, torch.cat(after, -3)


def _fold(windows: Tensor, values: Tensor, scores: Tensor) -> Tensor:
    """Windows [..., 3, d] after further tokens of each, one after the other. values, scores: [..., slots, d]."""
    top, total, mix = windows.unbind(-2)
    for value, score in zip(values.unbind(-2), scores.unbind(-2), strict=True):
        highest = torch.maximum(top, score)
        shift = highest.masked_fill(highest == -torch.inf, 0.0)  # of a window that is still empty
        kept, weight = torch.exp(top - shift), torch.exp(score - shift)
        top, total, mix = highest, total * kept + weight, mix * kept + value * weight
    return torch.stack([top, total, mix], -2)
