"""Entries of layers alike, in extents: allocations that never move and are shared by all who remember the same tokens.

An extent has room for entries of every layer of a group, because layers alike hold the same tokens. What is remembered
of a sequence is then one short list of spans for all of them: it takes new entries, gives some back or slides on by
changing numbers. A fork takes over the list, and both sides go on in extents of their own.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor

from sparing.kernels.huge_pages import HugePages
from sparing.kernels.rows import Span, places_of
from sparing.memory.group import allocations

__all__ = ["STEP", "Entries", "Extent", "Mark"]

STEP = 64  # extents take a multiple of this many entries
GROWTH = 5  # a new extent has room for a fifth of what was written since the last fork
FEW = 4  # spans that a reader to whom each is a call of its own does not mind
LARGE = 4 << 20  # bytes from which on an extent lies in huge pages: reading it is faster, and a page is little of it


class Extent:
    """Room for entries of a group of layers.

    data: [layers, parts, heads, capacity, size], parts being keys and values, or values alone; owner: of the sequence
    that goes on writing here; readers: who may hold spans of it, as far as this matters to them.
    """

    def __init__(
        self, shape: tuple[int, int, int, int, int], dtype: torch.dtype, device: torch.device, owner: object
    ) -> None:
        make = torch.empty if math.prod(shape) * dtype.itemsize < LARGE else HugePages().empty
        self.data: Tensor = make(shape, dtype=dtype, device=device)
        self.places = places_of(self.data)
        self.owner = owner
        self.readers = WeakSet[Any]()

    @property
    def capacity(self) -> int:
        return self.data.shape[3]


Spans = tuple[Span[Extent], ...]
Mark = tuple[Spans, int]


class Entries:
    """What a group of layers holds of one sequence, the oldest first.

    spans: replaced, never changed; whoever has kept an earlier value has kept what was held then.
    step: entries of which an extent takes a multiple. joined: what was written since the last fork lies in one extent,
    for a reader to whom each span is a call of its own; where that is full, a larger one takes its place.
    """

    def __init__(
        self,
        layers: int,
        parts: int,
        heads: int,
        size: int,
        dtype: torch.dtype,
        device: torch.device,
        *,
        step: int = STEP,
        joined: bool = False,
    ):
        self.shape = layers, parts, heads, size
        self.dtype, self.device, self._step, self._joined = dtype, device, step, joined
        self.spans: Spans = ()
        self._written = 0  # entries since the last fork
        self._owner = object()

    def __len__(self) -> int:
        n = 0
        for span in self.spans:  # as in `AttendedRow.entries`
            n += span.stop - span.start
        return n

    @property
    def nbytes(self) -> int:
        """Bytes of the entries held, and of their positions where these do not follow one another."""
        positions = 0 if self.scattered is None else self.scattered.nbytes
        return len(self) * self.entry_nbytes + positions

    @property
    def entry_nbytes(self) -> int:
        """Bytes of one entry in all layers."""
        return math.prod(self.shape) * self.dtype.itemsize

    def extend(self, n: int, first: int, room: int = 0) -> None:
        """Make room for n entries more, which are to be written; the first of them has position `first`.

        room: how many entries a new extent should take at least, these included, where more are known to come.
        """
        spans, rest = list(self.spans), n
        last = spans[-1] if spans else None
        if rest and last is not None and self.owns(last):
            taken = min(last.extent.capacity - last.stop, rest)
            if taken and last.positions is None and last.first + len(last) == first:
                spans[-1] = replace(last, stop=last.stop + taken)
            elif taken:
                spans.append(Span(last.extent, last.stop, last.stop + taken, first))
            first, rest, room = first + taken, rest - taken, room - taken
        if rest:
            grown = min(self._written, len(self)) // GROWTH // self._step * self._step
            more = max(rest, room, grown)  # head-room stays below a quarter
            own = self._to_join(spans) if self._joined else []
            spans = spans[: len(spans) - len(own)]
            spans.append(self._copied(own, more, rest) if own else Span(self._extent(more), 0, rest, first))
            self._written += sum(len(span) for span in own if not self.owns(span))
        self.spans = tuple(spans)
        self._written += n

    def owns(self, span: Span[Extent]) -> bool:
        """Whether no fork reads its extent."""
        return span.extent.owner is self._owner

    def _to_join(self, spans: Sequence[Span[Extent]]) -> Sequence[Span[Extent]]:
        """The newest spans, its own, and where there are many those of forks that are gone."""
        at = len(spans)
        while at and (self.owns(spans[at - 1]) or (at > FEW and len(spans[at - 1].extent.readers) == 1)):
            at -= 1
        return spans[at:]

    def _copied(self, spans: Sequence[Span[Extent]], more: int, added: int) -> Span[Extent]:
        """What spans hold, and `added` entries still to be written, in an extent with room for `more` after it."""
        held, at = sum(map(len, spans)), 0
        extent = self._extent(held + more)
        for span in spans:
            extent.data[..., at : at + len(span), :] = span.extent.data[..., span.start : span.stop, :]
            at += len(span)
        return Span(extent, 0, held + added, spans[0].first)

    def truncate(self, n: int) -> None:
        """Forget all but the first n entries."""
        self._written = max(0, self._written - (len(self) - n))
        self.spans = self.cut(0, n)

    def clear(self) -> None:
        """Forget all, so that what comes next lies in extents of its own."""
        self.spans, self._written = (), 0

    def drop(self, n: int, after: int = 0) -> None:
        """Forget the n entries that follow the first `after`."""
        if n == 0:
            return
        self.spans = (*self.cut(0, after), *self.cut(after + n, len(self)))
        held, taken = len(self), sum({id(s.extent): s.extent.capacity for s in self.spans}.values())
        if taken > 2 * held + 2 * self._step:  # a long prompt's extent of which little is left
            self._rewrite(-(-held // GROWTH))

    def keep(self, index: Tensor) -> None:
        """Hold the entries index int64 [layers, heads, m] of each head alone, ascending; they keep their positions."""
        index = index.to(self.device)
        (layers, parts, heads, size), m, n = self.shape, index.shape[2], len(self)
        extent, positions = self._extent(m), index.new_empty(layers, heads, m, dtype=torch.int32)
        # Whole rows at once: six times as fast as gathering number by number.
        rows = (index + n * torch.arange(heads, device=self.device)[:, None]).flatten(1)
        for layer in range(layers):
            positions[layer] = self.where(layer).gather(1, index[layer])
            for part in range(parts):
                whole = self.read(layer, part).reshape(heads * n, size)
                extent.data[layer, part, :, :m] = whole.index_select(0, rows[layer]).view(heads, m, size)
        self.spans, self._written = (Span(extent, 0, m, 0, positions),), m

    def read(self, layer: int, part: int, low: int = 0, high: int | None = None) -> Tensor:
        """[heads, n, size] of all entries, or of low..high-1; a copy where these lie in several spans."""
        spans = self.spans if low == 0 and high is None else self.cut(low, len(self) if high is None else high)
        return self._concatenated([span.view(layer, part) for span in spans])

    def where(self, layer: int) -> Tensor:
        """Positions of all entries: int64 [heads, n]."""
        found = [span.where(layer) for span in self.spans]
        if len(found) == 1:
            return found[0]
        return torch.cat(found, 1) if found else torch.empty(self.shape[2], 0, dtype=torch.int64, device=self.device)

    def cut(self, low: int, high: int) -> Spans:
        """The spans of entries low..high-1."""
        found, at = list[Span[Extent]](), 0
        for span in self.spans:
            a, b = max(low - at, 0), min(high - at, len(span))
            if a < b:
                found.append(span if (a, b) == (0, len(span)) else span.cut(a, b))
            at += len(span)
        return tuple(found)

    @property
    def scattered(self) -> Tensor | None:
        """Positions int32 [layers, heads, m] of the oldest entries, which do not follow one another; None: all do."""
        return self.spans[0].positions if self.spans else None

    def restore(self, parts: Sequence[Sequence[Tensor]], length: int, scattered: Tensor | None) -> None:
        """Hold what was read from a file: per layer and part the entries [n, heads, size] of `length` tokens."""
        n = len(parts[0][0])
        extent = self._extent(n)
        for layer, of_layer in enumerate(parts):
            for part, entries in enumerate(of_layer):
                extent.data[layer, part, :, :n] = entries.transpose(0, 1)
        m = 0 if scattered is None else scattered.shape[2]
        spans = [Span(extent, 0, m, 0, scattered)] if m else []
        self.spans = (*spans, Span(extent, m, n, length - (n - m))) if n > m else tuple(spans)
        self._written = n

    def mark(self) -> Mark:
        return self.spans, self._written

    def reset(self, mark: Mark) -> None:
        self.spans, self._written = mark

    def blocks(self) -> dict[int, int]:
        """Bytes of each extent, and of positions, by what tells them apart."""
        extents = {id(span.extent): span.extent.data.nbytes for span in self.spans}
        return extents | allocations(span.positions for span in self.spans)

    def fork(self) -> Entries:
        """The same entries. Neither side writes where the other might."""
        twin = object.__new__(Entries)
        twin.__dict__.update(self.__dict__)
        self._owner, twin._owner = object(), object()
        self._written = twin._written = 0
        if self._joined:
            for span in self.spans:
                span.extent.readers.add(twin)
        return twin

    def _extent(self, n: int) -> Extent:
        layers, parts, heads, size = self.shape
        capacity = -(-n // self._step) * self._step
        extent = Extent((layers, parts, heads, capacity, size), self.dtype, self.device, self._owner)
        if self._joined:
            extent.readers.add(self)
        return extent

    def _rewrite(self, piece: int) -> None:
        """Copy what is held to new extents of about `piece` entries."""
        made, held, piece = list[Span[Extent]](), len(self), -(-piece // self._step) * self._step
        for low in range(0, held, piece):
            at, extent = 0, self._extent(piece)
            for span in self.cut(low, min(low + piece, held)):
                extent.data[..., at : at + len(span), :] = span.extent.data[..., span.start : span.stop, :]
                made.append(Span(extent, at, at + len(span), span.first, span.positions))
                at += len(span)
        self.spans = tuple(made)

    def _concatenated(self, parts: Sequence[Tensor]) -> Tensor:
        if len(parts) == 1:
            return parts[0]
        if parts:
            return torch.cat(list(parts), 1)
        _, _, heads, size = self.shape
        return torch.empty(heads, 0, size, dtype=self.dtype, device=self.device)
