"""TriAttention's formulas against their definitions written out in float64, and the worked numbers of the paper."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparing.config.rope import RopeParameters
from sparing.kernels import inverse_frequencies, rope_tables, rotate
from sparing.memory.triattention import scores as trigonometric
from sparing.memory.triattention.scores import (
    aggregate_gqa,
    bands,
    geometric_offsets,
    mean_resultant_length,
    norm_score,
    q_statistics,
    rope_logit_series,
    triattention_keep,
    trig_score,
)

ROPES = {
    "default": RopeParameters(),
    "linear": RopeParameters("linear", factor=4.0),
    "yarn": RopeParameters("yarn", factor=8.0, original_max_position_embeddings=64),
    "yarn, explicit factor": RopeParameters(
        "yarn", factor=8.0, original_max_position_embeddings=64, attention_factor=1.3
    ),
    "llama3": RopeParameters("llama3", factor=8.0, original_max_position_embeddings=64),
    "partial": RopeParameters(partial_rotary_factor=0.5),
    "proportional": RopeParameters("proportional", rope_theta=1e6, partial_rotary_factor=0.25),
}


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rotated(x: Tensor, positions: Tensor, inv_freq: Tensor, scaling: float) -> Tensor:
    """The model's own rotation of x [n, d]."""
    return rotate(x[:, None], *rope_tables(positions, inv_freq, x.dtype, scaling))[:, 0]


def literal_score(
    k: Tensor,
    positions: Tensor,
    center: Tensor,
    norm: Tensor,
    omega: Tensor,
    scales: Tensor,
    t0: int,
    offsets: list[int],
    trig: bool = True,
    norm_weighting: bool = True,
    aggregation: str = "mean",
) -> Tensor:
    """The definition, from keys [n, d] before rotation, pairs by halves of the rotary part: float64 [n]."""
    real, imaginary = bands(k.double())
    size, angle = torch.hypot(real, imaginary), torch.atan2(imaginary, real)  # [n, F]
    extra = (norm - center.abs()).clamp_min(0) if norm_weighting else norm
    score = (scales**2 * extra * size).sum(-1)
    if not trig:
        return score
    phases = [omega * (t0 - positions[:, None] + delta) + center.angle() - angle for delta in offsets]
    expected = torch.stack([(scales**2 * center.abs() * size * phase.cos()).sum(-1) for phase in phases])
    return score + (expected.amax(0) if aggregation == "max" else expected.mean(0))


# 284


def test_concentration_of_worked_examples():
    constant = torch.tensor([[3.0, -4.0]] * 5)
    assert torch.equal(mean_resultant_length(constant), torch.ones(1, dtype=torch.float64))
    quarter = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # {1, i}
    center, norm = q_statistics(quarter[:, None])
    assert center.item() == pytest.approx(0.5 + 0.5j)
    assert norm.item() == 1
    assert mean_resultant_length(quarter).item() == pytest.approx(0.70711, abs=1e-5)
    assert mean_resultant_length(torch.tensor([[2.0, 1.0], [-2.0, -1.0]])).item() == 0
    assert mean_resultant_length(torch.zeros(3, 4)).tolist() == [0, 0]


@settings(max_examples=20)
@given(seed=st.integers(0, 1000), cut=st.integers(1, 29), pairing=st.sampled_from(["half", "interleaved"]))
def test_statistics_of_shards_merge_to_those_of_the_whole(seed, cut, pairing):
    q = normal(30, 3, 10, seed=seed)
    whole = q_statistics(q, pairing=pairing)
    parts = [q_statistics(part, pairing=pairing) for part in (q[:cut], q[cut:])]
    for i, value in enumerate(whole):
        merged = (parts[0][i] * cut + parts[1][i] * (30 - cut)) / 30
        torch.testing.assert_close(merged, value, rtol=1e-12, atol=1e-12)
    assert (whole[0].abs() <= whole[1] + 1e-15).all()


def test_concentration_does_not_depend_on_size_and_runs_over_any_dimension():
    q = normal(20, 3, 8)
    r = mean_resultant_length(q)
    assert r.shape == (3, 4)
    assert ((r >= 0) & (r <= 1)).all()
    torch.testing.assert_close(mean_resultant_length(7.5 * q), r, rtol=1e-6, atol=0)
    torch.testing.assert_close(mean_resultant_length(q.transpose(0, 1), dim=1), r)
    with pytest.raises(ValueError, match="channels"):
        mean_resultant_length(q, dim=2)


@pytest.mark.parametrize("r", [0, 4, 6, 10])
def test_bands_of_partial_rotation(r):
    """Rotary bands first, then the channels that pass, paired by the same rule."""
    x = torch.arange(10)
    real, imaginary = bands(x, r)
    half, rest = r // 2, (10 - r) // 2
    assert real.tolist() == [*range(half), *range(r, r + rest)]
    assert imaginary.tolist() == [*range(half, r), *range(r + rest, 10)]
    assert [part.tolist() for part in bands(x, r, "interleaved")] == [[0, 2, 4, 6, 8], [1, 3, 5, 7, 9]]


def test_bands_refuse_what_has_no_pairs():
    with pytest.raises(ValueError, match="even"):
        bands(torch.zeros(3))
    with pytest.raises(ValueError, match="even"):
        bands(torch.zeros(4), 3)
    with pytest.raises(ValueError, match="pairing='diagonal'"):
        bands(torch.zeros(4), pairing="diagonal")


# 285


@pytest.mark.parametrize("name", ROPES)
@pytest.mark.parametrize("d", [8, 12, 24])
def test_the_series_is_the_rotated_product(name, d):
    inv_freq, scaling = inverse_frequencies(ROPES[name], d)
    q, k = normal(2, d)
    for p_q, p_k in [(0, 0), (7, 3), (3, 7), (90, 2)]:
        at = torch.tensor([p_q, p_k])
        left, right = rotated(torch.stack([q, k]), at, inv_freq, scaling)
        series = rope_logit_series(q, k, p_q - p_k, inv_freq, attention_scaling=scaling)
        assert isinstance(series, float)
        assert series == pytest.approx((left @ right).item(), abs=1e-5 * q.norm().item() * k.norm().item())


def test_properties_of_the_series():
    inv_freq, _ = inverse_frequencies(ROPES["default"], 8)
    q, k = normal(2, 8)
    at_zero = rope_logit_series(q, k, 0, inv_freq, attention_scaling=1.2)
    assert at_zero == pytest.approx(1.44 * (q.double() @ k.double()).item())
    several = rope_logit_series(q, k, [-3, 0, 5], inv_freq)
    assert isinstance(several, Tensor) and several.shape == (3,)
    torch.testing.assert_close(several, rope_logit_series(k, q, torch.tensor([3, 0, -5]), inv_freq))
    # Coefficients of one band: a = Re(q conj k) at phase 0, b = -Im(q conj k) a quarter turn on.
    one_q, one_k, omega = torch.tensor([1.0, 2.0]), torch.tensor([0.5, -1.5]), torch.tensor([math.pi / 2])
    product = complex(1, 2) * complex(0.5, -1.5).conjugate()
    assert rope_logit_series(one_q, one_k, 0, omega) == pytest.approx(product.real)
    assert rope_logit_series(one_q, one_k, 1, omega) == pytest.approx(-product.imag)


def test_the_series_of_neighbouring_pairs():
    """Interleaved is half-split with the channels reordered."""
    q, k = normal(2, 8)
    order = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])
    inv_freq, _ = inverse_frequencies(ROPES["default"], 8)
    expected = rope_logit_series(q[order], k[order], [1.0, 9.0], inv_freq)
    torch.testing.assert_close(rope_logit_series(q, k, [1.0, 9.0], inv_freq, pairing="interleaved"), expected)


# 286


def test_trig_score_of_worked_examples():
    one = torch.tensor([1.0 + 0j])
    key = torch.tensor([[1.0, 0.0]])
    assert trig_score(key, one, torch.tensor([math.pi / 2]), 0, [1, 2, 4]).item() == pytest.approx(0, abs=1e-6)
    pi = torch.tensor([math.pi], dtype=torch.float64)
    assert trig_score(key, one, pi, 0, geometric_offsets()).item() == pytest.approx(15 / 17, abs=1e-6)
    quarter = torch.tensor([math.pi / 2], dtype=torch.float64)
    score = trig_score(key, one, quarter, 0, geometric_offsets())
    assert score.item() == pytest.approx(14 / 17, abs=1e-6)
    imaginary = trig_score(torch.tensor([[0.0, 1.0]]), one, quarter, 0, geometric_offsets())
    assert imaginary.item() == pytest.approx(1 / 17, abs=1e-6)
    radian = torch.tensor([1.0])
    found = [trig_score(k[None], one, radian, 0, geometric_offsets()).item() for k in torch.eye(2)]
    assert found == pytest.approx([-0.0164493, 0.1179882], abs=1e-6)


@pytest.mark.parametrize("name", ROPES)
def test_trig_score_is_the_mean_logit_of_the_centre_as_a_query(name):
    inv_freq, scaling = inverse_frequencies(ROPES[name], 12)
    r = 2 * len(inv_freq)
    mu, k = normal(12), normal(9, 12, seed=1)
    positions = torch.arange(9) * 3
    keys = rotated(k, positions, inv_freq, scaling)
    center = torch.complex(*bands(mu, r))
    t0, offsets = 40, [1, 2, 4, 8, 16]
    queries = rotated(mu.expand(5, 12), t0 + torch.tensor(offsets), inv_freq, scaling)
    expected = (queries @ keys.T).mean(0)
    found = trig_score(keys, center, inv_freq, t0, offsets, attention_scaling=scaling)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    # Distances alone matter; the score is linear in the centre and in the key.
    moved = rotated(k, positions + 11, inv_freq, scaling)
    shifted = trig_score(moved, center, inv_freq, t0 + 11, offsets, attention_scaling=scaling)
    torch.testing.assert_close(shifted, found, rtol=1e-4, atol=1e-4)
    double = trig_score(3 * keys, -2 * center, inv_freq, t0, offsets, attention_scaling=scaling)
    torch.testing.assert_close(double, -6 * found, rtol=1e-4, atol=1e-4)


# 287


def test_norm_score_of_worked_examples():
    k = normal(5, 8)
    size = torch.hypot(*bands(k))
    center = torch.complex(*bands(normal(8, seed=1)))
    assert norm_score(k, center, center.abs()).abs().max() <= 1e-6
    nu = torch.tensor([1.0, 2.0, 0.5, 3.0])
    torch.testing.assert_close(norm_score(k, torch.zeros(4, dtype=torch.complex64), nu), size @ nu)
    quarter = torch.tensor([0.5 + 0.5j])
    one = norm_score(torch.tensor([[3.0, 4.0]]), quarter, torch.ones(1))
    assert one.item() == pytest.approx(5 * 0.29289, abs=1e-4)
    # Rounding may leave a norm of the mean above the mean of norms: never a negative score.
    assert norm_score(k, center, center.abs() * (1 - 1e-6)).min() >= 0


@pytest.mark.parametrize("name", ["default", "partial", "proportional"])
def test_norm_score_does_not_see_rotation(name):
    inv_freq, _ = inverse_frequencies(ROPES[name], 12)
    r = 2 * len(inv_freq)
    k, q = normal(7, 12), normal(50, 12, seed=1)
    center, nu = (x.to(torch.complex64 if x.is_complex() else torch.float32) for x in q_statistics(q, r))
    before = norm_score(k, center, nu, rotary_dim=r)
    after = norm_score(rotated(k, torch.arange(7) * 5, inv_freq, 1.0), center, nu, rotary_dim=r)
    torch.testing.assert_close(after, before, rtol=1e-5, atol=1e-5)
    assert (norm_score(k, center, nu, rotary_dim=r, norm_weighting=False) >= before).all()


# 288


@pytest.mark.parametrize(("largest", "count"), [(65536, 17), (65535, 16), (128, 8), (1, 1), (100, 7)])
def test_offsets(largest, count):
    offsets = geometric_offsets(largest)
    assert len(offsets) == count
    assert offsets == [2**j for j in range(count)]


def test_no_offsets():
    with pytest.raises(ValueError, match="max_offset is 0"):
        geometric_offsets(0)


def test_aggregation_of_the_worked_example():
    scores = torch.tensor([[[1.0, 2, 3, 4], [40, 10, 20, 30]]])
    best = aggregate_gqa(scores)
    torch.testing.assert_close(best, torch.tensor([[1.3416, -0.4472, 0.4472, 1.3416]]), rtol=0, atol=1e-4)
    assert best.topk(2).indices.sort().values.tolist() == [[0, 3]]
    affine = scores * torch.tensor([0.1, 7.0])[:, None] + torch.tensor([100.0, -3])[:, None]
    torch.testing.assert_close(aggregate_gqa(affine), best, rtol=1e-4, atol=1e-4)
    constant = torch.full((1, 1, 5), 0.1)
    assert torch.equal(aggregate_gqa(constant), torch.zeros(1, 5))
    mean = aggregate_gqa(scores, group="mean")
    torch.testing.assert_close(mean, torch.tensor([[0.0, -0.8944, 0.0, 0.8944]]), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="group='median' is not known, use mean or max"):
        aggregate_gqa(scores, group="median")
    silent = aggregate_gqa(scores, torch.tensor([[True, False]]))
    torch.testing.assert_close(silent, aggregate_gqa(scores[:, :1]))
    silent = aggregate_gqa(scores, torch.tensor([[True, False]]), group="mean")
    torch.testing.assert_close(silent, aggregate_gqa(scores[:, :1]))
    assert (aggregate_gqa(scores, torch.tensor([[False, False]]), group="mean") == float("-inf")).all()


# 289


def problem(layers: int, kv_heads: int, group: int, n: int, d: int, rope: str = "default", seed: int = 0):
    """Random keys at different positions for each head, and statistics."""
    generator = torch.Generator().manual_seed(seed)
    inv_freq, scaling = inverse_frequencies(ROPES[rope], d)
    r, heads = 2 * len(inv_freq), kv_heads * group
    k = torch.randn(layers, kv_heads, n, d, generator=generator)
    positions = torch.stack([torch.randperm(3 * n, generator=generator)[:n].sort().values for _ in range(kv_heads)])
    k_rot = torch.stack(
        [torch.stack([rotated(x, p, inv_freq, scaling) for x, p in zip(layer, positions, strict=True)]) for layer in k]
    )
    q = torch.randn(layers, heads, d, generator=generator) + 0.7 * torch.randn(
        40, layers, heads, d, generator=generator
    )
    center = torch.complex(*bands(q.double(), r)).mean(0)
    norm = torch.complex(*bands(q.double(), r)).abs().mean(0)
    return k, k_rot, positions, center, norm, inv_freq, scaling


def literal_keep(k, positions, center, norm, inv_freq, scaling, t0, keep, mode, offsets, group="max", **switches):
    """Selection by the definition, in float64; also the smallest gap between what is kept and what is not."""
    layers, kv_heads, _, d = k.shape
    size = center.shape[1] // kv_heads
    omega, scales = torch.zeros(d // 2, dtype=torch.float64), torch.ones(d // 2, dtype=torch.float64)
    omega[: len(inv_freq)], scales[: len(inv_freq)] = inv_freq.double(), scaling
    order = torch.cat(bands(torch.arange(d), 2 * len(inv_freq)))  # channels such that halves pair
    best = torch.empty(layers, kv_heads, k.shape[2], dtype=torch.float64)
    for layer in range(layers):
        for j in range(kv_heads):
            heads = []
            for h in range(j * size, (j + 1) * size):
                s = literal_score(
                    k[layer, j][:, order],
                    positions[j],
                    center[layer, h],
                    norm[layer, h],
                    omega,
                    scales,
                    t0,
                    offsets,
                    **switches,
                )
                heads.append((s - s.mean()) / s.std(correction=0).clamp_min(1e-6))
            best[layer, j] = torch.stack(heads).amax(0) if group == "max" else torch.stack(heads).mean(0)
    if mode == "global":
        final = best.amax((0, 1))
    elif mode == "per_head":
        final = best.mean(0)
    else:
        final = best
    ordered = final.sort(-1, descending=True)
    gap = (ordered.values[..., keep - 1] - ordered.values[..., keep]).min().item()
    return ordered.indices[..., :keep].sort(-1).values, gap


@pytest.mark.parametrize("mode", ["global", "per_head", "per_layer_per_head"])
@pytest.mark.parametrize("rope", ROPES)
@pytest.mark.parametrize(("kv_heads", "group", "d"), [(2, 3, 12), (1, 1, 8), (3, 1, 24)])
@pytest.mark.parametrize(
    "switches",
    [{}, {"trig": False}, {"norm_weighting": False}, {"aggregation": "max"}, {"group": "mean"}],
    ids=str,
)
def test_selection_is_that_of_the_definition(mode, rope, kv_heads, group, d, switches):
    checked = 0
    for seed in range(3):
        k, k_rot, positions, center, norm, inv_freq, scaling = problem(2, kv_heads, group, 17, d, rope, seed)
        t0, keep, offsets = 60, 6, geometric_offsets(100)
        expected, gap = literal_keep(k, positions, center, norm, inv_freq, scaling, t0, keep, mode, offsets, **switches)
        found = triattention_keep(
            k_rot, center, norm, inv_freq, t0, keep, mode, 100, attention_scaling=scaling, **switches
        )
        if gap > 1e-4:
            assert torch.equal(found, expected)
            checked += 1
    assert checked


def test_scores_of_long_contexts_and_offsets():
    """Against float64 at positions where phases are 1e5 radians: 2e-3 of the deviation."""
    inv_freq, _ = inverse_frequencies(RopeParameters(rope_theta=1e6), 16)
    k, q = normal(64, 16), normal(30, 16, seed=1)
    positions = torch.randint(0, 32768, (64,), generator=torch.Generator().manual_seed(0)).sort().values
    keys = rotated(k, positions, inv_freq, 1.0)
    center, nu = q_statistics(q)
    offsets = geometric_offsets()
    literal = literal_score(k, positions, center, nu, inv_freq.double(), torch.ones(8), 32768, offsets)
    found = trig_score(keys, center, inv_freq, 32768, offsets) + norm_score(keys, center, nu)
    assert (found - literal).abs().max() <= 2e-3 * literal.std()


def test_union_of_the_best_of_each_head_holds_the_best_of_all():
    """The reference's union, then fill: the same as the top of the maximum."""
    _, k_rot, _, center, norm, inv_freq, _ = problem(2, 2, 2, 40, 8)
    found = triattention_keep(k_rot, center, norm, inv_freq, 130, 11, "global", 64)
    rows = []
    for layer in range(2):
        for head in range(4):
            s = trig_score(k_rot[layer, head // 2], center[layer, head], inv_freq, 130, geometric_offsets(64))
            s = s + norm_score(k_rot[layer, head // 2], center[layer, head], norm[layer, head])
            rows.append(aggregate_gqa(s[None, None])[0])
    z = torch.stack(rows)
    union = set(z.topk(11, -1).indices.flatten().tolist())
    best = sorted(union, key=lambda i: -z[:, i].max().item())[:11]
    assert found.tolist() == sorted(best)


@pytest.mark.parametrize("mode", ["global", "per_head", "per_layer_per_head"])
def test_protected_keys_stay_and_ties_go_to_the_older(mode):
    same = torch.ones(2, 1, 9, 4)
    center, norm = torch.ones(2, 1, 2, dtype=torch.complex64), torch.full((2, 1, 2), 2.0)
    inv_freq = torch.zeros(2)

    def kept(**options):
        return triattention_keep(same, center, norm, inv_freq, 9, 4, mode, **options).flatten().tolist()[-4:]

    assert kept() == [0, 1, 2, 3]
    assert kept(protect_recent=2) == [0, 1, 7, 8]
    assert kept(protect_recent=1, protect_sinks=3) == [0, 1, 2, 8]
    assert kept(protect_recent=4) == [5, 6, 7, 8]
    with pytest.raises(ValueError, match="3 recent and 2 first keys are protected, only 4"):
        kept(protect_recent=3, protect_sinks=2)


def test_layers_of_different_shapes():
    """Layers as an iterator, each with its own rotation and heads."""
    parts = [problem(1, 2, 2, 15, 8, "default", 1), problem(1, 1, 3, 15, 12, "partial", 2)]
    keys, centers, norms, freqs = ([p[i][0] if i != 5 else p[i] for p in parts] for i in (1, 3, 4, 5))
    both = triattention_keep(iter(keys), centers, norms, freqs, 50, 5, "global", attention_scaling=[1.0, 1.0])
    assert both.shape == (5,)
    each = triattention_keep(iter(keys), centers, norms, freqs, 50, 5, "per_layer_per_head")
    assert [e.shape for e in each] == [(2, 5), (1, 5)]
    for i in range(2):
        alone = triattention_keep(keys[i : i + 1], centers[i : i + 1], norms[i : i + 1], freqs[i : i + 1], 50, 5)
        assert torch.equal(each[i], alone)
    with pytest.raises(ValueError, match="2 and 1 key heads, use mode='global'"):
        triattention_keep(iter(keys), centers, norms, freqs, 50, 5, "per_head")


def test_heads_without_statistics_have_no_vote():
    _, k_rot, _, center, norm, inv_freq, _ = problem(2, 2, 2, 20, 8)
    center[:, 1], norm[:, 1] = 0, 0
    found = triattention_keep(k_rot, center, norm, inv_freq, 70, 6, "per_layer_per_head")
    alone = triattention_keep(k_rot[:, :1], center[:, :1], norm[:, :1], inv_freq, 70, 6, "per_layer_per_head")
    assert torch.equal(found[:, :1], alone)
    norm[:, 0] = 0
    with pytest.raises(ValueError, match="layer 0 has a key head no query head votes on"):
        triattention_keep(k_rot, center, norm, inv_freq, 70, 6, "per_head")
    assert len(triattention_keep(k_rot, center, norm, inv_freq, 70, 6, "global")) == 6


def test_16_bit_keys_are_scored_in_float32():
    _, k_rot, _, center, norm, inv_freq, _ = problem(1, 2, 2, 30, 16)
    half = k_rot.bfloat16()
    expected = triattention_keep(half.float(), center, norm, inv_freq, 90, 9)
    assert torch.equal(triattention_keep(half, center, norm, inv_freq, 90, 9), expected)


def test_blocks_of_keys_do_not_matter(monkeypatch):
    _, k_rot, _, center, norm, inv_freq, _ = problem(2, 2, 2, 50, 8)
    whole = triattention_keep(k_rot, center, norm, inv_freq, 150, 20, "per_layer_per_head")
    monkeypatch.setattr(trigonometric, "KEY_BLOCK", 7)
    assert torch.equal(triattention_keep(k_rot, center, norm, inv_freq, 150, 20, "per_layer_per_head"), whole)


def test_a_budget_of_everything_keeps_everything():
    _, k_rot, _, center, norm, inv_freq, _ = problem(1, 2, 2, 7, 8)
    for keep in (7, 100):
        assert triattention_keep(k_rot, center, norm, inv_freq, 21, keep, "global").tolist() == list(range(7))
    with pytest.raises(ValueError, match="mode='union' is not known"):
        triattention_keep(k_rot, center, norm, inv_freq, 21, 3, "union")
    with pytest.raises(ValueError, match="aggregation='sum' is not known, use mean or max"):
        triattention_keep(k_rot, center, norm, inv_freq, 21, 3, aggregation="sum")
