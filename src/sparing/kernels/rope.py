"""Rotary position embedding: frequencies, tables, rotation.

Pair m of d numbers turns by `position * inv_freq[m]`. It is (m, m + d/2) in the layout "halves", which all families but
one have, and (2m, 2m + 1) in "pairs".
"""

from __future__ import annotations

import math
from functools import lru_cache
from weakref import WeakValueDictionary

import torch
from torch import Tensor

from sparing.config.rope import RopeParameters
from sparing.kernels import dispatch
from sparing.kernels.norm import rms_norm
from sparing.kernels.shapes import expect, misfit

__all__ = [
    "RotationTable",
    "apply_rope",
    "dynamic_inv_freq",
    "inverse_frequencies",
    "norm_rotate",
    "proportional_inv_freq",
    "rope_tables",
    "rotate",
    "rotation_table",
]

LAYOUTS = ("halves", "pairs")
SPARE = 8  # a table grows by an eighth more than is asked for


def proportional_inv_freq(head_dim: int, theta: float, fraction: float, factor: float = 1.0) -> Tensor:
    """Frequencies of partial ("proportional") RoPE: float32 [head_dim / 2], zero for pairs that do not turn.

    The first `int(fraction * head_dim // 2)` pairs turn at `theta^(-2m/head_dim) / factor`; the exponent runs over
    the full head size. Source: Gemma 4, rope_type "proportional".

    >>> proportional_inv_freq(16, 1e6, 0.25)[:3]
    tensor([1.0000, 0.1778, 0.0000])
    """
    turning = int(fraction * head_dim // 2)
    inv_freq = torch.zeros(head_dim // 2)
    inv_freq[:turning] = _geometric(head_dim, theta)[:turning] / factor
    return inv_freq


def dynamic_inv_freq(rope: RopeParameters, head_dim: int, lengths: Tensor) -> Tensor:
    """Frequencies of rope_type "dynamic": float32 [tokens, head_dim / 2], slower the longer a token's sequence is.

    lengths: int64 [tokens], of the text that each was given with, however many pieces it was read in, or up to the
    token itself where it was generated. Keys rotated earlier keep the frequencies they were rotated with.
    Source: transformers `modeling_rope_utils.py`, NTK scaling, as its `generate` meets prompts and tokens.
    """
    d = int(head_dim * rope.partial_rotary_factor)
    original = rope.original_max_position_embeddings
    stretch = rope.factor * lengths.clamp_min(original).double() / original - (rope.factor - 1)
    theta = rope.rope_theta * stretch ** (d / (d - 2))
    return _geometric(d, theta.float()[:, None])


@lru_cache(maxsize=256)
def inverse_frequencies(rope: RopeParameters, head_dim: int) -> tuple[Tensor, float]:
    """(float32 [head_dim / 2] frequencies in radians per token, factor on cos and sin) of a layer's rotation.

    Source: transformers `modeling_rope_utils.py`; YaRN arXiv 2309.00071; Llama 3.1 frequency scaling.
    """
    d = int(head_dim * rope.partial_rotary_factor)
    theta, original = rope.rope_theta, rope.original_max_position_embeddings
    if rope.rope_type == "proportional":
        return proportional_inv_freq(head_dim, theta, rope.partial_rotary_factor, rope.factor), 1.0
    if rope.rope_type == "linear":
        return _geometric(d, theta) / rope.factor, 1.0
    if rope.rope_type == "yarn":
        return _yarn(rope, d)
    inv_freq = _geometric(d, theta)
    if rope.rope_type == "llama3":
        # Long wavelengths are slowed by `factor`, short ones kept, those between blended linearly.
        turns = original * inv_freq / (2 * math.pi)  # over the original context
        keep = ((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)).clamp(0, 1)
        inv_freq = (1 - keep) * inv_freq / rope.factor + keep * inv_freq
    return inv_freq, 1.0


def rope_tables(positions: Tensor, inv_freq: Tensor, dtype: torch.dtype, scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """(cos, sin) [..., tokens, 1, head_dim / 2] in `dtype`, computed in float32.

    positions: [..., tokens] integers; inv_freq: [head_dim / 2], or with a row for each token; scale: factor on both.
    """
    angles = positions[..., None].float() * inv_freq.to(positions.device)
    cos, sin = angles.cos(), angles.sin()
    if scale != 1.0:
        cos, sin = cos * scale, sin * scale
    return cos.to(dtype).unsqueeze(-2), sin.to(dtype).unsqueeze(-2)


class RotationTable:
    """cos and sin of positions 0, 1, ..., as far as anyone asked: [n, 2, pairs]. Arguments as in `rope_tables`."""

    def __init__(self, inv_freq: Tensor, dtype: torch.dtype, scale: float = 1.0):
        self._inv_freq, self._dtype, self._scale = inv_freq, dtype, scale
        self._rows = inv_freq.new_empty(0, 2, len(inv_freq), dtype=dtype)

    def upto(self, n: int) -> Tensor:
        """The rows of positions 0..n-1 at least."""
        rows = self._rows
        if n > len(rows):
            more = torch.arange(len(rows), n + n // SPARE + 1, device=rows.device)
            tables = rope_tables(more, self._inv_freq, self._dtype, self._scale)
            self._rows = rows = torch.cat([rows, torch.cat(tables, -2)])
        return rows

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """(cos, sin) [..., pairs] of positions [...]."""
        rows = self.upto(int(positions.max()) + 1 if positions.numel() else 0)
        return rows[:, 0][positions], rows[:, 1][positions]


def rotation_table(
    rope: RopeParameters, head_dim: int, dtype: torch.dtype, device: torch.device, turning: int | None = None
) -> RotationTable:
    """The table of a rotation, one for all its layers and memories; turning: of its first pairs alone.

    It lives as long as one of them holds it.
    """
    key = (rope, head_dim, dtype, device, turning)
    if (table := _tables.get(key)) is None:
        inv_freq, scale = inverse_frequencies(rope, head_dim)
        table = _tables[key] = RotationTable(inv_freq[:turning].to(device), dtype, scale)
    return table


_tables: WeakValueDictionary[tuple[object, ...], RotationTable] = WeakValueDictionary()


def rotate(x: Tensor, cos: Tensor, sin: Tensor, *, layout: str = "halves", last: bool = False) -> Tensor:
    """Turn the pairs of x [..., tokens, heads, head_dim] by tables from `rope_tables`, of x's type or of float32.

    layout: which dimensions are a pair, "halves" or "pairs". Tables narrower than head_dim / 2 turn the leading ones,
    with `last` the last ones, and leave the rest as it is. Turning with -sin brings x back. Returns x's type.
    Raises ValueError for wider tables, for two of different shapes, and for another layout.
    """
    half, first = _expect_tables(x, cos, sin, layout, last)
    if _native_takes(x, None, cos, sin):
        return _native_rotation(x, None, cos, sin, layout, first)
    before, turning, after = x.split((first, 2 * half, x.shape[-1] - first - 2 * half), -1)
    x1, x2 = turning.chunk(2, -1) if layout == "halves" else turning.unflatten(-1, (half, 2)).unbind(-1)
    y1, y2 = (x1 * cos - x2 * sin).to(x.dtype), (x2 * cos + x1 * sin).to(x.dtype)
    turned = (y1, y2) if layout == "halves" else (torch.stack((y1, y2), -1).flatten(-2),)
    return torch.cat((before, *turned, after), -1)


def norm_rotate(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    eps: float = 1e-6,
    *,
    shift: float = 0.0,
    layout: str = "halves",
    last: bool = False,
) -> Tensor:
    """`rotate(rms_norm(x, weight, shift=shift), cos, sin)`, of queries and keys x [..., tokens, heads, head_dim]."""
    _, first = _expect_tables(x, cos, sin, layout, last)
    if weight is not None:
        expect("weight", weight, x.shape[-1])
    if _native_takes(x, weight, cos, sin):
        return _native_rotation(x, weight, cos, sin, layout, first, True, eps, shift)
    return rotate(rms_norm(x, weight, eps, shift), cos, sin, layout=layout, last=last)


def _expect_tables(x: Tensor, cos: Tensor, sin: Tensor, layout: str, last: bool) -> tuple[int, int]:
    """How many pairs they turn, and the first of the dimensions that turn."""
    if layout not in LAYOUTS:
        raise ValueError(f"layout is {layout!r}, expected one of {', '.join(LAYOUTS)}")
    size, table = x.shape[-1], cos.shape
    half = table[-1]
    if 2 * half > size:
        raise misfit("cos", cos, *table[:-1], f"at most {size // 2}")
    if sin.shape != table:
        raise misfit("sin", sin, *table)
    return half, size - 2 * half if last else 0


def _native_takes(x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor) -> bool:
    """Tables turn whole tokens, and are of x's type or of float32."""
    shape, table = x.shape, cos.shape
    if not (len(shape) >= len(table) > 1 and table[:-1] == (*shape[-len(table) : -2], 1) and x.numel() > 0):
        return False
    if cos.dtype is x.dtype:
        return dispatch.takes(x, weight, cos, sin)
    return cos.dtype is torch.float32 and dispatch.takes(x, weight) and dispatch.takes(cos, sin)


def _native_rotation(
    x: Tensor,
    weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    layout: str,
    first: int,
    norms: bool = False,
    eps: float = 0.0,
    shift: float = 0.0,
) -> Tensor:
    half = cos.shape[-1]
    if cos.ndim < x.ndim:
        cos, sin = (t.expand(*x.shape[:-2], 1, half) for t in (cos, sin))
    x, cos, sin = x.contiguous(), cos.contiguous(), sin.contiguous()
    weight = None if weight is None else weight.contiguous()
    y, (heads, d) = torch.empty_like(x), x.shape[-2:]
    dispatch.native.rotation(
        x=x,
        norm=weight,
        cos=cos,
        sin=sin,
        y=y,
        tokens=x.numel() // (heads * d),
        heads=heads,
        d=d,
        half=half,
        first=first,
        layout=layout,
        wide=cos.dtype is not x.dtype,
        norms=norms,
        eps=eps,
        shift=shift,
        bfloat16=x.dtype is torch.bfloat16,
    )
    return y


def apply_rope(x: Tensor, positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Rotate x by its positions.

    x: [..., tokens, heads, head_dim], or [tokens, head_dim], or [head_dim] with one position; positions: integers
    [..., tokens]; inv_freq: float32 [head_dim / 2]. Returns x's shape and dtype; norms are preserved.
    Source: RoFormer arXiv 2104.09864, half-split pairing.
    """
    positions = torch.as_tensor(positions, device=x.device)
    cos, sin = rope_tables(positions, inv_freq, x.dtype)
    if x.ndim == positions.ndim + 1:  # no head dimension
        return rotate(x.unsqueeze(-2), cos, sin).squeeze(-2)
    return rotate(x, cos, sin)


def _geometric(head_dim: int, theta: float | Tensor) -> Tensor:
    device = theta.device if isinstance(theta, Tensor) else None
    return 1.0 / (theta ** (torch.arange(0, head_dim, 2, dtype=torch.int64, device=device).float() / head_dim))


def _yarn(rope: RopeParameters, d: int) -> tuple[Tensor, float]:
    """Interpolate slow pairs, extrapolate fast ones, ramp between; attention is sharpened by the returned factor."""
    original, factor = rope.original_max_position_embeddings, rope.factor

    def pair_turning(times: float) -> float:  # the pair that makes this many turns over the original context
        return d * math.log(original / (times * 2 * math.pi)) / (2 * math.log(rope.rope_theta))

    low, high = pair_turning(rope.beta_fast), pair_turning(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, d - 1)
    ramp = ((torch.arange(d // 2).float() - low) / ((high - low) or 0.001)).clamp(0, 1)
    inv_freq = _geometric(d, rope.rope_theta)
    inv_freq = inv_freq / factor * ramp + inv_freq * (1 - ramp)

    def sharpness(mscale: float) -> float:
        return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0

    if rope.attention_factor is not None:
        return inv_freq, rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return inv_freq, sharpness(rope.mscale) / sharpness(rope.mscale_all_dim)
    return inv_freq, sharpness(1.0)
