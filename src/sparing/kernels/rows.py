"""Rows of a batch and the entries each of them sees, as tables of numbers that one native call reads for all rows.

Entries of a row lie in spans, stretches of memory that each hold some of them, one after another, for all layers that
are alike. A table stays where it is; between two calls only numbers in it change.
"""

from __future__ import annotations

import sys
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Generic, Protocol, TypeVar

import torch
from torch import Tensor

from sparing.kernels import dispatch
from sparing.kernels.attention import NATIVE_ROWS, attention, expect_heads, native_attention
from sparing.kernels.partial import Partial, merge_partials, partial_attention
from sparing.kernels.shapes import expect
from sparing.kernels.tied_keys import KeysFromValues, attention_over_values, native_tied

__all__ = ["AttendedRow", "Extent", "RowTable", "Span", "attend_rows", "places_of", "write_rows"]

ROW = 9  # numbers of a row: `AttendedRow` of kernels/cpu/kernels.hpp
QUERIES = 1  # place of the number of queries


class Extent(Protocol):
    """Where entries lie.

    data: [layers, parts, heads, capacity, size], parts being keys and values, or values alone; places: see `places_of`.
    """

    data: Tensor
    places: tuple[int, int, int, int]


E = TypeVar("E", bound=Extent, covariant=True)


def places_of(data: Tensor) -> tuple[int, int, int, int]:
    """Of an extent's data: its address, bytes to the next part and to the next layer, numbers to the next head."""
    size = data.element_size()
    layer, part, head, _, _ = data.stride()
    return data.data_ptr(), part * size, layer * size, head


@dataclass(frozen=True)
class Span(Generic[E]):
    """Entries start..stop-1 of an extent.

    first: position of the first of them where they follow one another; else positions: int32 [layers, heads, n].
    """

    extent: E
    start: int
    stop: int
    first: int = 0
    positions: Tensor | None = None

    def __len__(self) -> int:
        return self.stop - self.start

    def cut(self, low: int, high: int) -> Span[E]:
        """Entries low..high-1 of these."""
        positions = None if self.positions is None else self.positions[..., low:high]
        return Span(self.extent, self.start + low, self.start + high, self.first + low, positions)

    def view(self, layer: int, part: int) -> Tensor:
        """[heads, n, size]"""
        return self.extent.data[layer, part, :, self.start : self.stop]

    def where(self, layer: int) -> Tensor:
        """Positions: int64 [heads, n]."""
        if self.positions is not None:
            return self.positions[layer].long()
        heads, device = self.extent.data.shape[2], self.extent.data.device
        return torch.arange(self.first, self.first + len(self), device=device).expand(heads, -1)

    def numbers(self) -> tuple[int, ...]:
        """`Span` of kernels/cpu/kernels.hpp."""
        _, parts, _, _, size = self.extent.data.shape
        address, part, layer, head = self.extent.places
        address += self.start * size * self.extent.data.element_size()
        where, where_head, where_layer = 0, 0, 0
        if self.positions is not None:
            where, (where_layer, where_head, _) = self.positions.data_ptr(), self.positions.stride()
            where_layer *= self.positions.element_size()
        keys, values = (address, address + part) if parts == 2 else (0, address)
        n = self.stop - self.start
        return keys, values, n, head, head, size, size, layer, where, where_head, where_layer, self.first


@dataclass
class AttendedRow:
    """What one row brings to `attend_rows`.

    spans: of all entries it may see, the oldest first; queries: how many stand at the end of them; added: how many of
    the newest are still to be written; window: how many a query sees at most, its own included (None: all); causal:
    False where all queries see each other and all before them; dropped: entries before the first that were forgotten;
    end: the position after the newest entry.
    """

    spans: Sequence[Span[Extent]]
    queries: int
    end: int
    added: int = 0
    causal: bool = True
    window: int | None = None
    dropped: int = 0

    @property
    def entries(self) -> int:
        n = 0
        for span in self.spans:  # without a call for each: it is asked for every row of a pass
            n += span.stop - span.start
        return n


class RowTable:
    """Rows whose tokens follow one another in what layers make of a batch.

    like: [layers, parts, heads, any, size] of the type and on the device of all entries, where rows may hold none.
    """

    def __init__(self, rows: Sequence[AttendedRow], like: Tensor | None = None):
        self.rows = rows
        self.like = rows[0].spans[0].extent.data if like is None else like
        _, self.parts, self.kv_heads, _, self.size = self.like.shape
        self.added = sum(row.added for row in rows)
        self.end = max(row.end for row in rows)
        self._rows, self._spans = array("q"), array("q")
        self._count()
        at = 0
        for row in rows:
            shape = row.added, row.queries, row.entries, at, len(row.spans)
            self._rows.extend((*shape, row.causal, row.window or 0, row.dropped, row.end))
            for span in row.spans:
                self._spans.extend(span.numbers())
            at += len(row.spans)
        # Of the rows and of their spans, and how many rows there are.
        self.addresses = self._rows.buffer_info()[0], self._spans.buffer_info()[0], len(rows)

    @property
    def is_released(self) -> bool:
        """Whether entries are the bytes of `kernels/released_entries.py`."""
        return self.like.dtype == torch.uint8

    def narrow(self, queries: Sequence[int]) -> None:
        """From now on this many of each row's newest positions ask."""
        for i, (row, n) in enumerate(zip(self.rows, queries, strict=True)):
            row.queries = self._rows[ROW * i + QUERIES] = n
        self._count()

    def _count(self) -> None:
        counts = [row.queries for row in self.rows]
        self.queries, self.most = sum(counts), max(counts)
        self._sections: list[RowTable] | None = None  # as `sections` found them

    def sections(self, few: int) -> list[RowTable]:
        """Neighbouring rows of at most `few` queries together, all others alone."""
        if self._sections is None:
            if len(self.rows) == 1 or self.most <= few:
                self._sections = [self]
            else:
                parts = groupby(enumerate(self.rows), lambda row: -1 if row[1].queries <= few else row[0])
                self._sections = [RowTable([row for _, row in part], self.like) for _, part in parts]
        return self._sections


def write_rows(table: RowTable, layer: int, k: Tensor | None, v: Tensor) -> None:
    """Write what rows add to their newest entries. k, v: [all added, kv_heads, size]; k None: values alone."""
    parts = [v] if k is None else [k, v]
    if len(parts) != table.parts:
        raise ValueError(f"{len(parts)} of keys and values were given, the entries hold {table.parts}")
    for name, new in zip("vk", reversed(parts), strict=False):
        expect(name, new, table.added, table.kv_heads, table.size)
    if dispatch.takes(table.like, *parts, types=dispatch.COPIED):
        v = v if v.stride(-1) == 1 else v.contiguous()
        k = k if k is None or k.stride(-1) == 1 else k.contiguous()
        _, kv_heads, size = v.shape
        rows, spans, num_rows = table.addresses
        dispatch.native.stage(
            k=k,
            v=v,
            rows=rows,
            spans=spans,
            num_rows=num_rows,
            layer=layer,
            kv_heads=kv_heads,
            d=size,
            dv=size,
            k_token=0 if k is None else k.stride(0),
            k_head=0 if k is None else k.stride(1),
            v_token=v.stride(0),
            v_head=v.stride(1),
            item=v.element_size(),
        )
        return
    at = 0
    for row in table.rows:
        end, spans = at + row.added, list(row.spans)
        stop = end
        while stop > at:  # from the newest entry backwards
            span = spans.pop()
            n = min(len(span), stop - at)
            for part, new in enumerate(parts):
                span.view(layer, part)[:, len(span) - n :].copy_(new[stop - n : stop].transpose(0, 1))
            stop -= n
        at = end


def attend_rows(
    q: Tensor,
    table: RowTable,
    layer: int,
    *,
    scale: float,
    keys: KeysFromValues | None = None,
    more: Partial | None = None,
) -> Tensor:
    """`attention` of each row's queries over its own entries. q: [queries of all rows, heads, d]; returns its shape.

    layer: of those that the spans hold; keys: how they follow from values, where values alone are held; more: what the
    queries made of entries elsewhere, float32, for attention over both (neither window nor keys then). Neighbouring
    rows of few queries share a native call; one of many goes alone, since PyTorch's products are then faster.
    """
    expect("q", q, table.queries, q.shape[1], table.size)
    expect_heads(q.shape[1], table.kv_heads)
    outputs, at = [], 0
    few = NATIVE_ROWS // (q.shape[1] // table.kv_heads) if keys is None else sys.maxsize
    for section in table.sections(few):
        part = q[at : at + section.queries]
        other = None if more is None else (more[0][at : at + section.queries], more[1][at : at + section.queries])
        at += section.queries
        if section.queries == 0:
            continue
        if section.most <= few and dispatch.takes(part, section.like):
            tied = None if keys is None else native_tied(keys, keys.weight, section.end, q.dtype)
            outputs.append(native_attention(part, section, layer, table.kv_heads, q.shape[-1], scale, tied, other))
        else:
            outputs += _each_alone(part, section, layer, scale, keys, other)
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else torch.empty_like(q)


def _each_alone(
    q: Tensor, table: RowTable, layer: int, scale: float, keys: KeysFromValues | None, more: Partial | None
) -> Iterator[Tensor]:
    sizes = [row.queries for row in table.rows]
    others = zip(*(x.split_with_sizes(sizes) for x in more), strict=True) if more else [None] * len(sizes)
    for part, row, other in zip(q.split_with_sizes(sizes), table.rows, others, strict=True):
        if row.queries == 0:
            continue
        if other is None:
            yield _attend_row(part, row, layer, scale, keys)
        else:
            k, v = (torch.cat([span.view(layer, i) for span in row.spans], 1) for i in (0, 1))
            mine = partial_attention(part.float(), k, v, scale=scale, causal=row.causal)
            yield merge_partials([mine, other]).to(q.dtype)


def _attend_row(q: Tensor, row: AttendedRow, layer: int, scale: float, keys: KeysFromValues | None) -> Tensor:
    values = [span.view(layer, -1) for span in row.spans]
    if keys is None:
        k = [span.view(layer, 0) for span in row.spans]
        return attention(q, k, values, scale=scale, causal=row.causal, window=row.window)
    v, where = torch.cat(values, 1), torch.cat([span.where(layer) for span in row.spans], 1)
    return attention_over_values(q, v, keys, where, scale=scale, causal=row.causal, window=row.window)
