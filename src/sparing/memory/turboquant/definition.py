"""TurboQuant: a vector as a scale and a few bits for each coordinate, without looking at any other vector.

A random rotation makes every coordinate of a unit vector follow one known law, so each is rounded to the Lloyd-Max
codebook of that law. All of it is linear in the stored scale: x is decoded as `scale * R^T centroids[codes]`.
Source: Zandieh, Daliri, Hadian, Mirrokni, "TurboQuant" (arXiv 2504.19874); the scale that makes inner products
unbiased: EDEN (Vargaftik et al. 2022; Ben-Basat et al. arXiv 2604.18555); the sketch: QJL (arXiv 2406.03482).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from sparing.kernels.code_layout import BLOCK, lay_out
from sparing.kernels.codes import Codes, attention_over_codes
from sparing.memory.turboquant.codebook import Codebook, lloyd_max_codebook
from sparing.memory.turboquant.rotation import Rotation

__all__ = [
    "SCALES",
    "encode_directions",
    "qjl_inner_product",
    "qjl_sketch",
    "sphere_codebook",
    "tq_attention",
    "tq_dequantize",
    "tq_prod_inner_product",
    "tq_prod_quantize",
    "tq_quantize",
]

SCALES = ("unbiased", "norm", "renorm", "lsq")


def encode_directions(x: Tensor, rotation: Rotation, codebook: Codebook, scale: str) -> tuple[Tensor, Tensor]:
    """(codes uint8 [..., d], scale [...]) with x close to `scale * R^T centroids[codes]`.

    x: float32 or float64 [..., d]; codebook: in units of sqrt(d) times a unit vector's coordinate. scale: "norm" keeps
    the paper's ||x||; "renorm" makes lengths exact; "lsq" has the least squared error; "unbiased" makes <x, decoded>
    exactly ||x||^2, and under a Haar rotation the mean of <y, decoded> exactly <y, x>. A zero vector gets scale 0.
    """
    d = x.shape[-1]
    norm = torch.linalg.vector_norm(x, dim=-1)
    # Rotated before it is divided: a coordinate that is exactly 0 stays so.
    u = rotation.apply(x) * (d**0.5 / torch.where(norm > 0, norm, 1))[..., None]
    codes = codebook.assign(u)
    factor = norm / d**0.5
    if scale != "norm":
        centroids = codebook.centroids.to(u)
        h = centroids.index_select(0, codes.flatten().int()).view(u.shape)
        square = (h * h).sum(-1) if scale != "unbiased" else u.new_ones(())
        along = (u * h).sum(-1) if scale != "renorm" else u.new_ones(())  # positive: u and h agree in every sign
        factor = factor * {"renorm": (d / square) ** 0.5, "lsq": along / square, "unbiased": d / along}[scale]
    return torch.where((norm > 0)[..., None], codes, 0), torch.where(norm > 0, factor, 0)


def sphere_codebook(d: int, bits: int) -> Codebook:
    """The codebook of `encode_directions` for vectors of size d."""
    centroids, boundaries, _ = lloyd_max_codebook(d, bits)
    return Codebook(centroids * d**0.5, boundaries * d**0.5)


def tq_quantize(x: Any, Π: Any, bits: int, codebook: Any = None, scale: str = "norm") -> tuple[Tensor, Tensor]:
    """Quantise vectors for least squared error: (codes uint8 [..., d], scale [...]).

    x: [..., d]; Π: orthogonal [d, d]; codebook: what `lloyd_max_codebook` returns, or centroids [2^bits], in
    units of a unit vector's coordinate (None: the exact one of d); scale: a mode of `encode_directions`. Computed in
    float64 if x is, else in float32. Raises ValueError for an unknown mode. Source: TurboQuant, algorithm 1.
    """
    if scale not in SCALES:
        raise ValueError(f"scale={scale!r} is not known, use {', '.join(SCALES)}")
    x = _floating(x)
    d = x.shape[-1]
    centroids, boundaries = _codebook(lloyd_max_codebook(d, bits) if codebook is None else codebook)
    in_deviations = Codebook(centroids * d**0.5, None if boundaries is None else boundaries * d**0.5)
    codes, factor = encode_directions(x, Rotation(d, matrix=_floating(Π)), in_deviations, scale)
    return codes, factor * d**0.5


def tq_dequantize(codes: Any, scale: Any, Π: Any, codebook: Any) -> Tensor:
    """Vectors [..., d] of what `tq_quantize` made: `scale * Π^T centroids[codes]`."""
    scale = _floating(scale)
    directions = _codebook(codebook)[0].to(scale)[torch.as_tensor(codes).long()]
    return scale[..., None] * (directions @ _floating(Π).to(scale))


def qjl_sketch(r: Any, S: Any) -> Tensor:
    """Signs of `S r`: int8 [..., m] of +-1 (0 counts as +1). r: [..., d]; S: [m, d], entries N(0, 1). Source: QJL."""
    r = _floating(r)
    return torch.where(r @ _floating(S).to(r).T < 0, -1, 1).to(torch.int8)


def qjl_inner_product(y: Any, signs: Any, norm: Any, S: Any, orthogonal: bool = False) -> Tensor:
    """<y, r> from the sketch of r: [...]; its mean over S is exact.

    y: [..., d]; signs: [..., m]; norm: ||r|| [...]; orthogonal: the rows of S are orthonormal (and uniform).
    Source: QJL, definition 3.1; orthonormal rows replace sqrt(2 / pi) by the mean |coordinate| of a unit vector.
    """
    y, S = _floating(y), _floating(S)
    m, d = S.shape
    return _sketch_factor(m, d, orthogonal) * _floating(norm).to(y) * ((y @ S.to(y).T) * _floating(signs).to(y)).sum(-1)


def _sketch_factor(m: int, d: int, orthogonal: bool) -> float:
    if not orthogonal:
        return math.sqrt(math.pi / 2) / m
    log_mean = math.lgamma(d / 2) - math.lgamma((d + 1) / 2) - 0.5 * math.log(math.pi)
    return 1 / (m * math.exp(log_mean))


def tq_prod_quantize(x: Any, Π: Any, S: Any, bits: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Quantise vectors for unbiased inner products: (codes [..., d], signs int8 [..., m], norm [...], residual [...]).

    bits - 1 bits a coordinate for the direction (none at 1 bit: the codes are then all 0), and one bit, by the sketch
    S [m, d], for what is left of the unit vector, whose norm is the residual. Source: TurboQuant, algorithm 2.
    """
    x = _floating(x)
    norm = torch.linalg.vector_norm(x, dim=-1)
    unit = x / torch.where(norm > 0, norm, 1)[..., None]
    if bits == 1:
        codes, residual = torch.zeros(x.shape, dtype=torch.uint8, device=x.device), unit
    else:
        codes, _ = tq_quantize(x, Π, bits - 1)
        ones = torch.where(norm > 0, 1.0, 0.0).to(norm)
        residual = unit - tq_dequantize(codes, ones, Π, lloyd_max_codebook(x.shape[-1], bits - 1))
    return codes, qjl_sketch(residual, S), norm, torch.linalg.vector_norm(residual, dim=-1)


def tq_prod_inner_product(
    y: Any, codes: Any, signs: Any, norm: Any, residual: Any, Π: Any, S: Any, bits: int
) -> Tensor:
    """<y, x> from what `tq_prod_quantize` made of x: [...]; its mean over S is exact. y: [..., d]."""
    y, norm = _floating(y), _floating(norm)
    sketched = norm * qjl_inner_product(y, signs, residual, S)
    if bits == 1:
        return sketched
    decoded = tq_dequantize(codes, norm, Π, lloyd_max_codebook(y.shape[-1], bits - 1))
    return (y * decoded).sum(-1) + sketched


def tq_attention(
    q: Any,
    codes_k: Any,
    scale_k: Any,
    codes_v: Any,
    scale_v: Any,
    Π_k: Any,
    Π_v: Any,
    codebooks: tuple[Any, Any],
    scaling: float,
) -> Tensor:
    """One query per head over quantised keys and values, which are not decoded: [H_q, d_v].

    q: [H_q, d]; codes_k: [H_kv, n, d] and scale_k [H_kv, n] of `tq_quantize`; codes_v: [H_kv, n, d_v] and scale_v;
    codebooks: for keys and for values; scaling: factor on the scores. Query head h reads kv head h // (H_q / H_kv).
    """
    q = _floating(q)
    keys = _packed(codes_k, scale_k, codebooks[0], "keys", q)
    values = _packed(codes_v, scale_v, codebooks[1], "values", q)
    rotated = q @ _floating(Π_k).to(q).T
    out, _ = attention_over_codes([rotated[None]], [keys], [values], codes_k.shape[-2], scale=scaling)
    return out[0][0] @ _floating(Π_v).to(q)


def _packed(codes: Any, scale: Any, codebook: Any, role: str, like: Tensor) -> Codes:
    codes, centroids = torch.as_tensor(codes), _codebook(codebook)[0].to(like)
    kv_heads, n, dims = codes.shape
    blocks = -(-n // BLOCK)
    scales = like.new_zeros(kv_heads, blocks * BLOCK)
    scales[:, :n] = _floating(scale).to(like)
    laid_out = lay_out(codes, len(centroids).bit_length() - 1, role)
    return Codes(laid_out, scales.unflatten(1, (blocks, BLOCK)), centroids, dims)


def _floating(x: Any) -> Tensor:
    """A tensor to compute with: float64 stays, all else becomes float32."""
    x = torch.as_tensor(x)
    return x if x.dtype == torch.float64 else x.float()


def _codebook(codebook: Any) -> tuple[Tensor, Tensor | None]:
    """(centroids, boundaries or None) of a result of `lloyd_max_codebook`, or of centroids alone."""
    if isinstance(codebook, tuple | list) and not isinstance(codebook[0], int | float):
        return torch.as_tensor(codebook[0]), torch.as_tensor(codebook[1])
    return torch.as_tensor(codebook), None
