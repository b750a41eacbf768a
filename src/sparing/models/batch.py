"""Rows of different lengths joined into one list of tokens: no padding anywhere."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, groupby
from typing import Any

import torch
from torch import Tensor

from sparing.kernels.ssm import MambaWeights
from sparing.memory.group import Reading, Share
from sparing.memory.sequence import Memory

__all__ = ["RaggedBatch", "Row"]


@dataclass
class Row:
    """One sequence's share of a forward pass.

    tokens: int64 [T] new ids, None where hidden states alone stand for them; memory: what came before; wanted: how many
    of the last positions' outputs are read (None: all); causal: False for a canvas, whose tokens all see each other;
    text_end: how many tokens the sequence holds once the text is read that these are a piece of (None: with these), on
    which "dynamic" rotation depends; reading: of a canvas, what passes over it share; hidden: [T, H], what enters the
    first layer that runs, in place of the tokens' embeddings.
    """

    tokens: Tensor | None
    memory: Memory
    wanted: int | None = None
    causal: bool = True
    text_end: int | None = None
    reading: Reading | None = None
    hidden: Tensor | None = None

    @property
    def size(self) -> int:
        """T, how many positions are new."""
        return len(self.tokens if self.hidden is None else self.hidden)  # type: ignore[arg-type]

    @property
    def num_wanted(self) -> int:
        size = len(self.tokens if self.hidden is None else self.hidden)  # type: ignore[arg-type]
        return size if self.wanted is None else min(self.wanted, size)


class RaggedBatch:
    """What a model's forward sees: ids or hidden states of all rows, their positions, and where alone rows matter:
    `attend` and `scan`.

    Stages the tokens of all rows; `commit` or `rollback` ends that. Raises ValueError for a row without tokens, and for
    a memory that is in two rows or has staged tokens.
    """

    def __init__(self, rows: Sequence[Row]):
        self.rows = list(rows)
        ids = [row.tokens for row in rows if row.tokens is not None]
        hidden = [row.hidden for row in rows if row.hidden is not None]
        if 0 < len(hidden) < len(rows):
            raise ValueError(f"{len(hidden)} of {len(rows)} rows have hidden states: give those of all, or of none")
        self._sizes = [len(entering) for entering in hidden or ids]
        if not all(self._sizes):
            raise ValueError(f"row {self._sizes.index(0)} of the pass has no tokens: leave it out")
        if len({id(row.memory) for row in rows}) < len(self.rows):
            raise ValueError("one memory is in two rows of the pass: give each row a memory of its own, such as a fork")
        self._counts = self._sizes  # positions of each row still carried through the layers
        self._ids = torch.cat(ids) if len(ids) == len(rows) else None  # [tokens]
        self.hidden = torch.cat(hidden) if hidden else None  # [tokens, H]
        first, device = [row.memory.length for row in rows], (self.ids if self.hidden is None else self.hidden).device
        self.positions = torch.cat(
            [torch.arange(a, a + n, device=device) for a, n in zip(first, self._sizes, strict=True)]
        )
        if staged := next((row.memory.staged for row in self.rows if row.memory.staged), 0):
            raise ValueError(f"{staged} tokens are staged: commit or roll back before the next forward")
        self._stage()
        # Neighbouring rows whose memories were made alike go through each layer together.
        alike = groupby(range(len(self.rows)), lambda i: id(self.rows[i].memory.layout))
        self._sections = [RowsAlike(self, list(numbers)) for _, numbers in alike]

    @property
    def ids(self) -> Tensor:
        """int64 [tokens]. Raises ValueError where a row has hidden states alone."""
        if self._ids is None:
            raise ValueError("a row has hidden states alone, and these layers read token ids too: give it its tokens")
        return self._ids

    def _stage(self) -> None:
        try:
            for row, n in zip(self.rows, self._sizes, strict=True):
                row.memory.stage(n, row.text_end or 0)
        except BaseException:
            self.rollback()
            raise

    @property
    def lengths(self) -> Tensor:
        """int64 [tokens]: length of the text that each was given with, or up to itself where it was generated."""
        ends = [
            row.memory.length + n if row.text_end is None else row.text_end
            for row, n in zip(self.rows, self._sizes, strict=True)
        ]
        of_tokens = torch.tensor(ends).repeat_interleave(torch.tensor(self._sizes))
        return torch.maximum(of_tokens.to(self.positions.device), self.positions + 1)

    def share(self, i: int, layer: int) -> Share:
        """What row i brings to a pass through a layer and those alike."""
        row, n = self.rows[i], self._sizes[i]
        return Share(n, self._counts[i], row.causal, row.memory.length + n, reading=row.reading)

    def attend(self, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float = 1.0) -> Tensor:
        """Stage k, v (None in a layer that shares another's entries) and attend, all rows at once.

        q: [carried tokens, heads, d]; k, v: [tokens, kv_heads, d]; returns q's shape.
        """
        outputs = []
        for section, q_rows, k_rows, v_rows in self._divided(q, k, v):
            rows, source = section.of(layer)
            if v_rows is not None:
                rows.write(source, k_rows, v_rows)
            outputs.append(rows.attend(source, q_rows, scale))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def scan(self, layer: int, xbc: Tensor, dt: Tensor, weights: MambaWeights) -> Tensor:
        """Stage the inputs of a Mamba layer and read its states, all rows at once.

        xbc: [tokens, C]; dt: float32 [tokens, heads]; both as in `RecurrentRows.scan`.
        Returns float32 [carried tokens, heads, head_dim].
        """
        outputs = [
            section.of(layer)[0].scan(layer, xbc_rows, dt_rows, weights)
            for section, _, xbc_rows, dt_rows in self._divided(None, xbc, dt)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def closed(self, ratio: int) -> Tensor:
        """int64 [n]: numbers of the windows of `ratio` tokens that become complete in this pass, row after row."""
        found = list[Tensor]()
        for row, n in zip(self.rows, self._sizes, strict=True):
            first = row.memory.length
            found.append(torch.arange(first // ratio, (first + n) // ratio, device=self.ids.device))
        return torch.cat(found)

    def pool(self, layer: int, kv: Tensor, gate: Tensor, position_bias: Tensor, *, keys: bool = False) -> Tensor:
        """Take what tokens add to the windows that are open, in a layer that compresses: see `CompressedRows`.

        kv, gate: [tokens, c * size]. Returns float32 [windows that become complete, size], to be written by `emit`.
        """
        if len(self._sections) == 1:
            return self._sections[0].of(layer)[0].pool(layer, kv, gate, position_bias, keys)
        outputs = [
            section.of(layer)[0].pool(layer, kv_rows, gate_rows, position_bias, keys)
            for section, _, kv_rows, gate_rows in self._divided(None, kv, gate)
        ]
        return torch.cat(outputs)

    def emit(self, layer: int, entries: Tensor, *, keys: bool = False) -> None:
        """Write the entries [windows that become complete, size] of this pass, normed and rotated."""
        end = 0
        for section in self._sections:
            rows = section.of(layer)[0]
            start, end = end, end + rows.closes
            if rows.closes:
                rows.emit(layer, entries[start:end], keys)

    def selects(self, layer: int) -> bool:
        """Whether a layer's indexer has to choose among entries."""
        return any(section.of(layer)[0].selects for section in self._sections)

    def attend_compressed(
        self,
        layer: int,
        q: Tensor,
        kv: Tensor,
        sinks: Tensor,
        scale: float,
        asked: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Stage kv [tokens, d] and attend over it, what came before, and entries: see `CompressedRows`.

        q: [carried tokens, heads, d], returns its shape; sinks: float32 [heads]; asked: what the indexer asks with,
        (queries [carried tokens, heads, size], weights float32 [carried tokens, heads]), where it has to choose.
        """
        if len(self._sections) == 1:
            return self._sections[0].of(layer)[0].attend(layer, q, kv, sinks, scale, asked)
        outputs = []
        queries, weights = asked or (None, None)
        divided = (self._divided(x, kv, None) for x in (q, queries, weights))
        for (section, q_rows, kv_rows, _), (_, its_queries, *_), (_, its_weights, *_) in zip(*divided, strict=True):
            its = None if its_queries is None else (its_queries, its_weights)
            outputs.append(section.of(layer)[0].attend(layer, q_rows, kv_rows, sinks, scale, its))
        return torch.cat(outputs)

    def _divided(
        self, carried: Tensor | None, *of_tokens: Tensor | None
    ) -> Iterator[tuple[RowsAlike, Tensor | None, Tensor | None, Tensor | None]]:
        """Each section with its part of what all rows carry, and of what all rows staged."""
        if len(self._sections) == 1:
            yield self._sections[0], carried, *of_tokens  # type: ignore[misc]
            return
        first, first_carried = 0, 0
        for section in self._sections:
            end = first + sum(self._sizes[i] for i in section.numbers)
            end_carried = first_carried + sum(self._counts[i] for i in section.numbers)
            part = None if carried is None else carried[first_carried:end_carried]
            yield section, part, *(None if x is None else x[first:end] for x in of_tokens)  # type: ignore[misc]
            first, first_carried = end, end_carried

    def narrow(self) -> Tensor | None:
        """From here on carry only the positions whose output is read: nothing later looks at the others.

        Called by the model after the last keys and values are made. Returns their indices, or None if all are read.
        """
        self._counts = [row.num_wanted for row in self.rows]
        if self._counts == self._sizes:
            return None
        for section in self._sections:
            section.narrow([self._counts[i] for i in section.numbers])
        kept = [torch.arange(end - n, end) for end, n in zip(accumulate(self._sizes), self._counts, strict=True)]
        return torch.cat(kept).to(self.positions.device)

    def rollback(self) -> None:
        for row in self.rows:
            row.memory.rollback()

    def commit(self) -> None:
        for row, n in zip(self.rows, self._sizes, strict=True):
            row.memory.commit(n)


class RowsAlike:
    """Rows of a batch whose memories consist of the same groups. numbers: of the rows."""

    def __init__(self, batch: RaggedBatch, numbers: Sequence[int]):
        self.numbers = numbers
        self._batch = batch
        self._memories = [batch.rows[i].memory for i in numbers]
        self._groups: dict[int, Any] = {}  # by number, as far as layers have asked

    def of(self, layer: int) -> tuple[Any, int]:
        """All rows of the group that a layer reads, for this pass, and the layer that holds what it reads."""
        layout = self._memories[0].layout
        place, source = layout.places[layer], layout.sources[layer]
        assert place is not None and source is not None
        if (found := self._groups.get(place)) is None:
            groups = [memory.groups[place] for memory in self._memories]
            found = groups[0].together(groups, [self._batch.share(i, layer) for i in self.numbers])
            self._groups[place] = found
        return found, source

    def narrow(self, queries: Sequence[int]) -> None:
        """From now on this many of each row's newest positions ask."""
        for rows in self._groups.values():
            rows.narrow(queries)
