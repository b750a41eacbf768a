"""Attention over a window of recent tokens and over compressed entries of all before, with one softmax over both.

There is one kv head, and an entry is key and value at once. A learned sink per head takes part in the softmax and
contributes no value, so that a query that sees nothing gives zeros. Entry w stands for the window of m tokens from
w * m on, and position t sees the first (t + 1) // m entries, or those of them that an indexer selected: then the cost
of a query grows with what is selected, not with the text.
Source: DeepSeek-V4, hybrid attention.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.config.entry_formats import entry_bytes
from sparing.kernels import dispatch
from sparing.kernels.indexer import visible_entries
from sparing.kernels.released_entries import decode_entries
from sparing.kernels.rows import AttendedRow, RowTable
from sparing.kernels.shapes import expect

__all__ = ["attend_joint", "csa_attention", "hca_attention", "sparse_attention"]

GATHERED = 4 << 20  # numbers of entries that the reference holds at a time


def sparse_attention(q: Tensor, kv: Tensor, idx: Tensor, sink: Tensor, scale: float) -> Tensor:
    """Attend to the entries that are named for each query: [..., T, N, d] in q's dtype.

    q: [..., T, N, d]; kv: [..., M, d], keys and values at once, for all N heads; idx: integers [..., T, K], entries of
    each query, -1: none; sink: [N], a logit of each head that only adds to the denominator. In float32, or float64
    where q is. What is not named does not reach a query, not even NaN; a query without entries gives zeros.
    Raises ValueError for other shapes and for an entry that does not exist.
    """
    *batch, tokens, heads, d = q.shape
    entries = kv.shape[-2]
    expect("kv", kv, *batch, entries, d)
    expect("idx", idx, *batch, tokens, idx.shape[-1])
    expect("sink", sink, heads)
    _expect_numbers(idx, entries)
    if entries == 0 or q.numel() == 0:
        return torch.zeros_like(q)
    wide = torch.promote_types(q.dtype, torch.float32)
    queries, idx, kv = q.reshape(-1, tokens, heads, d), idx.reshape(-1, tokens, idx.shape[-1]).long(), kv.reshape(-1, d)
    starts = entries * torch.arange(len(queries), device=q.device)
    block = max(1, GATHERED // max(1, len(queries) * idx.shape[-1] * d))
    outputs = []
    for i in range(0, tokens, block):
        some, rows = idx[:, i : i + block], queries[:, i : i + block].to(wide)
        hidden = some < 0
        chosen = F.embedding(some.clamp(min=0) + starts[:, None, None], kv).to(wide)  # [B, t, K, d]
        chosen = chosen.masked_fill(hidden[..., None], 0.0)
        scores = (rows * scale) @ chosen.transpose(-1, -2)  # [B, t, N, K]
        scores = scores.masked_fill(hidden[..., None, :], -torch.inf)
        sinks = sink.to(wide)[:, None].expand(*scores.shape[:-1], 1)
        outputs.append(torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1] @ chosen)
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, 1)
    return out.reshape(q.shape).to(q.dtype)


def hca_attention(q: Tensor, kv: Tensor, entries: Tensor, sink: Tensor, window: int, m: int, scale: float) -> Tensor:
    """Heavily compressed attention of T tokens: [..., T, N, d] over the window and all closed windows.

    q: [..., T, N, d]; kv: [..., T, d], keys and values of the same tokens, normed and rotated; entries:
    [..., T // m, d], one for each m tokens; sink: [N]; window: how many tokens one sees at most, itself included.
    Raises ValueError for other shapes and a window or m below 1. Source: DeepSeek-V4, HCA.
    """
    every = torch.arange(entries.shape[-2], device=q.device).expand(*q.shape[:-2], -1)
    return csa_attention(q, kv, entries, every, sink, window, m, scale)


def csa_attention(
    q: Tensor, kv: Tensor, entries: Tensor, idx: Tensor, sink: Tensor, window: int, m: int, scale: float
) -> Tensor:
    """Compressed sparse attention of T tokens: [..., T, N, d] over the window and the closed windows that are selected.

    idx: integers [..., T, K], selected entries of each query, -1: none, of which it sees those that have closed; the
    rest is as in `hca_attention`. Raises ValueError for other shapes, an entry that does not exist, and a window or m
    below 1. Source: DeepSeek-V4, CSA.
    """
    if window < 1 or m < 1:
        raise ValueError(f"window is {window} and m is {m}, expected at least 1")
    *batch, tokens, _, d = q.shape
    expect("kv", kv, *batch, tokens, d)
    expect("entries", entries, *batch, entries.shape[-2], d)
    expect("idx", idx, *batch, tokens, idx.shape[-1])
    _expect_numbers(idx, entries.shape[-2])
    positions = torch.arange(tokens, device=q.device)
    return _joint(q, kv, 0, entries, idx, positions, sink, window, m, scale)


def attend_joint(
    q: Tensor,
    window: RowTable,
    compressed: RowTable | None,
    layer: int,
    *,
    m: int,
    sinks: Tensor,
    scale: float,
    selected: Tensor | None = None,
    rotary: int = 0,
) -> Tensor:
    """Attention of each row's queries over its own tokens and compressed entries: [queries of all rows, N, d].

    q: [queries of all rows, N, d]; window: a table of the tokens' entries, each row with its `window`; compressed: one
    of the same rows' entries of closed windows of m tokens, the first of them included, with `end` and `queries` in
    tokens (None: there are none); layer: of those that both hold; sinks: float32 [N]; selected: int32 [queries, k],
    entries of each query, ascending or not, -1: none (None: all it sees); rotary: where entries are released bytes, how
    many of their numbers turn. In float32; returns q's dtype.
    Raises ValueError for other shapes, and for a selected entry that a query does not see.
    """
    d = q.shape[-1]
    expect("q", q, window.queries, q.shape[1], d)
    if window.size != (entry_bytes(d, rotary) if window.is_released else d):
        raise ValueError(f"q has {d} dimensions, which entries of {window.size} {window.like.dtype} do not have")
    if compressed is not None and (compressed.size, compressed.like.dtype) != (window.size, window.like.dtype):
        raise ValueError(
            f"compressed entries are {compressed.size} {compressed.like.dtype}, those of tokens {window.size}"
            f" {window.like.dtype}: they must be of one kind"
        )
    expect("sinks", sinks, q.shape[1])
    if selected is not None:
        expect("selected", selected, window.queries, selected.shape[-1])
    if dispatch.takes(q, None if window.is_released else window.like) and dispatch.takes(sinks):
        return _native_joint(q, window, compressed, layer, m, sinks, scale, selected, rotary)
    outputs, at = [], 0
    for i, row in enumerate(window.rows):
        some = slice(at, at + row.queries)
        at += row.queries
        if row.queries == 0:
            continue
        kv = _entries_of(window, row, layer, d, rotary)
        entries = kv[:0] if compressed is None else _entries_of(compressed, compressed.rows[i], layer, d, rotary)
        positions = torch.arange(row.end - row.queries, row.end, device=q.device)
        if selected is None:
            idx = torch.arange(len(entries), device=q.device).expand(row.queries, -1)
        else:
            idx = selected[some]
            _expect_seen(idx, visible_entries(row, len(entries), m, q.device))
        held = row.end - len(kv)
        outputs.append(_joint(q[some], kv, held, entries, idx, positions, sinks, row.window or row.end, m, scale))
    return outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else torch.empty_like(q)


def _native_joint(
    q: Tensor,
    window: RowTable,
    compressed: RowTable | None,
    layer: int,
    m: int,
    sinks: Tensor,
    scale: float,
    selected: Tensor | None,
    rotary: int,
) -> Tensor:
    q = q if q.stride(-1) == 1 else q.contiguous()
    _, heads, d = q.shape
    out = q.new_empty(q.shape)
    rows, spans, num_rows = window.addresses
    closed_rows, closed_spans, _ = (None, None, 0) if compressed is None else compressed.addresses
    if selected is not None:
        selected = selected.to(torch.int32).contiguous()
    fits = dispatch.native.joint_attention(
        q=q,
        out=out,
        sinks=sinks.contiguous(),
        selected=selected,
        window=rows,
        compressed=closed_rows,
        window_spans=spans,
        compressed_spans=closed_spans,
        num_rows=num_rows,
        layer=layer,
        heads=heads,
        d=d,
        q_token=q.stride(0),
        q_head=q.stride(1),
        m=m,
        k=0 if selected is None else selected.shape[1],
        rotary=rotary,
        scale=scale,
        is_released=window.is_released,
        bfloat16=q.dtype is torch.bfloat16,
    )
    if not fits:
        assert selected is not None
        closed = [0] * num_rows if compressed is None else [row.entries for row in compressed.rows]
        seen = [visible_entries(row, n, m, q.device) for row, n in zip(window.rows, closed, strict=True)]
        _expect_seen(selected, torch.cat(seen))
    return out


def _entries_of(table: RowTable, row: AttendedRow, layer: int, d: int, rotary: int) -> Tensor:
    """[n, d] of a row."""
    parts = [span.view(layer, -1)[0] for span in row.spans]
    entries = parts[0] if len(parts) == 1 else torch.cat(parts) if parts else table.like.new_empty(0, table.size)
    return decode_entries(entries, d, rotary) if table.is_released else entries


def _joint(
    q: Tensor,
    kv: Tensor,
    held: int,
    entries: Tensor,
    idx: Tensor,
    positions: Tensor,
    sink: Tensor,
    window: int,
    m: int,
    scale: float,
) -> Tensor:
    """Tokens in the window and entries among `idx` that have closed, as one list of entries for each query.

    q: [..., T, N, d]; kv: [..., S, d], of positions `held` on; entries: [..., M, d]; positions: [T] of the queries.
    """
    tokens = kv.shape[-2]
    recent = positions[:, None] - held - torch.arange(min(window, tokens), device=q.device).flip(0)
    recent = recent.masked_fill(recent < 0, -1).expand(*idx.shape[:-1], -1)
    closed = (idx >= 0) & (idx < ((positions + 1) // m)[:, None])
    both = torch.cat([recent, (idx.long() + tokens).masked_fill(~closed, -1)], -1)
    return sparse_attention(q, torch.cat([kv, entries], -2), both, sink, scale)


def _expect_numbers(idx: Tensor, entries: int) -> None:
    """Raises ValueError unless all are -1 or numbers of entries. On a GPU they are taken to be: looking would wait."""
    if idx.is_floating_point() or idx.dtype == torch.bool:
        raise ValueError(f"idx has dtype {str(idx.dtype).removeprefix('torch.')}, expected int64 or int32")
    if idx.numel() and not idx.is_cuda:
        least, most = torch.stack(idx.aminmax()).tolist()
        if least < -1 or most >= entries:
            raise ValueError(f"idx holds {least if least < -1 else most}, expected -1 or numbers below {entries}")


def _expect_seen(selected: Tensor, seen: Tensor) -> None:
    """Raises ValueError unless each query's entries are -1 or among the first `seen`. Not on a GPU, as above."""
    if selected.is_cuda:
        return
    wrong = (selected < -1) | (selected >= seen[:, None])
    if wrong.any():
        query, place = wrong.nonzero()[0].tolist()
        number, most = int(selected[query, place]), int(seen[query])
        raise ValueError(f"selected holds {number}, expected -1 or numbers below {most}, which query {query} sees")
