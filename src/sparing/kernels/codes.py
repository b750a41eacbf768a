"""Attention over keys and values that are stored as codes; they are decoded a tile at a time, never as a whole.

The codes are of rotated vectors. A rotated query meets them as they are, values are summed in their rotated frame, and
the caller rotates the sum back, once: with x = scale * R^T c for an orthogonal R, <q, x> = scale * <R q, c> and
sum p_i x_i = R^T sum (p_i scale_i) c_i. A vector may be stored as several parts that add up, each with a frame of
its own (residual sketch, outlier channels). Source: TurboQuant (arXiv 2504.19874); docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sparing.kernels import dispatch
from sparing.kernels.attention import expect_heads
from sparing.kernels.code_layout import BLOCK, block_bytes, canonical
from sparing.kernels.partial import group_rows, ungroup_rows
from sparing.kernels.shapes import expect

__all__ = [
    "Codes",
    "attention_over_codes",
    "code_parts",
    "decode_codes",
    "expect_codes",
    "native_layout",
    "online_softmax",
]

TILE = 16  # blocks of 64 tokens decoded at a time
FEW_ROWS = 32  # queries times group; above it products with codes that are written out once for all rows are faster
SCALES = (torch.float16, torch.float32)
LINE_BITS = (2, 3, 4)  # widths of which products read the codes as they are


class Codes(NamedTuple):
    """Codes of one part of vectors: for a token and kv head the vector `scale * centroids[code]`, in its rotated frame.

    blocks: uint8 [kv_heads, blocks, block_bytes(dims, bits)], laid out by `kernels.code_layout`; scale: float16 or
    float32 [kv_heads, blocks, 64]; centroids: float32 [2^bits], ascending, symmetric; dims: size of the vector.
    """

    blocks: Tensor
    scale: Tensor
    centroids: Tensor
    dims: int

    @property
    def bits(self) -> int:
        return len(self.centroids).bit_length() - 1


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
    """Attend over the first n tokens, all of them visible: (out, lse), a partial attention.

    q: per part of keys, float32 [T, heads, dims] in that part's frame; n: at least 1; scale: factor on the scores;
    bias: [T, heads, n], added to the scaled scores. out: per part of values, [T, heads, dims] in that part's frame
    (their rotated sum is the mix of the values); lse: [T, heads]. exact: False where a relative error of 1 % in scores
    and of 0.5 % in the mix does not matter beside that of the codes: products may then be of bytes.
    Raises ValueError for shapes that do not fit each other, and for fewer codes than n.
    """
    tokens, heads, _ = q[0].shape
    kv_heads = expect_codes("keys", keys, heads, n)
    expect_codes("values", values, heads, n, kv_heads)
    for asked, part in zip(q, keys, strict=True):
        expect("q", asked, tokens, heads, part.dims)
    if bias is not None:
        expect("bias", bias, tokens, heads, n)
    if (gpu := dispatch.on_gpu("codes", *q, bias)) is not None and gpu.takes(q, keys, values):
        return gpu.attention_over_codes(q, keys, values, n, scale=scale, bias=bias, exact=exact)
    if _reads_lines(q, keys, values, bias):
        return _few_queries(q[0], keys[0], values[0], n, scale, bias, exact)
    if dispatch.takes(*q, bias) and native_layout(q[0], [*keys, *values]):
        return code_parts(q, keys, values, n, scale=scale, bias=bias, exact=exact)
    rows = [group_rows(part, kv_heads) for part in q]  # [kv_heads, group * T, dims]
    grouped_bias = None if bias is None else group_rows(bias, kv_heads)

    # A scale belongs to a token, so it multiplies a column of scores, or a weight, instead of a vector's numbers.
    def scores(start: int, stop: int) -> Tensor:
        total = torch.zeros((), dtype=rows[0].dtype, device=rows[0].device)
        for row, part in zip(rows, keys, strict=True):
            unscaled, factor = _tile(part, "keys", start, stop, row.dtype)
            total = total + (row @ unscaled.transpose(-1, -2)) * factor[:, None]
        total = total * scale
        return total if grouped_bias is None else total + grouped_bias[..., start:stop]

    def mix(weights: Tensor, start: int, stop: int) -> list[Tensor]:
        tiles = (_tile(part, "values", start, stop, weights.dtype) for part in values)
        return [(weights * factor[:, None]) @ unscaled for unscaled, factor in tiles]

    out, lse = online_softmax(n, scores, mix)
    return [ungroup_rows(part, tokens) for part in out], ungroup_rows(lse, tokens)[..., 0]


def expect_codes(role: str, parts: Sequence[Codes], heads: int, n: int, kv_heads: int | None = None) -> int:
    """The number of kv heads; raises ValueError unless each part holds at least n tokens of each of them."""
    if n < 1:
        raise ValueError(f"n is {n}, expected at least 1")
    kv_heads, needed = kv_heads or len(parts[0].blocks), -(-n // BLOCK)
    expect_heads(heads, kv_heads)
    for part in parts:
        laid_out, scale = part.blocks, part.scale
        blocks = max(needed, laid_out.shape[1])
        expect(f"codes of {role}", laid_out, kv_heads, blocks, block_bytes(part.dims, part.bits))
        expect(f"scale of {role}", scale, kv_heads, blocks, BLOCK)
    return kv_heads


def _reads_lines(q: Sequence[Tensor], keys: Sequence[Codes], values: Sequence[Codes], bias: Tensor | None) -> bool:
    if len(keys) != 1 or len(values) != 1 or not dispatch.takes(*q, bias) or q[0].dtype != torch.float32:
        return False
    parts = (keys[0], values[0])
    return (
        q[0].numel() <= FEW_ROWS * len(keys[0].blocks) * keys[0].dims
        and all(s.bits in LINE_BITS and s.blocks[0].is_contiguous() and s.scale[0].is_contiguous() for s in parts)
        and _native_types(parts)
    )


def _few_queries(
    q: Tensor, keys: Codes, values: Codes, n: int, scale: float, bias: Tensor | None, exact: bool
) -> tuple[list[Tensor], Tensor]:
    """`attention_over_codes` of one part and few queries by the native kernel that writes no code out."""
    tokens, heads, d = q.shape
    q, bias = q.contiguous(), None if bias is None else bias.contiguous()
    out, lse = q.new_empty(tokens, heads, values.dims), q.new_empty(tokens, heads)
    dispatch.native.codes(
        q=q,
        k_centroids=keys.centroids.contiguous(),
        v_centroids=values.centroids.contiguous(),
        bias=bias,
        k=keys.blocks,
        v=values.blocks,
        k_scale=keys.scale,
        v_scale=values.scale,
        out=out,
        lse=lse,
        tokens=tokens,
        heads=heads,
        kv_heads=keys.blocks.shape[0],
        n=n,
        d=d,
        dv=values.dims,
        k_head=keys.blocks.stride(0),
        v_head=values.blocks.stride(0),
        k_scale_head=keys.scale.stride(0),
        v_scale_head=values.scale.stride(0),
        k_bits=keys.bits,
        v_bits=values.bits,
        has_half_scales=keys.scale.dtype is torch.float16,
        is_exact=exact,
        scale=scale,
    )
    return [out], lse


def native_layout(q: Tensor, parts: Sequence[Codes]) -> bool:
    """Whether `code_parts` reads these."""
    return (
        q.dtype == torch.float32
        and all(
            s.blocks[0].is_contiguous() and s.scale[0].is_contiguous() and s.centroids.is_contiguous() for s in parts
        )
        and _native_types(parts)
    )


def _native_types(parts: Sequence[Codes]) -> bool:
    dtype = parts[0].scale.dtype
    return dtype in SCALES and all(s.scale.dtype == dtype and s.centroids.dtype == torch.float32 for s in parts)


def code_parts(
    q: Sequence[Tensor],
    keys: Sequence[Codes],
    values: Sequence[Codes],
    n: int,
    *,
    scale: float,
    bias: Tensor | None = None,
    exact: bool = True,
    tied: dict[str, Any] | None = None,
) -> tuple[list[Tensor], Tensor]:
    """`attention_over_codes` by the native kernel for any widths and parts.

    tied: keys are then the values; the fields of the kernels' TiedCodes.
    """
    tokens, heads = q[0].shape[:2]
    q, bias = [part.contiguous() for part in q], None if bias is None else bias.contiguous()
    out = [q[0].new_empty(tokens, heads, part.dims) for part in values]
    lse = q[0].new_empty(tokens, heads)
    dispatch.native.code_parts(
        keys=[_native_part(s, x) for s, x in zip(keys, q, strict=True)],
        values=[_native_part(s, x) for s, x in zip(values, out, strict=True)],
        tied=tied,
        bias=bias,
        lse=lse,
        tokens=tokens,
        heads=heads,
        kv_heads=values[0].blocks.shape[0],
        n=n,
        has_half_scales=values[0].scale.dtype is torch.float16,
        is_exact=exact,
        scale=scale,
    )
    return out, lse


def _native_part(part: Codes, vectors: Tensor) -> dict[str, Any]:
    """The fields of a CodePart."""
    return {
        "codes": part.blocks,
        "scale": part.scale,
        "centroids": part.centroids,
        "vectors": vectors,
        "bits": part.bits,
        "dims": part.dims,
        "codes_head": part.blocks.stride(0),
        "scale_head": part.scale.stride(0),
    }


def decode_codes(part: Codes, role: str, start: int, stop: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """`scale * centroids[code]` of tokens start..stop-1: [kv_heads, stop - start, dims]. start: a multiple of 64."""
    unscaled, factor = _tile(part, role, start, stop, dtype)
    return unscaled * factor[..., None]


def _tile(part: Codes, role: str, start: int, stop: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """(centroids of the codes [kv_heads, m, dims], scales [kv_heads, m]) of tokens start..stop-1."""
    blocks, m = slice(start // BLOCK, -(-stop // BLOCK)), stop - start
    codes = canonical(part.blocks[:, blocks], part.bits, role, m, part.dims)
    # Not centroids[codes]: selecting by a flat int32 index is ten times as fast.
    vectors = part.centroids.to(dtype).index_select(0, codes.flatten().int()).view(codes.shape)
    return vectors, part.scale[:, blocks].flatten(1)[:, :m].to(dtype)


def online_softmax(
    n: int, scores: Callable[[int, int], Tensor], mix: Callable[[Tensor, int, int], list[Tensor]]
) -> tuple[list[Tensor], Tensor]:
    """Softmax over n keys tile by tile: (mixed values [kv_heads, rows, dims], lse [kv_heads, rows, 1])."""
    out: list[Tensor] = []
    largest = total = torch.zeros(())
    for start, stop in _tiles(n):
        s = scores(start, stop)  # [kv_heads, rows, m]
        peak = s.amax(-1, keepdim=True)
        new = peak if not out else torch.maximum(largest, peak)
        weights = s.sub_(new).exp_()
        mixed, mass = mix(weights, start, stop), weights.sum(-1, keepdim=True)
        if out:
            shrink = (largest - new).exp()
            mixed = [old * shrink + part for old, part in zip(out, mixed, strict=True)]
            mass = total * shrink + mass
        out, total, largest = mixed, mass, new
    return [part / total for part in out], largest + total.log()


def _tiles(n: int) -> Iterator[tuple[int, int]]:
    step = TILE * BLOCK
    return ((start, min(start + step, n)) for start in range(0, n, step))
