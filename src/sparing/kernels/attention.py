"""Softmax attention with grouped heads: causal, sliding-window or bidirectional, in blocks of queries."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparing.kernels import dispatch
from sparing.kernels.norm import rms_norm
from sparing.kernels.products import arithmetic_dtype
from sparing.kernels.rope import apply_rope
from sparing.kernels.shapes import dimensions, expect

__all__ = ["attention", "qk_norm_attention"]

NATIVE_ROWS = 16  # queries times group; above it torch's products of many rows are faster
QUERY_BLOCK = 64  # bounds the scores, [kv heads, group * QUERY_BLOCK, keys], and skips keys after the block


def attention(
    q: Tensor,
    k: Tensor | Sequence[Tensor],
    v: Tensor | Sequence[Tensor],
    *,
    scale: float = 1.0,
    causal: bool = True,
    window: int | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend from the last T of S positions over the keys each may see.

    q: [..., T, heads, d]; k, v: [..., kv_heads, S, d] with `heads` a multiple of `kv_heads` (query head n reads kv
    head n // group), or lists of tensors that make up the S positions one after the other, cut at the same places;
    returns [..., T, heads, d] in q's dtype. Softmax in float32, scores and sums in q's dtype (float32 where the CPU
    cannot multiply that).
    causal: query i (absolute position S - T + i) sees keys up to its own; window: and only the last `window` of them.
    mask: bool [..., T, S], True = visible, replaces both. A query must see at least one key, and a value that it does
    not see does not reach it, not even NaN.
    Raises ValueError for other shapes, fewer keys than queries of causal attention, and a window below 1.
    """
    *batch, tokens, heads, d = q.shape
    k_parts, v_parts = ([x] if isinstance(x, Tensor) else list(x) for x in (k, v))
    kv_heads, keys = _measure(k_parts, v_parts, tuple(batch), d)
    expect_heads(heads, kv_heads)
    expect_seen(tokens, keys, causal and mask is None, window)
    group = heads // kv_heads
    if mask is None and not batch and 0 < tokens * group <= NATIVE_ROWS and dispatch.takes(q, *k_parts, *v_parts):
        table = OneRow(tokens, k_parts, v_parts, causal, window)
        return native_attention(q, table, 0, kv_heads, v_parts[0].shape[-1], scale)
    dtype, wide = q.dtype, arithmetic_dtype(q)
    q, k_parts, v_parts = q.to(wide), [x.to(wide) for x in k_parts], [x.to(wide) for x in v_parts]
    q = q if scale == 1.0 else q * scale
    # The group goes into the rows of one product per kv head: [..., kv_heads, group, T, d].
    q = q.reshape(*batch, tokens, kv_heads, group, d).movedim(-4, -2)
    outputs = []
    for start in range(0, tokens, QUERY_BLOCK):
        stop = min(start + QUERY_BLOCK, tokens)
        low, high, masked = 0, keys, 0  # keys low..high-1 are read, from `masked` on some are hidden from some queries
        visible = None if mask is None else mask[..., start:stop, :]
        if mask is None and causal:
            first = keys - tokens + start  # absolute position of the block's first query
            high = keys - tokens + stop
            low = 0 if window is None else max(0, first - window + 1)
            masked = first if low == 0 and (window is None or high <= window) else low
            if stop - start > 1:
                visible = _causal_mask(first, high, masked, window, q.device)
        rows = q[..., start:stop, :].reshape(*batch, kv_heads, group * (stop - start), d)
        scores = _joined([rows @ part.transpose(-1, -2) for part in _cut(k_parts, low, high)])
        if visible is not None:
            part = scores.unflatten(-2, (group, stop - start))[..., masked - low :]
            part.masked_fill_(~visible[..., None, None, :, :], float("-inf"))
        weights = torch.softmax(scores, -1)  # in float32, whatever its ends
        mixed = _mixed(weights, _cut(v_parts, low, high), visible)
        outputs.append(mixed.unflatten(-2, (group, stop - start)))
    out = outputs[0] if len(outputs) == 1 else torch.cat(outputs, -2)  # [..., kv_heads, group, T, d]
    return out.movedim(-2, -4).reshape(*batch, tokens, heads, out.shape[-1]).to(dtype)


def _measure(k: Sequence[Tensor], v: Sequence[Tensor], batch: tuple[int, ...], d: int) -> tuple[int, int]:
    """(kv_heads, S); raises ValueError unless the parts of keys and values fit each other and the queries."""
    *_, kv_heads, _, _ = dimensions("k", k[0], *("B" * len(batch)), "kv_heads", "S", "d")
    if len(k) != len(v):
        raise ValueError(f"k has {len(k)} parts, v {len(v)}: cut both at the same places")
    for keys, values in zip(k, v, strict=True):
        n = keys.shape[-2]
        expect("k", keys, *batch, kv_heads, n, d)
        expect("v", values, *batch, kv_heads, n, v[0].shape[-1])
    return kv_heads, sum(part.shape[-2] for part in k)


def _cut(parts: Sequence[Tensor], low: int, high: int) -> list[Tensor]:
    """Positions low..high-1 of parts [..., n, d] that follow one another."""
    if len(parts) == 1:
        return [parts[0][..., low:high, :]]
    found, at = list[Tensor](), 0
    for part in parts:
        a, b = max(low - at, 0), min(high - at, part.shape[-2])
        at += part.shape[-2]
        if a < b:
            found.append(part[..., a:b, :])
    return found


def _joined(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def _mixed(weights: Tensor, v: Sequence[Tensor], visible: Tensor | None) -> Tensor:
    """`weights @ v`, where values that are not finite reach the queries that see them and no others.

    weights: [..., kv_heads, group * T, S]; v: parts of [..., kv_heads, S, d]; visible: bool [..., T, m] of the last m
    keys, all before them are seen; None: all are. On a GPU values are taken to be finite: looking would wait for it.
    """
    if len(v) == 1:
        return _mixed_part(weights, v[0], visible)
    total, at = None, 0
    hidden_from = weights.shape[-1] - (0 if visible is None else visible.shape[-1])  # the first that some do not see
    for part in v:
        end = at + part.shape[-2]
        seen = (
            None
            if visible is None or end <= hidden_from
            else visible[..., max(0, at - hidden_from) : end - hidden_from]
        )
        mixed = _mixed_part(weights[..., at:end], part, seen)
        total, at = mixed if total is None else total + mixed, end
    assert total is not None
    return total


def _mixed_part(weights: Tensor, v: Tensor, visible: Tensor | None) -> Tensor:
    """`_mixed` of one part."""
    if visible is None or v.is_cuda:
        return weights @ v
    seen = v[..., v.shape[-2] - visible.shape[-1] :, :]
    if torch.isfinite(seen).all():
        return weights @ v
    clean = torch.cat([v[..., : v.shape[-2] - seen.shape[-2], :], seen.nan_to_num(0.0, 0.0, 0.0)], -2)
    # [..., kv_heads, T, d]: how many NaNs, infinities and negative ones each query sees; two signs make a NaN.
    nans, above, below = (
        visible.to(v)[..., None, :, :] @ bad.to(v) for bad in (seen.isnan(), seen == torch.inf, seen == -torch.inf)
    )
    rest = torch.where(above > 0, torch.inf, 0.0) + torch.where(below > 0, -torch.inf, 0.0)
    rest = torch.where(nans > 0, torch.nan, rest).to(v)
    mixed = weights @ clean
    return (mixed.unflatten(-2, (-1, visible.shape[-2])) + rest[..., None, :, :]).flatten(-3, -2)


def expect_heads(heads: int, kv_heads: int) -> None:
    """Raises ValueError unless each kv head is read by as many query heads."""
    if not kv_heads or heads % kv_heads:
        raise ValueError(f"{heads} heads are not a multiple of {kv_heads} kv heads")


def expect_seen(tokens: int, keys: int, causal: bool, window: int | None) -> None:
    """Raises ValueError unless each of these queries sees at least one key."""
    if keys < (tokens if causal else min(tokens, 1)):
        raise ValueError(f"{tokens} {'causal ' if causal else ''}queries over {keys} keys: one would see none")
    if window is not None and window < 1:
        raise ValueError(f"window is {window}, expected at least 1")


class NativeTable(Protocol):
    """A table of rows that the native kernel reads, see `kernels/rows.py`."""

    @property
    def addresses(self) -> tuple[int, int, int]:
        """Of its rows and of their spans, and how many rows there are."""
        ...


class OneRow:
    """The table of one row whose entries are tensors, k [kv_heads, S, d] and v, in parts that follow one another.

    k None: values alone. where: the first of consecutive positions, or int32 [kv_heads, S] all of those of one part.
    """

    def __init__(
        self,
        tokens: int,
        k: Sequence[Tensor] | None,
        v: Sequence[Tensor],
        causal: bool,
        window: int | None,
        where: int | Tensor = 0,
    ):
        self._alive = list[Tensor]()  # whose addresses are given away
        entries, self._spans = 0, array("q")
        for i, values in enumerate(v):
            keys, k_head, k_key = (0, 0, 0) if k is None else self._place(k[i])
            place, v_head, v_key = self._place(values)
            self._spans.extend((keys, place, values.shape[1], k_head, v_head, k_key, v_key, 0))
            if isinstance(where, int):
                self._spans.extend((0, 0, 0, where + entries))
            else:
                self._spans.extend((where.data_ptr(), where.stride(0), 0, 0))
            entries += values.shape[1]
        self._rows = array("q", (0, tokens, entries, 0, len(v), causal, window or 0, 0, entries))

    @property
    def addresses(self) -> tuple[int, int, int]:
        return self._rows.buffer_info()[0], self._spans.buffer_info()[0], 1

    def _place(self, x: Tensor) -> tuple[int, int, int]:
        x = x if x.stride(-1) == 1 else x.contiguous()
        self._alive.append(x)
        return x.data_ptr(), x.stride(0), x.stride(1)


def native_attention(
    q: Tensor,
    table: NativeTable,
    layer: int,
    kv_heads: int,
    dv: int,
    scale: float,
    tied: dict[str, Any] | None = None,
    more: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """The native kernel over a table of rows, all in float32 but the result [queries, heads, dv].

    q: [queries of all rows, heads, d]; tied: where keys follow from values, the fields of the kernels' TiedKeys; more:
    float32 [queries, heads, dv] and [queries, heads], a partial attention over other entries, to be added up with this.
    """
    q = q if q.stride(-1) == 1 else q.contiguous()
    tokens, heads, d = q.shape
    out = q.new_empty(tokens, heads, dv)
    rows, spans, num_rows = table.addresses
    dispatch.native.attention(
        q=q,
        more=None if more is None else more[0].contiguous(),
        more_lse=None if more is None else more[1].contiguous(),
        out=out,
        rows=rows,
        spans=spans,
        num_rows=num_rows,
        layer=layer,
        heads=heads,
        kv_heads=kv_heads,
        d=d,
        dv=dv,
        q_token=q.stride(0),
        q_head=q.stride(1),
        scale=scale,
        tied=tied,
        bfloat16=q.dtype is torch.bfloat16,
    )
    return out


def _causal_mask(first: int, high: int, low: int, window: int | None, device: torch.device) -> Tensor:
    """bool [high - first, high - low]: which keys low..high-1 the queries first..high-1 see."""
    queries = torch.arange(first, high, device=device)[:, None]
    keys = torch.arange(low, high, device=device)
    visible = keys <= queries
    return visible if window is None else visible & (keys > queries - window)


def qk_norm_attention(
    q: Tensor,
    k0: Tensor,
    v0: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    positions: Tensor,
    inv_freq: Tensor,
    window: int | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Causal attention on raw projections: queries and keys RMS-normed, then rotated; values RMS-normed.

    q: [B, T, N, d]; k0, v0: [B, S, G, d] raw projections, S >= T, queries are the last T positions; q_weight,
    k_weight: [d]; positions: integers [S]; inv_freq: [d / 2]; window: keys a query sees, its own included.
    Returns [B, T, N, d]. Unchanged when q, k0 or v0 is multiplied by a positive number.
    Source: Gemma 4 attention (scale is exactly 1; values get no weight and no rotation).
    """
    positions = torch.as_tensor(positions, device=q.device)
    q = apply_rope(rms_norm(q, q_weight), positions[..., -q.shape[1] :].expand(q.shape[:2]), inv_freq)
    k = apply_rope(rms_norm(k0, k_weight), positions.expand(k0.shape[:2]), inv_freq)
    v = rms_norm(v0)
    return attention(q, k.transpose(1, 2), v.transpose(1, 2), scale=scale, window=window)
