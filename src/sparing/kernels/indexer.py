"""The lightning indexer: which compressed entries a query attends to, found with small keys and few heads.

score[t, w] = sum_h weight[t, h] * relu(q[t, h] . key[w]), scaled by (heads * size)^-1/2; the k largest are selected, of
equal ones those of the lowest number. Entry w stands for the window of m tokens from w * m on, and a query sees it from
the window's last token on: position t sees the first (t + 1) // m.
Source: DeepSeek-V4, lightning indexer of compressed sparse attention.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.kernels import dispatch
from sparing.kernels.rows import AttendedRow, RowTable
from sparing.kernels.shapes import dimensions, expect

__all__ = ["lightning_index", "select_rows", "select_topk", "visible_entries"]

PRODUCTS = 16 << 20  # queries * heads * keys that the reference holds at a time


def visible_entries(row: AttendedRow, entries: int, m: int, device: torch.device) -> Tensor:
    """How many of the first `entries`, one for each m tokens, the queries of a row see: int64 [queries]."""
    positions = torch.arange(row.end - row.queries, row.end, device=device)
    return ((positions + 1) // m).clamp_(max=entries)


def lightning_index(q: Tensor, K: Tensor, w: Tensor, visible: Tensor | None = None) -> Tensor:
    """Scores of M entries for T queries: [T, M] in float32, or float64 where q is.

    q: [T, heads, d]; K: [M, d], the entries' keys; w: [T, heads], weights of the heads as projected, of any sign;
    visible: integers [T], how many of the first entries a query sees (None: all), the others score minus infinity.
    Raises ValueError for other shapes. Source: DeepSeek-V4, lightning indexer.
    """
    tokens, heads, d = dimensions("q", q, "T", "heads", "d")
    entries, _ = dimensions("K", K, "M", str(d))
    expect("K", K, entries, d)
    expect("w", w, tokens, heads)
    wide = torch.promote_types(q.dtype, torch.float32)
    q, K, w = q.to(wide), K.to(wide), w.to(wide) * (heads * d) ** -0.5
    block = max(1, PRODUCTS // max(1, heads * entries))
    parts = zip(q.split(block), w.split(block), strict=True)
    scores = torch.cat([((some @ K.T).relu() * weights[..., None]).sum(1) for some, weights in parts])
    if visible is not None:
        expect("visible", visible, tokens)
        scores = scores.masked_fill(torch.arange(entries, device=q.device) >= visible[:, None], -torch.inf)
    return scores


def select_topk(scores: Tensor, k: int, visible: Tensor | None = None) -> Tensor:
    """The min(k, M) entries of the largest scores, the largest first: int64 [T, min(k, M)].

    scores: [T, M]; visible: integers [T], how many of the first entries a query sees (None: all); -1 stands where it
    sees fewer than k. Of equal scores the lowest entry is taken first. Raises ValueError for k below 1 and for other
    shapes.
    """
    tokens, entries = dimensions("scores", scores, "T", "M")
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    if visible is not None:
        expect("visible", visible, tokens)
        hidden = torch.arange(entries, device=scores.device) >= visible[:, None]
        scores = scores.masked_fill(hidden, -torch.inf)
    selected = scores.sort(descending=True, stable=True).indices[:, :k]
    return selected if visible is None else selected.masked_fill(selected >= visible[:, None], -1)


def select_rows(q: Tensor, w: Tensor, table: RowTable, layer: int, *, m: int, k: int) -> Tensor:
    """The entries that each row's queries attend to: int32 [queries of all rows, k'], ascending, then -1.

    q: [queries of all rows, heads, d]; w: [queries of all rows, heads], weights of the heads; table: of the entries'
    keys, [d] each; of its rows `end` and `queries` count tokens, `entries` are of all windows of m tokens that have
    closed; layer: of those that the spans hold. k' = min(k, the most that a query sees), at least 1.
    Raises ValueError for other shapes. The cost of a query grows with the entries it sees.
    """
    expect("q", q, table.queries, q.shape[1], table.size)
    expect("w", w, table.queries, q.shape[1])
    if k < 1:
        raise ValueError(f"k is {k}, expected at least 1")
    width = max(1, min(k, max(row.end // m if row.queries else 0 for row in table.rows)))
    if dispatch.takes(q, table.like):
        return _native_select(q, w, table, layer, m, k, width)
    selected = torch.full((table.queries, width), -1, dtype=torch.int32, device=q.device)
    at = 0
    for row in table.rows:
        some = slice(at, at + row.queries)
        at += row.queries
        if not row.spans:
            continue
        keys = torch.cat([span.view(layer, -1)[0] for span in row.spans])
        visible = visible_entries(row, len(keys), m, q.device)
        found = select_topk(lightning_index(q[some], keys, w[some], visible), k, visible)[:, :width]
        found = found.masked_fill(found < 0, len(keys)).sort().values  # what is missing comes last
        selected[some, : found.shape[1]] = found.masked_fill(found == len(keys), -1)
    return selected


def _native_select(q: Tensor, w: Tensor, table: RowTable, layer: int, m: int, k: int, width: int) -> Tensor:
    q = q if q.stride(-1) == 1 else q.contiguous()
    queries, heads, d = q.shape
    selected = q.new_empty(queries, width, dtype=torch.int32)
    rows, spans, num_rows = table.addresses
    dispatch.native.select_entries(
        q=q,
        w=w.float().contiguous(),
        selected=selected,
        rows=rows,
        spans=spans,
        num_rows=num_rows,
        layer=layer,
        heads=heads,
        d=d,
        q_token=q.stride(0),
        q_head=q.stride(1),
        m=m,
        k=k,
        width=width,
        bfloat16=q.dtype is torch.bfloat16,
    )
    return selected
