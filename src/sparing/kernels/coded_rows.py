"""Attention over codes for rows of a batch, of which each has codes of its own, in one native call.

As in `kernels/rows.py` a table says where they lie, for all layers that are alike.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.kernels import dispatch
from sparing.kernels.codes import SCALES, Codes, attention_over_codes
from sparing.kernels.partial import add_up
from sparing.kernels.rows import Extent, Span

__all__ = ["CodedRow", "CodedSpan", "CodesTable", "attend_coded_rows"]


@dataclass(frozen=True)
class CodedSpan:
    """Codes of `tokens` tokens: blocks of 64 of them, of keys and of values, and their scales (see `Codes`)."""

    tokens: int
    keys: Span[Extent]
    key_scales: Span[Extent]
    values: Span[Extent]
    value_scales: Span[Extent]

    def numbers(self) -> tuple[int, ...]:
        """`CodedSpan` of kernels/cpu/kernels.hpp."""
        places = [_place(span) for span in (self.keys, self.key_scales, self.values, self.value_scales)]
        addresses, heads, layers = zip(*places, strict=True)
        return *addresses, self.tokens, *heads, *layers


def _place(span: Span[Extent]) -> tuple[int, int, int]:
    """Address of the first entry, numbers to the next head and bytes to the next layer."""
    data, (address, _, layer, head) = span.extent.data, span.extent.places
    return address + span.start * data.shape[-1] * data.element_size(), head, layer


@dataclass
class CodedRow:
    """What one row brings to `attend_coded_rows`: how many queries, and spans of all tokens that they see."""

    queries: int
    spans: Sequence[CodedSpan]


class CodesTable:
    """Rows whose queries follow one another in what layers make of a batch. At least one of them has a span."""

    def __init__(self, rows: Sequence[CodedRow], dims: tuple[int, int], bits: tuple[int, int]):
        """dims, bits: of the codes of keys and of values."""
        self.rows, self.dims, self.bits = rows, dims, bits
        self.queries = sum(row.queries for row in rows)
        self.like = next(row.spans[0] for row in rows if row.spans)
        self._rows, self._spans, at = array("q"), array("q"), 0
        for row in rows:
            self._rows.extend((row.queries, at, len(row.spans)))
            for span in row.spans:
                self._spans.extend(span.numbers())
            at += len(row.spans)
        # Of the rows and of their spans, and how many rows there are.
        self.addresses = self._rows.buffer_info()[0], self._spans.buffer_info()[0], len(rows)


def attend_coded_rows(
    q: Tensor,
    table: CodesTable,
    layer: int,
    centroids: tuple[Tensor, Tensor],
    *,
    scale: float = 1.0,
    exact: bool = True,
) -> tuple[Tensor, Tensor]:
    """Attend over the codes of each row, all of them visible to its queries: (out, lse), a partial attention.

    q: float32 [queries of all rows, heads, dims] in the frame of keys, few a row; layer: of those that spans hold;
    centroids: of keys and values; scale, exact: as in `attention_over_codes`. out: [queries of all rows, heads, dims]
    in the frame of values, 0 for a row without codes, whose lse is minus infinity.
    """
    heads, like = q.shape[1], table.like
    kinds = like.key_scales.extent.data.dtype, like.value_scales.extent.data.dtype
    if not dispatch.takes(q, *centroids) or kinds[0] != kinds[1] or kinds[0] not in SCALES:
        return _reference(q, table, layer, centroids, scale, exact)
    q = q.contiguous()
    out, lse = q.new_empty(len(q), heads, table.dims[1]), q.new_empty(len(q), heads)
    rows, spans, num_rows = table.addresses
    dispatch.native.coded_rows(
        q=q,
        k_centroids=centroids[0],
        v_centroids=centroids[1],
        out=out,
        lse=lse,
        rows=rows,
        spans=spans,
        num_rows=num_rows,
        layer=layer,
        heads=heads,
        kv_heads=like.keys.extent.data.shape[2],
        d=table.dims[0],
        dv=table.dims[1],
        k_bits=table.bits[0],
        v_bits=table.bits[1],
        has_half_scales=kinds[0] is torch.float16,
        is_exact=exact,
        scale=scale,
    )
    return out, lse


def _reference(
    q: Tensor, table: CodesTable, layer: int, centroids: tuple[Tensor, Tensor], scale: float, exact: bool
) -> tuple[Tensor, Tensor]:
    outputs, masses = [], []
    for row, part in zip(table.rows, q.split_with_sizes([row.queries for row in table.rows]), strict=True):
        found = []
        for span in row.spans:
            views = [x.view(layer, 0) for x in (span.keys, span.key_scales, span.values, span.value_scales)]
            keys = Codes(views[0], views[1], centroids[0], table.dims[0])
            values = Codes(views[2], views[3], centroids[1], table.dims[1])
            (out,), lse = attention_over_codes([part], [keys], [values], span.tokens, scale=scale, exact=exact)
            found.append((out, lse))
        if not found:
            empty = part.new_zeros(*part.shape[:2], table.dims[1])
            found = [(empty, part.new_full(part.shape[:2], float("-inf")))]
        out, lse = add_up(found)
        outputs.append(out)
        masses.append(lse)
    return torch.cat(outputs), torch.cat(masses)
