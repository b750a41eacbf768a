"""The same coded layers of the rows of a batch, in a pass.

Attention of a row is one part over codes and one over exact entries, merged. Passes over a canvas, which all read the
same codes, decode them once, for a `Reading` to hold.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Protocol

import torch
from torch import Tensor

from sparing import kernels
from sparing.config.codes import CodeFormat
from sparing.kernels.attention import NATIVE_ROWS
from sparing.kernels.coded_rows import CodesTable, attend_coded_rows
from sparing.kernels.codes import attention_over_codes
from sparing.kernels.partial import Partial, merge_partials, partial_attention
from sparing.kernels.rows import AttendedRow, RowTable, attend_rows, write_rows
from sparing.kernels.tied_codes import attention_over_tied_codes
from sparing.memory.group import Reading, Share
from sparing.memory.turboquant.layers import CodedLayers, Counts, listed

__all__ = ["CodedRows"]

DECODED_AT_ONCE = 1024  # tokens of a canvas' prefix: what decoding needs beside the result


class Coded(Protocol):
    """What a row's group of coded layers shows of itself, see `CodedGroup`."""

    @property
    def form(self) -> CodeFormat: ...

    counts: Counts
    expected: int

    def place(self, layer: int) -> tuple[int, int]: ...

    def alike(self, number: int) -> CodedLayers: ...

    @property
    def is_observing(self) -> bool: ...

    def observe(self, layer: int, q: Tensor, scale: float) -> None: ...


class CodedRows:
    """Coded layers of the rows of a batch, in a pass."""

    def __init__(self, groups: Sequence[Coded], shares: Sequence[Share]):
        self._rows = [CodedRow(group, share) for group, share in zip(groups, shares, strict=True)]
        self._tables: dict[int, RowTable] = {}  # by layers that are alike, to write
        self._sections: dict[tuple[int, int], list[CodedRow | FewQueries]] = {}  # by those and heads, to attend

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: [all added tokens, kv_heads, head_dim]. Raises ValueError for what has no code."""
        for name, x in (("keys", k), ("values", v)):
            if not torch.isfinite(x).all():
                raise ValueError(
                    f"turboquant: {name} hold NaN or infinite numbers, which have no code:"
                    f" use kv='dense', or a dtype wider than {str(x.dtype).removeprefix('torch.')}"
                )
        if len(v) == 0:
            return
        number, i = self._rows[0].group.place(layer)
        if number not in self._tables:
            self._tables[number] = RowTable([row.added(number) for row in self._rows])
        tied = self._rows[0].group.alike(number).keys_from_values
        write_rows(self._tables[number], i, None if tied else k, v)

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """q: [all queries, heads, d], returns its shape."""
        number, _ = self._rows[0].group.place(layer)
        if (sections := self._sections.get((number, q.shape[1]))) is None:
            sections = self._sections[number, q.shape[1]] = list(self._made_sections(number, q.shape[1]))
        parts = q.split_with_sizes([section.queries for section in sections])
        outputs = [section.attend(layer, x, scale) for section, x in zip(sections, parts, strict=True)]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else q

    def _made_sections(self, number: int, heads: int) -> Iterator[CodedRow | FewQueries]:
        """Neighbouring rows whose few queries read codes of the same coders together, all others alone."""
        asking = (row for row in self._rows if row.queries)
        for together, rows in groupby(asking, lambda row: row.together(number, heads) or row):
            if isinstance(together, CodedRow):
                yield together
            else:
                yield FewQueries(list(rows), number)

    def narrow(self, queries: Sequence[int]) -> None:
        """From now on this many of each row's newest positions ask."""
        self._sections = {}
        for row, n in zip(self._rows, queries, strict=True):
            row.ask(n)


class FewQueries:
    """Rows whose few queries read the same share of their entries as codes: two calls for all of them.

    One over codes, in their frame, and one over exact entries, which adds up both.
    """

    def __init__(self, rows: Sequence[CodedRow], number: int):
        """number: of the layers that are alike."""
        self.queries = sum(row.queries for row in rows)
        self._asked = [(row.group.alike(number), row.coded, row.group) for row in rows]
        self._rows, self._number = rows, number
        self._tables: tuple[CodesTable | None, RowTable] | None = None

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """q: [queries of all rows, heads, d], returns its shape."""
        _, i = self._rows[0].group.place(layer)
        for layers, coded, group in self._asked:
            if layers.done[i] < coded:
                layers.encode(i, coded, group.counts, group.expected)
        if self._tables is None:  # once codes have their places, in all layers alike
            self._tables = self._made_tables()
        codes, exact = self._tables
        if codes is None:
            return attend_rows(q, exact, i, scale=scale)
        keys, values = self._asked[0][0].coders[i]
        (projected,), centroids = keys.project(q.float()), (keys.centroids[0], values.centroids[0])
        # The rounding of products of bytes hides in a bfloat16 model's own.
        is_exact = q.dtype == torch.float32
        out, lse = attend_coded_rows(projected, codes, i, centroids, scale=scale, exact=is_exact)
        return attend_rows(q, exact, i, scale=scale, more=(values.quantiser.assemble([out]), lse))

    def _made_tables(self) -> tuple[CodesTable | None, RowTable]:
        layers = [row.group.alike(self._number) for row in self._rows]
        coded = [of_row.coded_row(row.queries, row.coded) for of_row, row in zip(layers, self._rows, strict=True)]
        of_keys, of_values = layers[0].codes
        dims, bits = (of_keys.dims[0], of_values.dims[0]), (of_keys.bits[0], of_values.bits[0])
        codes = CodesTable(coded, dims, bits) if any(row.spans for row in coded) else None
        return codes, RowTable([row.exactly(self._number) for row in self._rows])


class CodedRow:
    """One row of the batch."""

    def __init__(self, group: Coded, share: Share):
        if share.window is not None:
            raise ValueError("turboquant: codes are read whole, a window over them is not defined: use kv='dense'")
        self.group, self._share = group, share
        self.ask(share.queries)

    def added(self, number: int) -> AttendedRow:
        """Where what the row adds is written, in the layers alike of this number."""
        spans = self.group.alike(number).exact.spans
        return AttendedRow(spans, self.queries, self._share.end, self._share.added)

    def ask(self, queries: int) -> None:
        """Its newest positions ask, this many."""
        self.queries = queries
        self._runs = list(self._made_runs())
        self._tables: dict[tuple[int, int], RowTable] = {}  # by layers alike and entries seen, where all are exact

    def _made_runs(self) -> Iterator[tuple[int, int, int]]:
        """(coded, start, stop): queries start..stop-1 read `coded` entries as codes, all others exactly."""
        # Within a prompt, each query reads as codes what it would read as codes if it came alone. That number stays the
        # same for a run of queries (a block, mostly), so they are answered run by run.
        counts, form, n = self.group.counts, self.group.form, self.queries
        if not (self._share.causal and form.prefill == "stream"):
            yield counts.coded, 0, n
            return
        first = counts.end - n
        for coded, run in groupby(range(n), lambda t: counts.coded_at(first + t, form)):
            members = list(run)
            yield coded, members[0], members[-1] + 1

    @property
    def coded(self) -> int:
        """Entries that the newest query reads as codes."""
        return self._runs[-1][0]

    def together(self, number: int, heads: int) -> object:
        """What rows have in common that answer their few queries together, in layers alike; None: this one is alone."""
        layers, share = self.group.alike(number), self._share
        if (
            len(self._runs) > 1
            or self.queries * heads > NATIVE_ROWS * layers.spec.num_key_value_heads
            or self.group.counts.held - self.coded < self.queries  # a drafter's, that stages nothing itself
            or not layers.is_plain
            or self.group.is_observing
            or (share.reading is not None and not share.causal and self.group.counts.coded)
        ):
            return None
        return layers.coders[0][0]

    def exactly(self, number: int) -> AttendedRow:
        """The entries that its queries, which are few, read exactly."""
        layers, share, counts = self.group.alike(number), self._share, self.group.counts
        after = counts.sinks + self.coded - counts.coded
        spans = [*layers.exact.cut(0, counts.sinks), *layers.exact.cut(after, counts.exact)]
        return AttendedRow(spans, self.queries, share.end, causal=share.causal)

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """q: [T, heads, d], returns its shape."""
        group, counts, share = self.group, self.group.counts, self._share
        group.observe(layer, q, scale)
        number, i = group.place(layer)
        layers = group.alike(number)
        if share.reading is not None and not share.causal and counts.coded:
            return self._over_canvas(layers, i, share.reading, q, scale)
        layers.encode(i, self._runs[-1][0], counts, group.expected)  # all at once
        exact: tuple[Tensor, Tensor] | None = None
        outputs = []
        for coded, start, stop in self._runs:
            # The run's exact entries: sinks, and the tail from what it reads as codes up to its last query.
            high = counts.exact - len(q) + stop if share.causal else counts.exact
            part = q[start:stop]
            if coded == 0:
                outputs.append(self._over_exact(number, i, part, high, scale))
                continue
            if exact is None:
                exact = layers.exact_keys(i, counts), layers.exact.read(i, -1)
            k, v = (_without(x[:, :high], counts.sinks, coded - counts.coded) for x in exact)
            wide = part.float()
            # The rounding of products of bytes hides in a bfloat16 model's own.
            partials = [_over_codes(layers, i, wide, coded, counts, scale, q.dtype == torch.float32)]
            if k.shape[1]:
                partials.append(partial_attention(wide, k, v, scale=scale, causal=share.causal))
            outputs.append(merge_partials(partials).to(q.dtype))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def _over_exact(self, number: int, i: int, q: Tensor, n: int, scale: float) -> Tensor:
        """Attention over the first n entries, all of them exact."""
        layers, share = self.group.alike(number), self._share
        if (table := self._tables.get((number, n))) is None:
            end = share.end - (self.group.counts.exact - n)
            table = RowTable([AttendedRow(layers.exact.cut(0, n), len(q), end, causal=share.causal)])
            self._tables[number, n] = table
        tied = layers.keys_from_values
        return attend_rows(q, table, i, scale=scale, keys=tied[i] if tied else None)

    def _over_canvas(self, layers: CodedLayers, i: int, reading: Reading, q: Tensor, scale: float) -> Tensor:
        """Attention of tokens that see each other and every entry: pass after pass over the same codes.

        The first pass decodes them, in the queries' dtype; the next ones only write the exact entries after them (in
        what order entries lie makes no difference here).
        """
        counts, layer = self.group.counts, layers.layers[i]
        n, heads, d = counts.coded, layers.spec.num_key_value_heads, layers.spec.head_dim
        of = layers.codes[0].held_in, n, counts.held, q.dtype
        if (held := reading.find(layer, of)) is None:
            held = (q.new_empty(heads, counts.held, d), q.new_empty(heads, counts.held, d))
            for start in range(0, n, DECODED_AT_ONCE):
                stop = min(start + DECODED_AT_ONCE, n)
                for whole, part in zip(held, layers.decode(i, start, stop, counts), strict=True):
                    whole[:, start:stop] = part
            reading.keep(layer, of, held)
        for whole, part in zip(held, (layers.exact_keys(i, counts), layers.exact.read(i, -1)), strict=True):
            whole[:, n:] = part
        return kernels.attention(q, *held, scale=scale, causal=False)


def _over_codes(
    layers: CodedLayers, i: int, q: Tensor, n: int, counts: Counts, scale: float, is_exact: bool
) -> Partial:
    """Attention over the first n codes, in the queries' frame. q: float32 [T, heads, d]."""
    coders, bias = layers.coders[i], layers.biases[i]
    values, logits = layers.codes[-1].upto(i, coders[-1], n), None
    found = list[tuple[list[Tensor], Tensor]]()
    if layers.keys_from_values:
        for start, stop, parts in values:
            where = layers.coded_positions(i, start, stop, counts)
            of_span = (parts, stop - start, layers.keys_from_values[i], where, coders[-1])
            found.append(attention_over_tied_codes(q, *of_span, scale=scale, exact=is_exact))
    else:
        if bias is not None:
            logits = bias.logits(q, listed(layers.coded_positions(i, 0, n, counts), n, q.device)) * scale
        projected = coders[0].project(q)
        for (start, stop, keys), (_, _, parts) in zip(layers.codes[0].upto(i, coders[0], n), values, strict=True):
            more = None if logits is None else logits[..., start:stop]
            found.append(
                attention_over_codes(projected, keys, parts, stop - start, scale=scale, bias=more, exact=is_exact)
            )
    out, lse = found[0] if len(found) == 1 else _merged(found)
    return coders[-1].quantiser.assemble(out), lse


def _merged(spans: Sequence[tuple[list[Tensor], Tensor]]) -> tuple[list[Tensor], Tensor]:
    """Partial attentions over disjoint codes, as one."""
    masses = [lse for _, lse in spans]
    of_parts = zip(*(out for out, _ in spans), strict=True)
    parts = [merge_partials(list(zip(spans, masses, strict=True))) for spans in of_parts]
    return parts, torch.stack(masses).logsumexp(0)


def _without(x: Tensor, start: int, n: int) -> Tensor:
    """x [heads, m, d] without the n entries from `start` on."""
    if n == 0:
        return x
    return x[:, n:] if start == 0 else torch.cat([x[:, :start], x[:, start + n :]], 1)
