"""Rows of a batch and the recurrent states they go on from, as a table of numbers that one native call reads for all.

A row's tensors hold all layers that are alike. Between two layers of a pass nothing in the table changes; between two
passes only numbers do.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparing.kernels import dispatch
from sparing.kernels.shapes import expect
from sparing.kernels.ssm import MambaWeights, advance_state_, causal_conv, ssd_scan

__all__ = ["PendingInputs", "ScanTable", "ScannedRow", "StagedInputs", "parts_of", "scan_rows"]

ROW = 15  # numbers of a row: `ScannedRow` of kernels/cpu/kernels.hpp
QUERIES = 1  # place of the number of queries


@dataclass
class StagedInputs:
    """What a pass leaves of T tokens in each layer, until it is known how many of them are kept.

    windows: [layers, K - 1 + T, C] in one tensor or in one a layer, the inputs of the convolution, those before the
    first token included; mixed: float32 [layers, T, C], its results, or [1, T, C], those of the layer that came last;
    dt: float32 [layers, T, heads]; after: float32 [layers, heads, p, N], the states after all tokens, or None; weights:
    of the layers that have come.
    """

    windows: Sequence[Tensor]
    mixed: Tensor
    dt: Tensor
    after: Tensor | None
    weights: list[MambaWeights | None]
    addresses: array[int] = field(init=False)  # of the window of each layer

    def __post_init__(self) -> None:
        self.addresses = array("q")
        for part in self.windows:
            first, step = part.data_ptr(), part.stride(0) * part.element_size()
            self.addresses.extend(range(first, first + part.shape[0] * step, step))

    def window_of(self, layer: int) -> Tensor:
        """[K - 1 + T, C]"""
        part, i = divmod(layer, self.windows[0].shape[0])
        return self.windows[part][i]

    def mixed_of(self, layer: int) -> Tensor:
        """float32 [T, C]"""
        return self.mixed[layer % self.mixed.shape[0]]


@dataclass
class PendingInputs:
    """Of n committed tokens that states have yet to follow: mixed, dt and weights as in `StagedInputs`.

    carried: where the states go as they follow, layer by layer, which may be where they are; moved: 1 for each layer
    whose state has gone there.
    """

    mixed: Tensor
    dt: Tensor
    weights: list[MambaWeights | None]
    carried: Tensor | None = None
    moved: array[int] = field(init=False)

    def __post_init__(self) -> None:
        self.moved = array("q", bytes(8 * self.mixed.shape[0]))

    def state(self, states: Tensor, layer: int) -> Tensor:
        """The state [heads, p, N] of a layer after these tokens, new or what has been carried already."""
        if self.moved[layer]:
            assert self.carried is not None
            return self.carried[layer]
        state, weights = states[layer].clone(), self.weights[layer]
        assert weights is not None
        x, B, _ = parts_of(self.mixed[layer], *state.shape)
        advance_state_(state, x, self.dt[layer], weights.A, B)
        return state


@dataclass
class ScannedRow:
    """What one row brings to `scan_rows`.

    states: [layers, heads, p, N]; tails: [layers, K - 1, C], the inputs before the next token; pending: of committed
    tokens; staged: to be filled; queries: how many of the newest tokens are asked for their outputs.
    """

    states: Tensor
    tails: Tensor
    pending: PendingInputs | None
    staged: StagedInputs
    queries: int

    @property
    def added(self) -> int:
        return self.staged.dt.shape[1]

    def numbers(self) -> tuple[int, ...]:
        """`ScannedRow` of kernels/cpu/kernels.hpp."""
        staged, pending = self.staged, self.pending
        added, (layers, _, _), after = staged.dt.shape[1], staged.mixed.shape, staged.after
        first, step = self.states.data_ptr(), 0 if layers == 1 else staged.mixed.stride(0)
        carried, moved, rest = 0, 0, (0, 0, 0, 0)
        if pending is not None:
            assert pending.carried is not None
            carried, moved = pending.carried.data_ptr(), pending.moved.buffer_info()[0]
            _, n, channels = pending.mixed.shape
            rest = n, pending.mixed.stride(0) // channels, pending.mixed.data_ptr(), pending.dt.data_ptr()
        return (
            *(added, self.queries, first, carried, 0 if after is None else after.data_ptr(), moved),
            *(self.tails.data_ptr(), staged.addresses.buffer_info()[0]),
            *(staged.mixed.data_ptr(), step, staged.dt.data_ptr()),
            *rest,
        )


class ScanTable:
    """Rows whose tokens follow one another in what layers make of a batch."""

    def __init__(self, rows: Sequence[ScannedRow]):
        self.rows = rows
        self.added = sum(row.added for row in rows)
        self.queries = sum(row.queries for row in rows)
        self._rows = array("q")
        for row in rows:
            self._rows.extend(row.numbers())

    @property
    def address(self) -> int:
        return self._rows.buffer_info()[0]

    def narrow(self, queries: Sequence[int]) -> None:
        """From now on this many of each row's newest tokens are asked for their outputs."""
        for i, (row, n) in enumerate(zip(self.rows, queries, strict=True)):
            row.queries = self._rows[ROW * i + QUERIES] = n
        self.queries = sum(queries)


def scan_rows(table: ScanTable, layer: int, xbc: Tensor, dt: Tensor, weights: MambaWeights) -> Tensor:
    """Convolution and scan of one layer for all rows: float32 [all queries, heads, p].

    layer: of those that the rows' tensors hold; xbc: [all added, C], rows of x, B and C as they enter the convolution;
    dt: float32 [all added, heads], final. What is left of them goes to `staged` of each row and, where tokens are
    pending, the state after these to `carried`. Raises ValueError for other shapes.
    """
    row = table.rows[0]
    expect("xbc", xbc, table.added, row.tails.shape[2])
    expect("dt", dt, table.added, row.states.shape[1])
    if (
        row.states.dtype == torch.float32
        and dispatch.takes(row.states, dt, weights.A, weights.D)
        and dispatch.takes(row.tails, xbc, weights.conv_weight, weights.conv_bias)
    ):
        return _native_scan_rows(table, layer, xbc, dt, weights)
    sizes, outputs = [one.added for one in table.rows], list[Tensor]()
    for one, xbc_row, dt_row in zip(table.rows, xbc.split_with_sizes(sizes), dt.split_with_sizes(sizes), strict=True):
        outputs.append(_scan_row(one, layer, xbc_row, dt_row, weights))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs)


def _native_scan_rows(table: ScanTable, layer: int, xbc: Tensor, dt: Tensor, weights: MambaWeights) -> Tensor:
    row = table.rows[0]
    _, heads, p, n = row.states.shape
    xbc, dt = xbc if xbc.stride(1) == 1 else xbc.contiguous(), dt if dt.stride(1) == 1 else dt.contiguous()
    conv_weight, conv_bias, A, D = weights
    y = dt.new_empty(table.queries, heads, p)
    dispatch.native.scan_rows(
        x=xbc,
        conv_weight=conv_weight.contiguous(),
        conv_bias=None if conv_bias is None else conv_bias.contiguous(),
        dt=dt,
        A=A.contiguous(),
        D=D.contiguous(),
        y=y,
        rows=table.address,
        num_rows=len(table.rows),
        layer=layer,
        x_row=xbc.stride(0),
        dt_row=dt.stride(0),
        heads=heads,
        p=p,
        n=n,
        groups=(row.tails.shape[2] - heads * p) // (2 * n),
        taps=conv_weight.shape[2],
        bfloat16=xbc.dtype is torch.bfloat16,
    )
    return y


def _scan_row(row: ScannedRow, layer: int, xbc: Tensor, dt: Tensor, weights: MambaWeights) -> Tensor:
    staged, before = row.staged, row.tails.shape[1]
    window, mixed = staged.window_of(layer), staged.mixed_of(layer)
    window[:before].copy_(row.tails[layer])
    window[before:].copy_(xbc)
    mixed.copy_(causal_conv(window, weights.conv_weight, weights.conv_bias))
    staged.dt[layer].copy_(dt)
    state = _followed(row, layer)
    x, B, C = parts_of(mixed, *state.shape)
    is_wanted = staged.after is not None
    y, after = ssd_scan(x, dt, weights.A, B, C, weights.D, state, final_state=is_wanted)
    if staged.after is not None and after is not None:
        staged.after[layer].copy_(after)
    return y[len(y) - row.queries :]


def _followed(row: ScannedRow, layer: int) -> Tensor:
    """float32 [heads, p, N]: the state of a layer, carried over pending tokens."""
    pending = row.pending
    if pending is None:
        return row.states[layer].float()
    state = pending.state(row.states, layer)
    if not pending.moved[layer]:
        assert pending.carried is not None
        pending.carried[layer].copy_(state)
        pending.moved[layer] = 1
    return state


def parts_of(mixed: Tensor, heads: int, p: int, n: int) -> tuple[Tensor, Tensor, Tensor]:
    """x [T, heads, p], B and C [T, groups, n] of [T, C]."""
    tokens, channels = mixed.shape
    shared = (channels - heads * p) // 2
    x, B, C = mixed.split_with_sizes([heads * p, shared, shared], -1)
    groups = (tokens, shared // n, n)
    return x.view(tokens, heads, p), B.view(groups), C.view(groups)
