"""Memory of DeepSeek-V4's attention: the last tokens as they are, everything older in compressed entries.

A layer holds the entries of its window, one for each window of `ratio` tokens that is complete, the indexer's key of
each where there is an indexer, and how far the window that is open has got: a running softmax per channel, which takes
one token after the other, so that any cut into passes gives the same numbers. Keys are values, of one head.

As in every memory, what a pass stages lies behind what is committed. An entry that a pass completes is seen by the
queries of that pass already; if fewer tokens are kept, the open window is gone through again from what was committed.
Source: DeepSeek-V4 report (arXiv 2606.19348), sections 2.3.1 and 2.3.2, and the authors' `inference/model.py`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from sparing.config.entry_formats import entry_bytes, key_bytes
from sparing.config.memory import CompressedSpec
from sparing.kernels.compressor import PooledRow, PoolTable, empty_windows, pool_rows
from sparing.kernels.finite import all_finite
from sparing.kernels.indexer import select_rows
from sparing.kernels.released_entries import decode_entries, decode_keys, encode_entries, encode_keys, round_queries
from sparing.kernels.rows import AttendedRow, RowTable, write_rows
from sparing.kernels.sparse_attention import attend_joint
from sparing.memory.extents import Entries, Mark
from sparing.memory.group import Share

__all__ = ["CompressedGroup", "CompressedRows"]


@dataclass
class Series:
    """One kind of what is compressed: entries, or the indexer's keys.

    held: what complete windows have left; state: float32 [layers, c, 3, size], of the open window; both are replaced,
    never changed.
    """

    held: Entries
    state: Tensor

    @property
    def nbytes(self) -> int:
        return self.held.nbytes + self.state.nbytes

    def mark(self) -> tuple[Mark, Tensor]:
        return self.held.mark(), self.state

    def reset(self, mark: tuple[Mark, Tensor]) -> None:
        entries, self.state = mark
        self.held.reset(entries)

    def fork(self) -> Series:
        return Series(self.held.fork(), self.state)


class Inputs(NamedTuple):
    """What a layer compresses of a row. kv, gate: [added, c * size]; position_bias: float32 [ratio, c * size]."""

    kv: Tensor
    gate: Tensor
    position_bias: Tensor


@dataclass
class Staged:
    """What a pass leaves of a series. after: the state once all tokens are kept; inputs: of each layer, as it comes."""

    after: Tensor
    inputs: list[Inputs | None]


class CompressedGroup:
    """What layers of one spec remember of one sequence. layers: their numbers in the model."""

    def __init__(self, spec: CompressedSpec, layers: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.layers = tuple(layers)
        self._spec = spec
        count, index = len(self.layers), spec.index
        size, keys = spec.head_dim, 0 if index is None else index.head_dim
        if spec.codes is not None:
            stored, size_held, keys_held = torch.uint8, entry_bytes(size, spec.rope_dim), key_bytes(keys) if keys else 0
        else:
            stored, size_held, keys_held = dtype, size, keys
        self.window = Entries(count, 1, 1, size_held, stored, device)
        self.series: list[Series] = []  # of entries, then of the indexer's keys
        for own, held in ((size, size_held), (keys, keys_held)) if spec.ratio else ():
            if own:
                state = empty_windows(count, 2 if spec.is_overlapping else 1, own, device=device)
                self.series.append(Series(Entries(count, 1, 1, held, stored, device), state))
        self.staged: list[Staged] = []  # of each series

    def spec(self, layer: int) -> CompressedSpec:
        return self._spec

    @property
    def nbytes(self) -> int:
        return self.window.nbytes + sum(series.nbytes for series in self.series)

    def closed(self, tokens: int) -> int:
        """Windows that are complete after this many tokens."""
        return tokens // self._spec.ratio if self._spec.ratio else 0

    def stage(self, n: int, length: int, room: int) -> None:
        self.window.extend(n, length, n)
        before, after, most = self.closed(length), self.closed(length + n), self.closed(length + max(n, room))
        for series in self.series:
            series.held.extend(after - before, before, most - before if after > before else 0)
        self.staged = [Staged(torch.empty_like(series.state), [None] * len(self.layers)) for series in self.series]

    def commit(self, n: int, staged: int, length: int) -> None:
        states = [self._followed(number, n, staged, length) for number in range(len(self.series))] if n else []
        self.window.truncate(len(self.window) - staged + n)
        self.window.drop(max(0, len(self.window) - self._spec.window))
        for series, state in zip(self.series, states, strict=False):
            series.state = state
        for series in self.series:
            series.held.truncate(self.closed(length + n))
        self.staged = []

    def _followed(self, number: int, n: int, staged: int, length: int) -> Tensor:
        """The state of a series once the first n staged tokens are kept."""
        series, left = self.series[number], self.staged[number]
        if None in left.inputs:
            missing = self.layers[left.inputs.index(None)]
            raise ValueError(f"cannot commit {n} tokens: layer {missing} has not seen them")
        if n == staged:
            return left.after
        after = torch.empty_like(series.state)
        table = PoolTable([PooledRow(n, length, series.state, after)])
        for i, inputs in enumerate(left.inputs):
            assert inputs is not None
            pool_rows(inputs.kv[:n], inputs.gate[:n], inputs.position_bias, table, i)
        return after

    def mark(self) -> tuple[Mark, list[tuple[Mark, Tensor]], list[Staged]]:
        return self.window.mark(), [series.mark() for series in self.series], self.staged

    def reset(self, mark: tuple[Mark, list[tuple[Mark, Tensor]], list[Staged]]) -> None:
        window, of_series, self.staged = mark
        self.window.reset(window)
        for series, its in zip(self.series, of_series, strict=True):
            series.reset(its)

    def fork(self) -> CompressedGroup:
        """The same content. Neither side writes where the other might."""
        twin = object.__new__(CompressedGroup)
        twin.__dict__.update(self.__dict__)
        twin.window = self.window.fork()
        twin.series, twin.staged = [series.fork() for series in self.series], []
        return twin

    def blocks(self) -> dict[int, int]:
        found = self.window.blocks()
        tensors = [series.state for series in self.series] + [left.after for left in self.staged]
        for left in self.staged:
            tensors += [x for inputs in left.inputs if inputs is not None for x in inputs[:2]]
        for series in self.series:
            found |= series.held.blocks()
        storages = [tensor.untyped_storage() for tensor in tensors]
        return found | {storage.data_ptr(): storage.nbytes() for storage in storages}

    def entries(self, layer: int, length: int) -> Tensor:
        """Positions of all committed keys, int64 [1, n]: the first token of each complete window, then the last tokens.

        length: committed tokens.
        """
        i, where = self.layers.index(layer), self.window.where(self.layers.index(layer))
        firsts = [series.held.where(i)[:, : self.closed(length)] * self._spec.ratio for series in self.series[:1]]
        return torch.cat([*firsts, where[where < length][None]], 1).cpu()

    def state(self, layer: int) -> dict[str, Tensor]:
        i = self.layers.index(layer)
        found = {"window": self.window.read(i, 0)[0]}
        for name, series in zip(NAMES, self.series, strict=False):
            found |= {name: series.held.read(i, 0)[0], f"{name}_state": series.state[i]}
        return found

    def restore(self, length: int, states: Mapping[int, dict[str, Tensor]]) -> None:
        found = [states[layer] for layer in self.layers]
        self.window.restore([[state["window"][:, None]] for state in found], length, None)
        for name, series in zip(NAMES, self.series, strict=False):
            series.held.restore([[state[name][:, None]] for state in found], self.closed(length), None)
            series.state = torch.stack([state[f"{name}_state"] for state in found])
        self.staged = []

    def check(self, where: str, state: Mapping[str, Tensor], length: int) -> None:
        """Raises ValueError unless these tensors, of the right types, are what a layer holds after `length` tokens."""
        spec, open_tokens = self._spec, length % self._spec.ratio if self._spec.ratio else 0
        counts = {"window": spec.window_entries(length)} | dict.fromkeys(NAMES, spec.entries(length))
        for name in {*counts} & {*state}:
            if len(state[name]) != counts[name]:
                raise ValueError(
                    f"{where}: {name} holds {len(state[name])} entries, {length} tokens leave {counts[name]}"
                )
            numbers = state[name] if spec.codes is None else self._decoded(name, state[name])
            if not all_finite(numbers):
                raise ValueError(f"{where}: {name} holds numbers that are not finite")
        for name in (f"{name}_state" for name in NAMES[: len(self.series)]):
            # What begins with an overlap is never empty again; a window that has just begun otherwise is.
            begun = [open_tokens > 0 or (spec.is_overlapping and length > 0), open_tokens > 0]
            for triple, is_begun in zip(state[name], begun, strict=False):
                top, total, mix = triple
                if is_begun and not (all_finite(triple) and (total > 0).all()):
                    raise ValueError(f"{where}: {name} holds numbers that no softmax leaves")
                if not is_begun and not ((top == -torch.inf).all() and not total.any() and not mix.any()):
                    raise ValueError(f"{where}: {name} is that of a window with tokens, after {length} there are none")

    def _decoded(self, name: str, entries: Tensor) -> Tensor:
        spec = self._spec
        if name == "keys":
            return decode_keys(entries, spec.index.head_dim if spec.index else 0)
        return decode_entries(entries, spec.head_dim, spec.rope_dim)

    @staticmethod
    def together(groups: Sequence[CompressedGroup], shares: Sequence[Share]) -> CompressedRows:
        """The same layers of several rows in one pass."""
        return CompressedRows(groups, shares)


NAMES = ("compressed", "keys")  # of the series, as saved
ENTRIES, KEYS = range(2)


class CompressedRows:
    """The same layers of the rows of a batch, in a pass."""

    def __init__(self, groups: Sequence[CompressedGroup], shares: Sequence[Share]):
        if not all(share.causal for share in shares):
            raise ValueError("compressed attention is causal: a canvas cannot be denoised over it")
        self._groups, self._layers = groups, groups[0].layers
        self._spec = groups[0].spec(0)
        self._added = [share.added for share in shares]
        self._visible = 0  # entries of the row that has most
        self.closes = sum(  # windows that become complete in this pass, in all rows
            group.closed(share.end) - group.closed(share.end - share.added)
            for group, share in zip(groups, shares, strict=True)
        )
        self._window = RowTable(
            [self._attended(group.window, share) for group, share in zip(groups, shares, strict=True)]
        )
        self._tables: list[RowTable | None] = []  # of each series; None where no row has an entry
        self._pools: list[PoolTable] = []
        for number in range(len(groups[0].series)):
            rows, pooled = list[AttendedRow](), list[PooledRow]()
            for group, share in zip(groups, shares, strict=True):
                series, first = group.series[number], share.end - share.added
                closes = group.closed(share.end) - group.closed(first)
                rows.append(AttendedRow(series.held.spans, share.queries, share.end, closes))
                pooled.append(PooledRow(share.added, first, series.state, group.staged[number].after))
                self._visible = max(self._visible, len(series.held))
            like = next((row.spans[0].extent.data for row in rows if row.spans), None)  # a row may have no entry yet
            self._tables.append(None if like is None else RowTable(rows, like))
            self._pools.append(PoolTable(pooled))

    def _attended(self, entries: Entries, share: Share) -> AttendedRow:
        dropped = share.end - len(entries)
        return AttendedRow(entries.spans, share.queries, share.end, share.added, True, self._spec.window, dropped)

    @property
    def selects(self) -> bool:
        """Whether there are more entries than the indexer may choose; if not, queries see all of them."""
        return self._spec.index is not None and self._visible > self._spec.index.topk

    def pool(self, layer: int, kv: Tensor, gate: Tensor, position_bias: Tensor, keys: bool) -> Tensor:
        """Take what tokens add to the open windows: float32 [windows that close, size], to be written with `emit`.

        kv, gate: [all added tokens, c * size]; keys: of the indexer, not of the entries.
        """
        i, number = self._layers.index(layer), KEYS if keys else ENTRIES
        if len(self._groups) == 1:
            self._groups[0].staged[number].inputs[i] = Inputs(kv, gate, position_bias)
        else:
            parts = kv.split_with_sizes(self._added), gate.split_with_sizes(self._added)
            for group, of_kv, of_gate in zip(self._groups, *parts, strict=True):
                group.staged[number].inputs[i] = Inputs(of_kv, of_gate, position_bias)
        return pool_rows(kv, gate, position_bias, self._pools[number], i)

    def emit(self, layer: int, entries: Tensor, keys: bool) -> None:
        """Write the entries [windows that close, size] of this pass, normed and rotated."""
        table = self._tables[KEYS if keys else ENTRIES]
        assert table is not None
        write_rows(table, self._layers.index(layer), None, self._held(entries, keys)[:, None])

    def attend(
        self, layer: int, q: Tensor, kv: Tensor, sinks: Tensor, scale: float, asked: tuple[Tensor, Tensor] | None
    ) -> Tensor:
        """Write kv [all added tokens, size] and attend. q: [all queries, heads, size], returns its shape.

        sinks: float32 [heads]; asked: of the indexer, (queries [all queries, heads, size], weights float32
        [all queries, heads]).
        """
        i, spec = self._layers.index(layer), self._spec
        write_rows(self._window, i, None, self._held(kv)[:, None])
        compressed, selected = self._tables[ENTRIES] if self._tables else None, None
        if asked is not None and spec.index is not None and self.selects:
            queries, weights = asked
            keys = self._tables[KEYS]
            assert keys is not None
            if spec.codes is not None:
                queries = round_queries(queries)
            selected = select_rows(queries, weights, keys, i, m=spec.ratio, k=spec.index.topk)
        return attend_joint(
            q,
            self._window,
            compressed,
            i,
            m=max(1, spec.ratio),
            sinks=sinks,
            scale=scale,
            selected=selected,
            rotary=spec.rope_dim,
        )

    def _held(self, entries: Tensor, keys: bool = False) -> Tensor:
        """[n, size] as they are held."""
        if self._spec.codes is None:
            return entries
        return encode_keys(entries) if keys else encode_entries(entries, self._spec.rope_dim)

    def narrow(self, queries: Sequence[int]) -> None:
        """From now on this many of each row's newest positions ask."""
        for table in (self._window, *self._tables):
            if table is not None:
                table.narrow(queries)
