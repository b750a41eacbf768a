"""TriAttention: how much the queries to come are expected to look at each cached key, and which keys to keep for them.

Queries of a head lie close to a fixed centre before they are rotated. The logit that a key can expect from queries at
later positions is then a fixed trigonometric series in their distance, and because rotation is linear, its mean over
many future positions is one dot product of the rotated key with one vector: no key position, no cosine per key.

Complex numbers stand for the pairs of dimensions that turn together ("bands"); a band turns by position * frequency.
Source: TriAttention arXiv 2604.04921; the closed form over all offsets follows from linearity.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

__all__ = [
    "MODES",
    "aggregate_gqa",
    "bands",
    "geometric_offsets",
    "mean_resultant_length",
    "norm_score",
    "q_statistics",
    "rope_logit_series",
    "triattention_keep",
    "trig_score",
]

MODES = ("global", "per_head", "per_layer_per_head")
AGGREGATIONS = ("mean", "max")
KEY_BLOCK = 2048  # keys scored at a time: what is computed of them stays in the caches


def bands(x: Tensor, rotary_dim: int | None = None, pairing: str = "half") -> tuple[Tensor, Tensor]:
    """(real, imaginary) parts [..., d / 2] of the bands of x [..., d]: those that rotate first, then the others.

    rotary_dim: leading dimensions that rotate (None: all). pairing: "half" pairs dimension m of either part with
    m + half of that part's size, "interleaved" pairs neighbours. Raises ValueError for odd sizes.
    """
    d = x.shape[-1]
    r = d if rotary_dim is None else rotary_dim
    if d % 2 or r % 2 or not 0 <= r <= d:
        raise ValueError(f"{r} of {d} dimensions rotate: bands are pairs, use even sizes")
    if pairing == "interleaved":
        return x[..., 0::2], x[..., 1::2]
    if pairing != "half":
        raise ValueError(f"pairing={pairing!r} is not known, use 'half' or 'interleaved'")
    turning = x[..., :r].chunk(2, -1)
    if r == d:
        return turning[0], turning[1]
    passing = x[..., r:].chunk(2, -1)
    return torch.cat([turning[0], passing[0]], -1), torch.cat([turning[1], passing[1]], -1)


def _channels(real: Tensor, imaginary: Tensor, rotary_dim: int, pairing: str) -> Tensor:
    """The inverse of `bands`: [..., d / 2] twice -> [..., d]."""
    if pairing == "interleaved":
        return torch.stack([real, imaginary], -1).flatten(-2)
    f = rotary_dim // 2
    return torch.cat([real[..., :f], imaginary[..., :f], real[..., f:], imaginary[..., f:]], -1)


def q_statistics(q: Tensor, rotary_dim: int | None = None, pairing: str = "half") -> tuple[Tensor, Tensor]:
    """Centre and mean norm of each head's queries: complex128 [H, F] and float64 [H, F], F = d / 2 bands.

    q: [T, H, d], after bias and norm, before rotation. Means of two parts, weighted with their T, are those of the
    whole. rotary_dim, pairing: as in `bands`. Source: TriAttention section 3.
    """
    z = torch.complex(*bands(q.double(), rotary_dim, pairing))
    return z.mean(0), z.abs().mean(0)


def mean_resultant_length(q: Tensor, dim: int = 0, pairing: str = "half") -> Tensor:
    """How far queries agree in direction, per band: |mean| / mean of |q|, in 0..1 (0 where all are zero).

    q: [..., d]; dim: what the mean runs over. Returns float64, q's shape without `dim` and with d / 2 last.
    Raises ValueError if dim is that of the channels. Source: TriAttention section 3.
    """
    if dim in (-1, q.ndim - 1):
        raise ValueError(f"dim={dim} holds the channels: choose the dimension of the samples")
    center, norm = q_statistics(q.movedim(dim, 0), pairing=pairing)
    return torch.where(norm > 0, center.abs() / norm, 0.0).clamp_max(1.0)


def rope_logit_series(
    q: Tensor,
    k: Tensor,
    delta: float | Sequence[float] | Tensor,
    inv_freq: Tensor,
    pairing: str = "half",
    attention_scaling: float = 1.0,
) -> float | Tensor:
    """<RoPE(q), RoPE(k)> as a function of the distance alone: sum over bands of a cos(w delta) + b sin(w delta).

    q, k: [d] before rotation; delta: position of q minus that of k, a number (returns a float) or several (returns
    float64 [len(delta)]); inv_freq: radians a token of the bands that rotate, [<= d / 2]; attention_scaling: factor
    on both rotated vectors. No softmax scale. Source: TriAttention equation 2.
    """
    r = 2 * len(inv_freq)
    z_q, z_k = (torch.complex(*bands(x.double(), r, pairing)) for x in (q, k))
    product = z_q * z_k.conj() * _scales(inv_freq, len(z_q), attention_scaling) ** 2
    distances = torch.as_tensor(delta, dtype=torch.float64)
    angles = distances[..., None] * _frequencies(inv_freq, len(z_q))
    logits = (product.real * angles.cos() - product.imag * angles.sin()).sum(-1)
    return logits if distances.ndim else logits.item()


def geometric_offsets(max_offset: int = 65536) -> list[int]:
    """Distances 1, 2, 4, ... <= max_offset at which future queries are assumed. Raises ValueError below 1.

    >>> geometric_offsets(9)
    [1, 2, 4, 8]
    """
    if max_offset < 1:
        raise ValueError(f"max_offset is {max_offset}: use at least 1")
    return [1 << j for j in range(int(max_offset).bit_length())]


def trig_score(
    k_rot: Tensor,
    q_center: Tensor,
    inv_freq: Tensor,
    t0: int,
    offsets: Sequence[int],
    pairing: str = "half",
    attention_scaling: float = 1.0,
) -> Tensor:
    """Logits that keys can expect, averaged over queries at t0 + offset: float32 [n].

    k_rot: [n, d], rotated at their own positions (and scaled with attention_scaling); q_center: complex [F];
    inv_freq: of the bands that rotate, [<= F]; t0: tokens so far; offsets: how much later queries come.
    Source: TriAttention equation 7.
    """
    (probe,) = _probes(q_center, inv_freq, t0, offsets, attention_scaling, "mean")
    return _dot(probe[None], k_rot, 2 * len(inv_freq), pairing)[0]


def norm_score(
    k: Tensor,
    q_center: Tensor,
    q_abs_mean: Tensor,
    pairing: str = "half",
    rotary_dim: int | None = None,
    norm_weighting: bool = True,
) -> Tensor:
    """What the spread of queries around their centre adds: sum over bands of (1 - R) E|q| |k|, float32 [n].

    k: [n, d], before or after rotation; q_center: complex [F]; q_abs_mean: [F]. (1 - R) E|q| is E|q| - |E q|.
    norm_weighting=False leaves (1 - R) out. Source: TriAttention equation 9.
    """
    weights = _norm_weights(q_center, q_abs_mean, norm_weighting)
    return _norms(weights[None], k, k.shape[-1] if rotary_dim is None else rotary_dim, pairing)[0]


def aggregate_gqa(scores: Tensor, votes: Tensor | None = None, group: str = "max") -> Tensor:
    """One score a key head: each query head's scores normalised over the keys, then the largest: [H_kv, n].

    scores: [H_kv, G, n] of the G query heads that read each key head; votes: bool [H_kv, G], heads that count
    (a key head without any gets -inf); group="mean": the mean of those instead of the largest. Population deviation,
    at least 1e-6. Source: TriAttention equation 12.
    """
    # Query heads differ in scale: z-scores over the keys make them comparable before one of them decides.
    x = (scores - scores[..., :1]).double()  # equal scores give exact zeros
    z = (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0).clamp_min(1e-6)
    votes = torch.ones(z.shape[:2], dtype=torch.bool, device=z.device) if votes is None else votes
    if group == "max":
        return z.masked_fill(~votes[..., None], float("-inf")).amax(1).float()
    if group != "mean":
        raise ValueError(f"group={group!r} is not known, use {' or '.join(AGGREGATIONS)}")
    counted = votes.sum(1)[:, None]  # [H_kv, 1]
    mean = (z * votes[..., None]).sum(1) / counted.clamp_min(1)
    return mean.masked_fill(counted == 0, float("-inf")).float()


def triattention_keep(
    k_rot: Iterable[Tensor],
    q_mean: Sequence[Tensor] | Tensor,
    q_abs_mean: Sequence[Tensor] | Tensor,
    inv_freq: Sequence[Tensor] | Tensor,
    t0: int,
    keep: int,
    mode: str = "per_head",
    max_offset: int = 65536,
    pairing: str = "half",
    *,
    attention_scaling: float | Sequence[float] = 1.0,
    protect_recent: int = 0,
    protect_sinks: int = 0,
    trig: bool = True,
    norm_weighting: bool = True,
    offsets: Sequence[int] | None = None,
    aggregation: str = "mean",
    group: str = "max",
) -> Tensor | list[Tensor]:
    """Which `keep` of n cached keys stay: indices int64, ascending; ties go to the older key.

    k_rot: [L, H_kv, n, d], or an iterator of layers [H_kv, n, d], of which one is held at a time; q_mean: complex
    [L, H_q, F]; q_abs_mean: [L, H_q, F]; inv_freq: [<= F], or one for each layer, as attention_scaling; t0: tokens so
    far. mode: "global" returns [keep], one set for all; "per_head" [H_kv, keep], a set for each key head that all
    layers share; "per_layer_per_head" [L, H_kv, keep] (a list where layers differ in H_kv).
    The last protect_recent and first protect_sinks keys stay whatever their score. A query head whose q_abs_mean is
    all zero has no vote. trig=False scores by norms alone, norm_weighting=False is of `norm_score`; offsets replace
    the geometric ones up to max_offset. aggregation="max" takes the largest expected logit over the offsets instead of
    their mean, which costs a product for each; group is of `aggregate_gqa`.
    Raises ValueError for a mode that is not known, layers that do not fit it, or more protected keys than `keep`.
    Source: TriAttention section 4.
    """
    if mode not in MODES:
        raise ValueError(f"mode={mode!r} is not known, use {', '.join(MODES)}")
    if aggregation not in AGGREGATIONS:
        raise ValueError(f"aggregation={aggregation!r} is not known, use {' or '.join(AGGREGATIONS)}")
    if protect_recent + protect_sinks > keep:
        raise ValueError(f"{protect_recent} recent and {protect_sinks} first keys are protected, only {keep} are kept")
    offsets = geometric_offsets(max_offset) if offsets is None else offsets
    combined: Tensor | None = None  # best of all layers and heads so far [1, n], or sum over layers [H_kv, n]
    chosen: list[Tensor] = []
    for layer, keys in enumerate(k_rot):
        omega = inv_freq if isinstance(inv_freq, Tensor) and inv_freq.ndim == 1 else inv_freq[layer]
        scaling = attention_scaling if isinstance(attention_scaling, int | float) else attention_scaling[layer]
        # A key's score is two dot products: of the key with a probe, which already holds the series summed over all
        # offsets ("max": one for each offset), and of the norms of its bands with weights.
        probes = _probes(q_mean[layer], omega, t0, offsets, scaling, aggregation) if trig else ()
        weights = _norm_weights(q_mean[layer], q_abs_mean[layer], norm_weighting)
        weights = weights * _scales(omega, weights.shape[-1], scaling)
        scores = _head_scores(keys, probes, weights, 2 * len(omega), pairing)
        votes = (q_abs_mean[layer] > 0).any(-1).view(scores.shape[:2])
        z = aggregate_gqa(scores, votes, group)  # [H_kv, n]
        if mode != "global" and not votes.any(1).all():
            raise ValueError(f"mode={mode!r}: layer {layer} has a key head no query head votes on, use mode='global'")
        if mode == "per_layer_per_head":
            chosen.append(_top(z, keep, protect_recent, protect_sinks))
        elif mode == "global":
            best = z.amax(0, keepdim=True)
            combined = best if combined is None else torch.maximum(combined, best)
        elif combined is None or len(combined) == len(z):
            combined = z if combined is None else combined + z  # the mean, up to a factor
        else:
            raise ValueError(f"mode='per_head': layers have {len(combined)} and {len(z)} key heads, use mode='global'")
    if mode == "per_layer_per_head":
        return torch.stack(chosen) if len({c.shape for c in chosen}) == 1 else chosen
    if combined is None:
        raise ValueError("k_rot holds no layer")
    top = _top(combined, keep, protect_recent, protect_sinks)
    return top[0] if mode == "global" else top


def _head_scores(
    keys: Tensor, probes: Sequence[Tensor] | Tensor, weights: Tensor, rotary_dim: int, pairing: str
) -> Tensor:
    """Scores of every query head, float32 [H_kv, G, n]: the norm term, and of the probes' terms the largest.

    keys: [H_kv, n, d]; probes: each [H_kv * G, F]; weights: [H_kv * G, F].
    """
    per_head = (len(keys), -1)
    weights = weights.unflatten(0, per_head)
    parts = []
    for block in keys.split(KEY_BLOCK, 1):
        block = block.float()
        score, best = _norms(weights, block, rotary_dim, pairing), None
        for probe in probes:
            term = _dot(probe.unflatten(0, per_head), block, rotary_dim, pairing)
            best = term if best is None else torch.maximum(best, term)
        parts.append(score if best is None else score + best)
    return torch.cat(parts, -1)


def _frequencies(inv_freq: Tensor, count: int) -> Tensor:
    """float64 [count]: of all bands, 0 for those that do not rotate."""
    return torch.nn.functional.pad(inv_freq.double(), (0, count - len(inv_freq)))


def _scales(inv_freq: Tensor, count: int, attention_scaling: float) -> Tensor:
    """float64 [count]: the factor that rotation puts on each band, 1 for those that do not rotate."""
    scales = torch.ones(count, dtype=torch.float64, device=inv_freq.device)
    scales[: len(inv_freq)] = attention_scaling
    return scales


def _probes(
    q_center: Tensor, inv_freq: Tensor, t0: int, offsets: Sequence[int], attention_scaling: float, aggregation: str
) -> Tensor:
    """The mean query rotated to positions t0 + offset: complex64 [offsets, ..., F], or their mean [1, ..., F].

    Phases of 1e5 radians need float64.
    """
    count = q_center.shape[-1]
    positions = t0 + torch.tensor(offsets, dtype=torch.float64, device=inv_freq.device)
    phases = positions[:, None] * _frequencies(inv_freq, count)  # [offsets, F]
    turns = torch.polar(torch.ones_like(phases), phases)
    if aggregation == "mean":
        turns = turns.mean(0, keepdim=True)
    turns = turns * _scales(inv_freq, count, attention_scaling)
    shape = (len(turns), *[1] * (q_center.ndim - 1), count)
    return (q_center.to(torch.complex128) * turns.view(shape)).to(torch.complex64)


def _norm_weights(q_center: Tensor, q_abs_mean: Tensor, norm_weighting: bool) -> Tensor:
    """float32 [..., F]; never below 0, which rounding of the two means could cause."""
    return ((q_abs_mean - q_center.abs()).clamp_min(0) if norm_weighting else q_abs_mean).float()


def _dot(probe: Tensor, keys: Tensor, rotary_dim: int, pairing: str) -> Tensor:
    """Real parts of <probe, key>: float32 [..., G, n]. probe: complex [..., G, F]; keys: [..., n, d]."""
    return _product(_channels(probe.real, probe.imag, rotary_dim, pairing), keys.float())


def _norms(weights: Tensor, keys: Tensor, rotary_dim: int, pairing: str) -> Tensor:
    """Weighted sums of band norms: float32 [..., G, n]. weights: [..., G, F]; keys: [..., n, d]."""
    real, imaginary = bands(keys.float(), rotary_dim, pairing)
    return _product(weights, (real * real + imaginary * imaginary).sqrt())


def _product(left: Tensor, right: Tensor) -> Tensor:
    """left @ right^T in float32 proper, whatever shorter type matrix products are allowed to use meanwhile."""
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        return left.to(right) @ right.transpose(-1, -2)
    finally:
        torch.set_float32_matmul_precision(precision)


def _top(scores: Tensor, keep: int, recent: int, sinks: int) -> Tensor:
    """Indices of the `keep` largest of each row [rows, n], ascending."""
    n = scores.shape[-1]
    scores = scores.clone()
    scores[..., n - min(recent, n) :] = float("inf")
    scores[..., :sinks] = float("inf")
    return scores.sort(dim=-1, descending=True, stable=True).indices[..., :keep].sort(dim=-1).values
