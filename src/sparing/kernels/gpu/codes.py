"""Attention over codes on a GPU: the Triton twin of `kernels/codes.py`.

One program serves all query heads of a kv head over a stretch of the keys, so codes are read once. It reads the one
layout of codes there is: a block is contiguous, and each lane's word is one int32 that holds 4, 8 or 16 fields, so
loads are whole lines and a field is a shift away. Stretches merge by their log-sum-exp. Needs Triton; imported for
tensors on a GPU only, or with TRITON_INTERPRET=1 in the environment.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportGeneralTypeIssues=false, reportOperatorIssue=false
# pyright: reportMissingImports=false

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from sparing.kernels.code_layout import BLOCK
from sparing.kernels.codes import Codes
from sparing.kernels.gpu.programs import PROGRAMS, multiprocessors, power, precision

__all__ = ["attention_over_codes", "program", "takes"]

Shapes = tuple[tuple[int, int], ...]  # of each part: dims, bits

# What fits into the registers and the shared memory of a program.
ROW_NUMBERS = 8192  # of queries and of their mixed values
ROWS = 64
TILE_NUMBERS = 4096  # of decoded keys, and of decoded values


def takes(q: Sequence[Tensor], keys: Sequence[Codes], values: Sequence[Codes]) -> bool:
    """Whether a program has room for these queries: few rows; many are faster decoded once for all of them."""
    tokens, heads, _ = q[0].shape
    rows = tokens * heads // len(keys[0].blocks)
    return rows <= min(ROWS, ROW_NUMBERS // _widest(_shapes(keys), _shapes(values))) and q[0].dtype == torch.float32


def attention_over_codes(
    q: Sequence[Tensor],
    keys: Sequence[Codes],
    values: Sequence[Codes],
    n: int,
    *,
    scale: float = 1.0,
    bias: Tensor | None = None,
    exact: bool = True,
) -> tuple[list[Tensor], Tensor]:
    """As `kernels.codes.attention_over_codes`, for what `takes` allows."""
    tokens, heads, _ = q[0].shape
    kv_heads, blocks = len(keys[0].blocks), -(-n // BLOCK)
    group = heads // kv_heads
    most = -(-PROGRAMS * multiprocessors(q[0].device) // kv_heads)
    stretch = -(-blocks // min(blocks, most))  # blocks that one program reads
    splits = -(-blocks // stretch)
    out = [q[0].new_empty(splits, tokens, heads, part.dims) for part in values]
    lse = q[0].new_empty(splits, tokens, heads)
    _attend[(kv_heads, splits)](
        tuple((part, *part.stride()) for part in q),
        tuple(_tensors(part) for part in keys),
        tuple(_tensors(part) for part in values),
        tuple(out),
        lse,
        bias,
        *((0, 0, 0) if bias is None else bias.stride()),
        n,
        tokens,
        stretch * BLOCK,
        scale,
        GROUP=group,
        KEYS=_shapes(keys),
        VALUES=_shapes(values),
        PRECISION=precision(q[0].device, exact),
        **program(tokens * group, _shapes(keys), _shapes(values)),
    )
    if splits == 1:
        return [part[0] for part in out], lse[0]
    total = lse.logsumexp(0)
    weights = (lse - total).exp()[..., None]
    return [(weights * part).sum(0) for part in out], total


def program(rows: int, keys: Shapes, values: Shapes) -> dict[str, int]:
    """What a program works on at a time, and with how many threads, for this many queries of a kv head."""
    widest = _widest(keys, values)
    return {
        "ROWS": max(16, power(rows)),
        "TILE": max(16, min(BLOCK, TILE_NUMBERS // widest)),
        "num_warps": 4 if widest <= 128 else 8,
        "num_stages": 2 if widest <= 256 else 1,
    }


def _widest(keys: Shapes, values: Shapes) -> int:
    return max(power(dims) for dims, _ in keys + values)


def _shapes(parts: Sequence[Codes]) -> Shapes:
    return tuple((part.dims, part.bits) for part in parts)


def _tensors(part: Codes) -> tuple[Tensor | int, ...]:
    """(int32 words, strides of heads and blocks, scales, strides of heads and blocks, centroids)"""
    words = part.blocks.view(torch.int32)
    return words, *words.stride()[:2], part.scale, *part.scale.stride()[:2], part.centroids


@triton.jit(do_not_specialize=["n", "stretch"])
def _attend(
    q,  # per part of keys: (float32 [tokens, heads, dims], its strides)
    keys,  # per part: see `_tensors`
    values,
    out,  # per part of values: [splits, tokens, heads, dims]
    lse,  # [splits, tokens, heads]
    bias,  # [tokens, heads, n] or None
    bias_token,
    bias_head,
    bias_key,
    n,
    tokens,
    stretch,
    scale,
    GROUP: tl.constexpr,
    KEYS: tl.constexpr,  # per part: (dims, bits)
    VALUES: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One kv head (axis 0), one stretch of the keys (axis 1), all queries."""
    kv_head, split = tl.program_id(0), tl.program_id(1)
    # All queries of the kv head share the codes: a row is one (head of the group, token) pair, up to a power of two.
    row = tl.arange(0, ROWS)
    token, head = row % tokens, kv_head * GROUP + row // tokens
    asked = row < GROUP * tokens
    queries = ()
    for i in tl.static_range(len(KEYS)):
        queries += (_rows(q[i], token, head, asked, KEYS[i][0]),)
    mixed = ()
    for i in tl.static_range(len(VALUES)):
        mixed += (tl.zeros([ROWS, triton.next_power_of_2(VALUES[i][0])], dtype=tl.float32),)
    largest = tl.full([ROWS], float("-inf"), dtype=tl.float32)
    total = tl.zeros([ROWS], dtype=tl.float32)

    for first in range(split * stretch, tl.minimum((split + 1) * stretch, n), TILE):
        key = first + tl.arange(0, TILE)
        scores = tl.zeros([ROWS, TILE], dtype=tl.float32)
        for i in tl.static_range(len(KEYS)):
            # Scales are per token, hence per column of the scores: applied to ROWS sums instead of TILE x dims numbers.
            unscaled, factor = _tile(keys[i], KEYS[i][0], KEYS[i][1], kv_head, first, n, TILE, True)
            scores += tl.dot(queries[i], tl.trans(unscaled), input_precision=PRECISION) * factor[None, :]
        scores *= scale
        if bias is not None:
            added = bias + (token * bias_token + head * bias_head)[:, None] + (key * bias_key)[None, :]
            scores += tl.load(added, mask=asked[:, None] & (key < n)[None, :], other=0.0)
        scores = tl.where((key < n)[None, :], scores, float("-inf"))
        # Online softmax: what was summed so far was relative to the old maximum, and shrinks to the new one.
        new = tl.maximum(largest, tl.max(scores, 1))
        shrink = tl.exp(largest - new)
        weights = tl.exp(scores - new[:, None])
        total = total * shrink + tl.sum(weights, 1)
        largest = new
        grown = ()
        for i in tl.static_range(len(VALUES)):
            unscaled, factor = _tile(values[i], VALUES[i][0], VALUES[i][1], kv_head, first, n, TILE, False)
            mix = tl.dot(weights * factor[None, :], tl.trans(unscaled), input_precision=PRECISION)
            grown += (mixed[i] * shrink[:, None] + mix,)
        mixed = grown

    place = (split * tokens + token) * GROUP * tl.num_programs(0) + head
    tl.store(lse + place, largest + tl.log(total), mask=asked)
    for i in tl.static_range(len(VALUES)):
        dim = tl.arange(0, triton.next_power_of_2(VALUES[i][0]))
        wanted = asked[:, None] & (dim < VALUES[i][0])[None, :]
        tl.store(out[i] + place[:, None] * VALUES[i][0] + dim[None, :], mixed[i] / total[:, None], mask=wanted)


@triton.jit
def _rows(q, token, head, asked, DIMS: tl.constexpr):
    """float32 [rows, dims] of a part's queries, both filled up with zeros."""
    part, per_token, per_head, per_dim = q
    dim = tl.arange(0, triton.next_power_of_2(DIMS))
    place = part + (token * per_token + head * per_head)[:, None] + (dim * per_dim)[None, :]
    return tl.load(place, mask=asked[:, None] & (dim < DIMS)[None, :], other=0.0)


@triton.jit
def _tile(part, DIMS: tl.constexpr, BITS: tl.constexpr, kv_head, first, n, TILE: tl.constexpr, KEYS: tl.constexpr):
    """(centroids of the codes of TILE tokens, their scales): [TILE, dims] of keys, [dims, TILE] of values."""
    words, per_head, per_block, scales, scales_per_head, scales_per_block, centroids = part
    block, within = first // 64, first % 64
    base = words + kv_head.to(tl.int64) * per_head + block * per_block
    POWER: tl.constexpr = triton.next_power_of_2(DIMS)
    STORED: tl.constexpr = triton.cdiv(DIMS, 16) * 16
    if KEYS:
        codes = _codes(base, BITS, within, TILE, 64, 0, POWER, STORED)  # lanes are the block's 64 tokens
    else:
        codes = _codes(base, BITS, 0, POWER, STORED, within, TILE, 64)  # lanes are dimensions, depth the tokens
    token = tl.arange(0, TILE)
    place = scales + kv_head * scales_per_head + block * scales_per_block + within + token
    # Nothing is known of what lies past the last token: it might be infinite, and 0 times infinity is not 0.
    factor = tl.load(place, mask=first + token < n, other=0.0).to(tl.float32)
    return tl.load(centroids + codes), factor


@triton.jit
def _codes(
    base,
    BITS: tl.constexpr,
    lane0,
    LANES: tl.constexpr,
    ALL_LANES: tl.constexpr,
    depth0,
    DEPTH: tl.constexpr,
    ALL_DEPTH: tl.constexpr,
):
    """Codes int32 [LANES, DEPTH] from lane0 and depth0 on, of a block's matrix [ALL_LANES, ALL_DEPTH] of int32 words.

    The layout is that of `kernels.code_layout`: 16 lanes at a time, the planes one after another, the widest first.
    """
    lane = lane0 + tl.arange(0, LANES)
    base += lane // 16 * (ALL_DEPTH * BITS // 2)
    stored = lane < ALL_LANES
    codes = tl.zeros([LANES, DEPTH], dtype=tl.int32)
    if BITS & 8:
        codes = _plane(base, lane, stored, depth0, DEPTH, ALL_DEPTH, 8)
    if BITS & 4:
        codes = _plane(base, lane, stored, depth0, DEPTH, ALL_DEPTH, 4)
    if BITS & 2:
        wider: tl.constexpr = BITS & 4
        codes |= _plane(base + ALL_DEPTH * wider // 2, lane, stored, depth0, DEPTH, ALL_DEPTH, 2) << wider
    if BITS & 1:  # signs: 32 bits for 8 lanes and 4 depths; -1 - m is m with all bits turned
        word = depth0 // 4 + tl.arange(0, DEPTH // 4)
        place = base[:, None] + ALL_DEPTH * (BITS - 1) // 2 + word[None, :] * 2 + (lane % 16 // 8)[:, None]
        line = tl.load(place, mask=stored[:, None] & (word < ALL_DEPTH // 4)[None, :], other=0)
        bit = (lane % 8 * 4)[:, None, None] + tl.arange(0, 4)[None, None, :]
        negative = tl.reshape((line[:, :, None] >> bit) & 1, [LANES, DEPTH])
        codes = (codes ^ -negative) + (1 << (BITS - 1))
    return codes


@triton.jit
def _plane(base, lane, stored, depth0, DEPTH: tl.constexpr, ALL_DEPTH: tl.constexpr, WIDTH: tl.constexpr):
    """Fields of one plane: int32 [lanes, DEPTH]. A word holds 32 / WIDTH depths of a lane."""
    FIELDS: tl.constexpr = 32 // WIDTH
    word = depth0 // FIELDS + tl.arange(0, DEPTH // FIELDS)
    place = base[:, None] + word[None, :] * 16 + (lane % 16)[:, None]
    line = tl.load(place, mask=stored[:, None] & (word < ALL_DEPTH // FIELDS)[None, :], other=0)
    # The four bytes of a word are four consecutive depths; the fields within a byte lie four depths apart.
    field = tl.arange(0, FIELDS)
    shift = field % 4 * 8 + field // 4 * WIDTH
    fields = (line[:, :, None] >> shift[None, None, :]) & ((1 << WIDTH) - 1)
    return tl.reshape(fields, [lane.shape[0], DEPTH])
