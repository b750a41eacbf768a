"""Routing and experts in every set of kernels against float64 and one expert at a time."""

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional as F

from sparing.kernels import (
    gated_gelu,
    gated_mlp,
    gated_silu,
    grouped_experts,
    parallel_moe,
    relu2,
    rms_norm,
    route_topk,
    squared_mlp,
)
from tests.kernel_sets import using

M, H, E, WIDTH, K = 11, 6, 7, 5, 3
INF = float("inf")


def literal(activation, limit: float, units: Tensor) -> Tensor:
    """Of one or two halves [..., n] of float64."""
    if activation is relu2:
        return units.clamp(min=0) ** 2
    gate, up = units.chunk(2, -1)
    gate, up = torch.where(gate > limit, limit, gate), torch.where(up.abs() > limit, limit * up.sign(), up)
    return (F.gelu(gate, approximate="tanh") if activation is gated_gelu else gate / (1 + (-gate).exp())) * up


def weights(seed=0):
    g = torch.Generator().manual_seed(seed)
    return {
        "r": torch.randn(M, H, generator=g),
        "scale": 0.9 + 0.3 * torch.randn(H, generator=g),
        "proj": torch.randn(E, H, generator=g),
        "per_expert_scale": 0.9 + 0.3 * torch.randn(E, generator=g),
        "gate_up": torch.randn(E, 2 * WIDTH, H, generator=g),
        "down": torch.randn(E, H, WIDTH, generator=g),
    }


def expert(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    gate, up = gate_up[:WIDTH] @ x, gate_up[WIDTH:] @ x
    return down @ (F.gelu(gate, approximate="tanh") * up)


def test_worked_routing():
    r, one = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.ones(4)
    z = rms_norm(r) * 4**-0.5
    torch.testing.assert_close(z, torch.tensor([[0.1826, 0.3651, 0.5477, 0.7303]]), rtol=0, atol=5e-5)
    chosen, ids = route_topk(r, one, torch.diag(torch.tensor([1.0, 1.0, 2.0, -1.0])), one, 2)
    assert ids.tolist() == [[2, 1]]
    torch.testing.assert_close(chosen, torch.tensor([[0.6749, 0.3251]]), rtol=0, atol=5e-5)


@pytest.mark.parametrize("k", [1, K, E])
def test_routing_against_float64(k):
    w = weights()
    chosen, ids = route_topk(w["r"], w["scale"], w["proj"], w["per_expert_scale"], k)
    assert chosen.dtype == torch.float32
    r = w["r"].double()
    z = r / (r.square().mean(-1, keepdim=True) + 1e-6).sqrt() * w["scale"].double() / H**0.5
    probability = torch.softmax(z @ w["proj"].double().T, -1)
    for m in range(M):
        best = probability[m].argsort(descending=True)[:k]
        assert ids[m].tolist() == best.tolist()
        expected = probability[m, best] / probability[m, best].sum() * w["per_expert_scale"][best].double()
        torch.testing.assert_close(chosen[m].double(), expected, rtol=1e-5, atol=1e-6)


@given(st.floats(0.3, 300))
def test_routing_ignores_the_size_of_the_stream(c):
    w = weights()
    expected, ids = route_topk(w["r"], w["scale"], w["proj"], w["per_expert_scale"], K)
    scaled, scaled_ids = route_topk(c * w["r"], w["scale"], w["proj"], w["per_expert_scale"], K)
    assert torch.equal(ids, scaled_ids)
    torch.testing.assert_close(scaled, expected, rtol=1e-3, atol=1e-4)


def test_weights_sum_to_one_without_expert_scales():
    w = weights()
    chosen, _ = route_topk(w["r"], w["scale"], w["proj"], torch.ones(E), K)
    torch.testing.assert_close(chosen.sum(-1), torch.ones(M))


@pytest.mark.parametrize("tokens", [1, 2, M])
def test_grouped_experts_against_one_expert_at_a_time(tokens):
    w = weights()
    x = w["r"][:tokens]
    mix, ids = route_topk(x, w["scale"], w["proj"], w["per_expert_scale"], K)
    out = grouped_experts(x, mix, ids, w["gate_up"], w["down"])
    for m in range(tokens):
        parts = [expert(x[m], w["gate_up"][e], w["down"][e]) for e in ids[m]]
        expected = sum(weight * part for weight, part in zip(mix[m], parts, strict=True))
        torch.testing.assert_close(out[m], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("activation", "limit"), [(relu2, INF), (gated_gelu, INF), (gated_gelu, 0.4), (gated_silu, INF), (gated_silu, 0.4)]
)
@pytest.mark.parametrize(("size", "width"), [(6, 5), (96, 130)])
@pytest.mark.parametrize("tokens", [1, 3, 8])
def test_few_tokens_against_float64(native_kernel_set, dtype, activation, limit, size, width, tokens):
    """Hidden units are rounded once, for the second product, and the sum of all choices once."""
    rows = width * (1 if activation is relu2 else 2)
    x = torch.randn(tokens, size).to(dtype)
    up, down = torch.randn(E, rows, size) / size**0.5, torch.randn(E, size, width) / width**0.5
    up, down = up.to(dtype), down.to(dtype)
    mix, ids = torch.rand(tokens, K), torch.stack([torch.randperm(E)[:K] for _ in range(tokens)])
    out = grouped_experts(x, mix, ids, up, down, activation, limit)
    exact = torch.zeros(tokens, size, dtype=torch.float64)
    for m in range(tokens):
        for weight, e in zip(mix[m].double(), ids[m], strict=True):
            exact[m] += weight * (down[e].double() @ literal(activation, limit, up[e].double() @ x[m].double()))
    assert out.dtype == dtype
    tolerance = 2e-6 if dtype == torch.float32 else 1.5e-2
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance)
    one_by_one = [(x[m : m + 1], mix[m : m + 1], ids[m : m + 1], up, down, activation, limit) for m in range(tokens)]
    assert torch.equal(torch.cat([grouped_experts(*one) for one in one_by_one]), out)
    torch.set_num_threads(3)
    assert torch.equal(grouped_experts(x, mix, ids, up, down, activation, limit), out)
    torch.set_num_threads(1)
    with using("reference"):
        reference = grouped_experts(x, mix, ids, up, down, activation, limit)
    torch.testing.assert_close(out, reference, rtol=tolerance * 3, atol=tolerance * 3)


def test_a_gate_is_cut_off_above_and_its_factor_on_both_sides():
    """Worked: gates -9 and 9, factors 9 and -9, at 2: silu(-9) 2 and silu(2) (-2)."""
    one, ids, w = torch.eye(2), torch.zeros(1, 1, dtype=torch.long), torch.ones(1, 1)
    up = torch.cat([torch.diag(torch.tensor([-9.0, 9.0])), torch.diag(torch.tensor([9.0, -9.0]))])
    out = grouped_experts(torch.ones(1, 2), w, ids, up[None], one[None], gated_silu, 2.0)
    expected = torch.tensor([[-9 / (1 + math.exp(9)) * 2, 2 / (1 + math.exp(-2)) * -2]])
    torch.testing.assert_close(out, expected)
    torch.testing.assert_close(gated_mlp(torch.ones(1, 2), up[:2], up[2:], one, "silu", 2.0), expected)


@pytest.mark.parametrize("limit", [INF, 0.7])
def test_gradients_of_gated_experts(limit):
    """Where a unit is cut off nothing flows."""
    x, mix, ids = (
        torch.randn(4, 6, requires_grad=True),
        torch.rand(4, 2, requires_grad=True),
        torch.randint(0, 3, (4, 2)),
    )
    up, down = torch.randn(3, 10, 6, requires_grad=True), torch.randn(3, 6, 5, requires_grad=True)
    given, back = (x, mix, up, down), torch.randn(4, 6)
    found = torch.autograd.grad((grouped_experts(x, mix, ids, up, down, gated_silu, limit) * back).sum(), given)
    x64, mix64, up64, down64 = exact = [t.detach().double().requires_grad_() for t in given]
    total = 0.0
    for m, j in itertools.product(range(4), range(2)):
        hidden = literal(gated_silu, limit, up64[ids[m, j]] @ x64[m])
        total = total + (mix64[m, j] * (down64[ids[m, j]] @ hidden) * back[m].double()).sum()
    for mine, expected in zip(found, torch.autograd.grad(total, exact), strict=True):
        torch.testing.assert_close(mine.double(), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 8, 9, 40])
@pytest.mark.parametrize(("activation", "limit"), [("silu", INF), ("silu", 0.6), ("gelu", 0.6)])
@pytest.mark.parametrize("has_biases", [False, True])
def test_the_gated_mlp(native_kernel_set, dtype, tokens, activation, limit, has_biases):
    x, gate, up, down = (torch.randn(shape).to(dtype) for shape in ((tokens, 64), (70, 64), (70, 64), (64, 70)))
    x, sizes = x / 8, (70, 70, 64)
    biases = tuple(torch.randn(n).to(dtype) if has_biases else None for n in sizes)
    out = gated_mlp(x, gate, up, down, activation, limit, biases)
    halves = [
        F.linear(x.double(), w.double(), None if b is None else b.double())
        for w, b in zip((gate, up), biases[:2], strict=True)
    ]
    hidden = literal(gated_silu if activation == "silu" else gated_gelu, limit, torch.cat(halves, -1))
    exact = F.linear(hidden, down.double(), None if biases[2] is None else biases[2].double())
    assert out.dtype == dtype and (limit == INF or (tokens and (halves[0] > limit).any()) or not tokens)
    tolerance = 2e-6 if dtype == torch.float32 else 1.5e-2
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance * 10)


def test_a_limit_has_to_make_sense():
    x, mix, ids = torch.ones(1, 2), torch.ones(1, 1), torch.zeros(1, 1, dtype=torch.long)
    with pytest.raises(ValueError, match=r"limit is 2.0, and relu2 has none: use gated_gelu or gated_silu"):
        grouped_experts(x, mix, ids, torch.ones(1, 3, 2), torch.ones(1, 2, 3), relu2, 2.0)
    for limit in (0.0, -1.0, float("nan")):
        with pytest.raises(ValueError, match=f"limit is {limit}, expected a positive number"):
            grouped_experts(x, mix, ids, torch.ones(1, 6, 2), torch.ones(1, 2, 3), gated_silu, limit)
        with pytest.raises(ValueError, match=f"limit is {limit}, expected a positive number"):
            gated_mlp(x, torch.ones(3, 2), torch.ones(3, 2), torch.ones(2, 3), "silu", limit)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tokens", [0, 1, 8, 9])
@pytest.mark.parametrize("has_biases", [False, True])
def test_the_expert_that_sees_every_token(native_kernel_set, dtype, tokens, has_biases):
    x, up, down = (torch.randn(shape).to(dtype) for shape in ((tokens, 40), (70, 40), (40, 70)))
    biases = (torch.randn(70).to(dtype), torch.randn(40).to(dtype)) if has_biases else (None, None)
    out = squared_mlp(x, up, down, biases)
    hidden = F.linear(x.double(), up.double(), None if biases[0] is None else biases[0].double())
    exact = F.linear(hidden.relu().square(), down.double(), None if biases[1] is None else biases[1].double())
    tolerance = 1e-5 if dtype == torch.float32 else 1.5e-2
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), exact, rtol=tolerance, atol=tolerance * 300)


def test_identical_experts_are_one_expert():
    w = weights()
    gate_up, down = w["gate_up"][:1].expand(E, -1, -1), w["down"][:1].expand(E, -1, -1)
    mix, ids = route_topk(w["r"], w["scale"], w["proj"], torch.ones(E), K)
    expected = torch.stack([expert(x, gate_up[0], down[0]) for x in w["r"]])
    torch.testing.assert_close(grouped_experts(w["r"], mix, ids, gate_up, down), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("tokens", [2, M])
def test_only_chosen_experts_are_touched(tokens):
    w = weights()
    mix, ids = torch.ones(tokens, 1), torch.full((tokens, 1), 4)
    w["gate_up"][[e for e in range(E) if e != 4]] = float("nan")
    assert torch.isfinite(grouped_experts(w["r"][:tokens], mix, ids, w["gate_up"], w["down"])).all()


def test_branches_are_normed_apart_and_both_read_the_stream():
    w = weights()
    dense = torch.randn(M, H)
    norms = tuple(0.9 + 0.3 * torch.randn(H) for _ in range(3))
    router = (w["scale"], w["proj"], w["per_expert_scale"])
    out = parallel_moe(w["r"], dense=dense, router=router, k=K, gate_up=w["gate_up"], down=w["down"], norms=norms)
    mix, ids = route_topk(w["r"], *router, K)
    experts = grouped_experts(rms_norm(w["r"], norms[1]), mix, ids, w["gate_up"], w["down"])
    torch.testing.assert_close(out, rms_norm(dense, norms[0]) + rms_norm(experts, norms[2]))
    # The experts' gain cancels in their norm: scaling every output projection changes nothing.
    louder = parallel_moe(
        w["r"], dense=dense, router=router, k=K, gate_up=w["gate_up"], down=30 * w["down"], norms=norms
    )
    torch.testing.assert_close(louder, out, rtol=1e-3, atol=1e-4)
