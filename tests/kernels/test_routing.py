"""The router with correction bias and groups, and experts in a latent space."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.kernels import grouped_experts, latent_moe, relu2, route
from tests.kernel_sets import using

M, H, E, F, L, K = 7, 6, 8, 5, 3, 3

pytestmark = pytest.mark.usefixtures("each_kernel_set")


def weights(seed=0, width=L):
    g = torch.Generator().manual_seed(seed)
    return {
        "x": torch.randn(M, H, generator=g),
        "gate": torch.randn(E, H, generator=g),
        "bias": 0.3 * torch.randn(E, generator=g),
        "fc1": torch.randn(L, H, generator=g),
        "fc2": torch.randn(H, L, generator=g),
        "up": torch.randn(E, F, width, generator=g),
        "down": torch.randn(E, width, F, generator=g),
    }


def test_worked_routing():
    logits = torch.tensor([[0.0, math.log(3), -math.log(3), 2.0]])
    bias = torch.tensor([0.0, 0.0, 0.5, -0.6])
    for scale, expected in ((1.0, [0.75, 0.25]), (2.0, [1.5, 0.5])):
        ids, w = route(logits, torch.eye(4), bias, 2, scale=scale)
        assert ids.tolist() == [[1, 2]]  # both have 0.75: the lower index first
        torch.testing.assert_close(w, torch.tensor([expected]))


@pytest.mark.parametrize(("n_group", "topk_group"), [(1, 1), (2, 1), (4, 2), (4, 4), (8, 5)])
@pytest.mark.parametrize("normalize", [True, False])
def test_against_a_loop(n_group, topk_group, normalize):
    w = weights()
    k = 2
    ids, mix = route(w["x"], w["gate"], w["bias"], k, n_group, topk_group, normalize, 2.5)
    assert mix.dtype == torch.float32
    size = E // n_group
    for m in range(M):
        score = torch.sigmoid(w["gate"].double() @ w["x"][m].double())
        biased = (score + w["bias"].double()).tolist()
        groups = [sorted(biased[g * size : (g + 1) * size], reverse=True) for g in range(n_group)]
        best = sorted(range(n_group), key=lambda g: -sum(groups[g][:2]))[:topk_group]
        allowed = [e for e in range(E) if e // size in best]
        chosen = sorted(allowed, key=lambda e: -biased[e])[:k]
        assert ids[m].tolist() == chosen
        expected = score[chosen] / (score[chosen].sum() if normalize else 1) * 2.5
        torch.testing.assert_close(mix[m].double(), expected, rtol=1e-5, atol=1e-6)


def literal_scores(logits, scoring):
    """Of a token's logits in float64."""
    if scoring == "softmax":
        return logits.exp() / logits.exp().sum(-1, keepdim=True)
    return 1 / (1 + (-logits).exp()) if scoring == "sigmoid" else torch.log1p(logits.exp()).sqrt()


SCORINGS = pytest.mark.parametrize("scoring", ["sigmoid", "sqrtsoftplus", "softmax"])


@SCORINGS
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "experts", "size", "k"), [(1, 256, 130, 6), (8, 37, 200, 3), (11, 24, 64, 24)])
@pytest.mark.parametrize(("normalize", "scale"), [(True, 1.5), (False, 1.0)])
@pytest.mark.parametrize("is_given", [False, True])
def test_scorings_against_float64(
    each_kernel_set, scoring, dtype, tokens, experts, size, k, normalize, scale, is_given
):
    """The best of score and bias weigh as much as their scores say; so do experts that are given, also twice."""
    x, gate = torch.randn(tokens, size).to(dtype), (torch.randn(experts, size) * 3 / size**0.5).to(dtype)
    bias = torch.randn(experts) * (0.01 if scoring == "softmax" else 0.5)
    score = literal_scores(x.double() @ gate.double().T, scoring)
    given = torch.randint(0, experts, (tokens, k)) if is_given else None
    options = {"normalize": normalize, "scale": scale, "scoring": scoring, "ids": given}
    ids, mix = route(x, gate, None if is_given else bias, k, **options)
    expected_ids = given if is_given else (score + bias.double()).sort(-1, descending=True).indices[:, :k]
    assert ids.dtype == torch.int64 and torch.equal(ids, expected_ids)
    expected = score.gather(-1, ids)
    expected = expected / expected.sum(-1, keepdim=True) if normalize else expected
    assert mix.dtype == torch.float32
    torch.testing.assert_close(mix.double(), expected * scale, rtol=2e-5, atol=1e-9)
    torch.set_num_threads(3)
    again = route(x, gate, None if is_given else bias, k, **options)
    torch.set_num_threads(1)
    if tokens <= 8 and each_kernel_set != "reference":
        assert torch.equal(again[1], mix)
        alone = [
            route(x[m : m + 1], gate, bias, k, **options | {"ids": None if given is None else given[m : m + 1]})
            for m in range(tokens)
        ]
        assert torch.equal(torch.cat([ids for ids, _ in alone]), ids)


SMALL = [-86.0, -30.0, -17.5, -5.0, -1.0, -1e-3, 0.0, 1e-3]
LARGE = [0.5, 2.0, 9.0, 16.5, 17.0, 40.0, 85.0, 500.0]


@SCORINGS
@pytest.mark.parametrize("logits", [SMALL, LARGE], ids=["small", "large"])
def test_scores_of_every_size(scoring, logits):
    """Of an expert beside one whose logit is 0."""
    x, first = torch.tensor(logits)[:, None], torch.zeros(8, 1, dtype=torch.long)
    _, mix = route(x, torch.tensor([[1.0], [0.0]]), None, 1, normalize=False, scoring=scoring, ids=first)
    expected = literal_scores(torch.cat([x, 0 * x], -1).double(), scoring)[:, :1]
    torch.testing.assert_close(mix.double(), expected, rtol=2e-6, atol=1e-37)


@SCORINGS
def test_gradients_are_finite_however_small_a_score(scoring):
    x = torch.tensor([[1.0], [-1.0]], requires_grad=True)
    gate = torch.tensor([[200.0], [-200.0], [1.0], [0.5]], requires_grad=True)
    for ids in (None, torch.tensor([[0, 1], [1, 0]])):
        _, mix = route(x, gate, torch.zeros(4), 2, scoring=scoring, ids=ids)
        mix.square().sum().backward()
    assert x.grad is not None and gate.grad is not None
    assert x.grad.isfinite().all() and gate.grad.isfinite().all()


@SCORINGS
def test_gradients_against_float64(scoring):
    x, gate = torch.randn(5, 6, requires_grad=True), torch.randn(E, 6, requires_grad=True)
    ids, mix = route(x, gate, torch.randn(E), K, scale=2.0, scoring=scoring)
    up = torch.randn(5, K)
    found = torch.autograd.grad((mix * up).sum(), (x, gate))
    x64, gate64 = (t.detach().double().requires_grad_() for t in (x, gate))
    chosen = literal_scores(x64 @ gate64.T, scoring).gather(-1, ids)
    exact = torch.autograd.grad((2 * chosen / chosen.sum(-1, keepdim=True) * up).sum(), (x64, gate64))
    for mine, expected in zip(found, exact, strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_gate_in_float32_keeps_its_digits_beside_bfloat16():
    w = weights()
    half = w["x"].bfloat16()
    ids, mix = route(half, w["gate"], w["bias"], K, scoring="sqrtsoftplus")
    expected, exact = route(half.float(), w["gate"], w["bias"], K, scoring="sqrtsoftplus")
    assert torch.equal(ids, expected) and torch.equal(mix, exact)


@given(st.floats(-5, 5))
def test_a_constant_bias_changes_nothing(constant):
    w = weights()
    ids, mix = route(w["x"], w["gate"], torch.zeros(E), K)
    shifted, same = route(w["x"], w["gate"], torch.full((E,), constant), K)
    assert torch.equal(ids, shifted)
    assert torch.equal(mix, same)


def test_bias_chooses_but_never_weighs():
    w = weights()
    bias = torch.zeros(E)
    bias[5] = 100.0
    ids, mix = route(w["x"], w["gate"], bias, K, scale=3.0)
    assert (ids[:, 0] == 5).all()
    torch.testing.assert_close(mix.sum(-1), torch.full((M,), 3.0))
    every, _ = route(w["x"], w["gate"], bias, E)
    assert (every.sort(-1).values == torch.arange(E)).all()


def test_ties_take_the_lowest_index_and_bfloat16_routes_in_float32():
    ids, _ = route(torch.zeros(2, H), weights()["gate"], torch.zeros(E), 5)
    assert ids.tolist() == [[0, 1, 2, 3, 4]] * 2
    w = weights()
    half = {key: w[key].bfloat16() for key in ("x", "gate")}
    ids, mix = route(half["x"], half["gate"], w["bias"], K)
    expected, exact = route(half["x"].float(), half["gate"].float(), w["bias"], K)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(mix, exact, rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_token_is_routed_alone_as_in_company(native_kernel_set, dtype):
    """Also with many experts, and when a number is no number: the choice is then any, but a choice."""
    g = torch.Generator().manual_seed(1)
    x, gate, bias = torch.randn(8, 200, generator=g), torch.randn(100, 200, generator=g), torch.randn(100, generator=g)
    ids, mix = route(x.to(dtype), gate.to(dtype), bias, 9, 10, 4)
    for m in range(8):
        alone, weights = route(x[m : m + 1].to(dtype), gate.to(dtype), bias, 9, 10, 4)
        assert torch.equal(alone[0], ids[m])
        assert torch.equal(weights[0], mix[m])
    with using("reference"):
        expected, exact = route(x.to(dtype), gate.to(dtype), bias, 9, 10, 4)
    assert torch.equal(ids, expected)
    torch.testing.assert_close(mix, exact, rtol=1e-4, atol=0)
    ids, _ = route(torch.full((2, 200), float("nan")).to(dtype), gate.to(dtype), bias, 9, 10, 4)
    assert all(0 <= i < 100 for i in ids.flatten()) and all(len(row.unique()) == 9 for row in ids)


def test_a_negative_bias_never_opens_a_closed_group():
    gate = torch.zeros(E, H)
    bias = torch.full((E,), -5.0)
    bias[4:6] = -4.0
    ids, _ = route(torch.zeros(1, H), gate, bias, 2, n_group=4, topk_group=1)
    assert ids.tolist() == [[4, 5]]


@pytest.mark.parametrize(("n_group", "topk_group", "k"), [(3, 1, 1), (4, 1, 3), (1, 1, E + 1)])
def test_impossible_groups(n_group, topk_group, k):
    w = weights()
    with pytest.raises(ValueError, match=f"cannot choose {k} of {E} experts"):
        route(w["x"], w["gate"], w["bias"], k, n_group, topk_group)


def test_worked_latent_layer():
    one = torch.ones(1, 1, 1)
    idx, w = torch.zeros(1, 1, dtype=torch.long), torch.full((1, 1), 2.0)
    fc2 = torch.tensor([[1.0], [2.0]])
    arguments = (torch.tensor([[1.0, 2.0]]), torch.ones(1, 2), fc2, one, 0.5 * one, idx, w)
    assert latent_moe(*arguments).tolist() == [[9.0, 18.0]]
    assert latent_moe(*arguments, shared=lambda x: 10 * x).tolist() == [[19.0, 38.0]]
    assert latent_moe(-arguments[0], *arguments[1:]).tolist() == [[0.0, 0.0]]
    assert latent_moe(0 * arguments[0], *arguments[1:]).tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("tokens", [0, 1, M])
def test_against_a_loop_over_tokens(tokens):
    w = weights()
    x = w["x"][:tokens]
    idx, mix = route(x, w["gate"], w["bias"], K)
    out = latent_moe(x, w["fc1"], w["fc2"], w["up"], w["down"], idx, mix, shared=lambda x: 3 * x)
    assert out.shape == (tokens, H)
    for m in range(tokens):
        c = w["fc1"] @ x[m]
        r = sum(mix[m, j] * (w["down"][e] @ relu2(w["up"][e] @ c)) for j, e in enumerate(idx[m]))
        torch.testing.assert_close(out[m], w["fc2"] @ r + 3 * x[m], rtol=1e-4, atol=1e-4)


def test_identity_projections_are_a_plain_mixture():
    w = weights(width=H)
    idx, mix = route(w["x"], w["gate"], w["bias"], K)
    plain = latent_moe(w["x"], None, None, w["up"], w["down"], idx, mix)
    projected = latent_moe(w["x"], torch.eye(H), torch.eye(H), w["up"], w["down"], idx, mix)
    torch.testing.assert_close(projected, plain)
    assert torch.equal(plain, grouped_experts(w["x"], mix, idx, w["up"], w["down"], relu2))


def test_equal_experts_are_one():
    w = weights()
    up, down = w["up"][:1].expand(E, -1, -1), w["down"][:1].expand(E, -1, -1)
    idx, mix = route(w["x"], w["gate"], w["bias"], K, normalize=False)
    one = latent_moe(w["x"], w["fc1"], None, up, down, torch.zeros(M, 1, dtype=torch.long), mix.sum(-1, keepdim=True))
    torch.testing.assert_close(latent_moe(w["x"], w["fc1"], None, up, down, idx, mix), one, rtol=1e-4, atol=1e-4)


def test_only_chosen_experts_are_read_and_order_does_not_matter():
    w = weights()
    idx, mix = torch.full((M, 1), 4), torch.ones(M, 1)
    w["up"][[e for e in range(E) if e != 4]] = float("nan")
    out = latent_moe(w["x"], w["fc1"], w["fc2"], w["up"], w["down"], idx, mix)
    assert torch.isfinite(out).all()
    order = torch.randperm(M)
    permuted = latent_moe(w["x"][order], w["fc1"], w["fc2"], w["up"], w["down"], idx, mix)
    torch.testing.assert_close(permuted, out[order])
