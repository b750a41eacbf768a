"""Attention in every set of kernels against float64, and what it depends on."""

from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparing.kernels import apply_rope, attention, proportional_inv_freq, qk_norm_attention, rms_norm
from tests.kernel_sets import using

attention_module = import_module("sparing.kernels.attention")  # the package gives its name to the function


def literal(q: Tensor, k: Tensor, v: Tensor, scale: float, visible: Tensor) -> Tensor:
    """q [T, N, d], k and v [G, S, d], visible [T, S], one query and head at a time in float64."""
    tokens, heads, _ = q.shape
    output = torch.zeros(tokens, heads, v.shape[-1], dtype=torch.float64)
    for t in range(tokens):
        for head in range(heads):
            group = head // (heads // k.shape[0])
            seen = visible[t].nonzero()[:, 0]
            scores = (k[group, seen].double() @ q[t, head].double()) * scale
            output[t, head] = torch.softmax(scores, 0) @ v[group, seen].double()
    return output


def visible_keys(tokens: int, keys: int, causal: bool, window: int | None) -> Tensor:
    query = torch.arange(keys - tokens, keys)[:, None]
    key = torch.arange(keys)
    if not causal:
        return torch.ones(tokens, keys, dtype=torch.bool)
    return (key <= query) & (key > query - (window or keys + 1))


@pytest.mark.parametrize("block", [256, 3])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
@pytest.mark.parametrize(("tokens", "keys"), [(1, 1), (1, 9), (7, 7), (5, 12), (8, 8)])
@pytest.mark.parametrize(
    ("causal", "window"), [(True, None), (True, 1), (True, 2), (True, 5), (True, 99), (False, None)]
)
def test_blocks_of_queries_against_float64(block, heads, kv_heads, tokens, keys, causal, window, monkeypatch):
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", block)
    q, k, v = torch.randn(tokens, heads, 6), torch.randn(kv_heads, keys, 6), torch.randn(kv_heads, keys, 6)
    with using("reference"):
        out = attention(q, k, v, scale=0.4, causal=causal, window=window)
    expected = literal(q, k, v, 0.4, visible_keys(tokens, keys, causal, window))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


# tokens, heads, kv_heads, keys, d, dv: one tile and many, several stretches, sizes with and without a rest
FEW_QUERIES = [
    (1, 8, 2, 1, 64, 64),
    (1, 8, 2, 700, 128, 128),
    (3, 8, 2, 1300, 80, 80),
    (2, 3, 3, 65, 72, 40),
    (1, 7, 1, 333, 256, 256),
    (4, 4, 4, 600, 512, 96),
    (5, 3, 1, 64, 8, 13),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "heads", "kv_heads", "keys", "d", "dv"), FEW_QUERIES)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (True, 1), (True, 100), (False, None)])
def test_few_queries_against_float64(native_kernel_set, dtype, tokens, heads, kv_heads, keys, d, dv, causal, window):
    assert tokens * heads // kv_heads <= attention_module.NATIVE_ROWS
    q, k, v = torch.randn(tokens, heads, d), torch.randn(kv_heads, keys, d), torch.randn(kv_heads, keys, dv)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out = attention(q, k, v, scale=2 * d**-0.5, causal=causal, window=window)
    assert out.dtype == dtype
    expected = literal(q, k, v, 2 * d**-0.5, visible_keys(tokens, keys, causal, window))
    error = (out.double() - expected).norm() / expected.norm()
    assert error < (2e-6 if dtype == torch.float32 else 2.5e-3)


def test_few_queries_however_they_lie(native_kernel_set):
    """Views into longer buffers, heads that are columns, a batch dimension: all as if they were contiguous."""
    q, keys, values = torch.randn(2, 3, 4, 16), torch.randn(2, 50, 16), torch.randn(2, 50, 24)
    k, v = keys[:, 9:31], values[:, 9:31]
    expected = attention(q[1].contiguous(), k.contiguous(), v.contiguous(), window=7)
    assert torch.equal(attention(q[1], k, v, window=7), expected)
    assert torch.equal(attention(q[1].mT.contiguous().mT, k.mT.contiguous().mT, v, window=7), expected)
    torch.testing.assert_close(attention(q, k.expand(2, -1, -1, -1), v.expand(2, -1, -1, -1), window=7)[1], expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_few_queries_of_extreme_scores(native_kernel_set, dtype):
    """One key with all the weight gives exactly its value; equal values give that value; NaN is not lost."""
    q = torch.zeros(1, 2, 32, dtype=dtype)
    q[..., 0] = 100.0
    k, v = torch.randn(1, 700, 32).to(dtype), torch.randn(1, 700, 32).to(dtype)
    k[:, 345] = 0
    k[:, 345, 0] = 1000.0
    assert torch.equal(attention(q, k, v)[0, 1], v[0, 345])
    v[:] = v[:, :1].clone()
    torch.testing.assert_close(attention(q, k * 0.01, v)[0, 0], v[0, 0])
    k[:, 600, 0] = float("nan")
    assert attention(q, k, v).isnan().all()


def test_threads_change_nothing(native_kernel_set):
    q, k, v = torch.randn(1, 4, 64), torch.randn(2, 3000, 64), torch.randn(2, 3000, 64)
    threads = torch.get_num_threads()
    alone = attention(q, k, v)
    torch.set_num_threads(3)
    try:
        assert all(torch.equal(attention(q, k, v), alone) for _ in range(20))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("block", [256, 2])
def test_explicit_mask_and_batch(block, monkeypatch):
    monkeypatch.setattr(attention_module, "QUERY_BLOCK", block)
    q, k, v = torch.randn(3, 5, 4, 6), torch.randn(3, 2, 8, 6), torch.randn(3, 2, 8, 6)
    mask = torch.rand(3, 5, 8) < 0.5
    mask[..., 0] = True  # every query sees something
    out = attention(q, k, v, mask=mask)
    for b in range(3):
        expected = literal(q[b], k[b], v[b], 1.0, mask[b])
        torch.testing.assert_close(out[b].double(), expected, rtol=1e-5, atol=1e-5)
    shared = attention(q, k, v, mask=mask[0])
    torch.testing.assert_close(shared[0], out[0])


def test_softmax_is_float32_in_bfloat16():
    """No worse than a float64 softmax between products in bfloat16."""
    q, k, v = (torch.randn(shape).bfloat16() for shape in ((9, 4, 16), (2, 9, 16), (2, 9, 16)))
    out = attention(q, k, v, scale=0.25)
    assert out.dtype == torch.bfloat16
    expected = literal(q, k, v, 0.25, visible_keys(9, 9, True, None))
    assert (out.double() - expected).abs().max() < 3e-2


# The practice problem: raw projections in, both norms and the rotation inside.
B, T, N, G, D = 2, 9, 4, 2, 8
INV_FREQ = proportional_inv_freq(D, 100.0, 0.5)


def raw(seed=0):
    g = torch.Generator().manual_seed(seed)
    return (
        torch.randn(B, T, N, D, generator=g),
        torch.randn(B, T, G, D, generator=g),
        torch.randn(B, T, G, D, generator=g),
        0.9 + 0.3 * torch.randn(D, generator=g),
        0.9 + 0.3 * torch.randn(D, generator=g),
    )


@pytest.mark.parametrize(("window", "scale"), [(None, 1.0), (3, 0.5)])
@pytest.mark.parametrize("queries", [T, 4, 1])
def test_qk_norm_attention_against_float64(window, scale, queries):
    q, k0, v0, q_weight, k_weight = raw()
    q = q[:, -queries:]
    positions = torch.arange(20, 20 + T)
    out = qk_norm_attention(q, k0, v0, q_weight, k_weight, positions, INV_FREQ, window, scale)

    def norm(x, weight):
        x = x.double()
        return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt() * weight

    def turned(x, at):
        pairs = torch.complex(x[..., : D // 2], x[..., D // 2 :])
        angle = at.double()[:, None, None] * INV_FREQ.double()
        pairs = pairs * torch.polar(torch.ones_like(angle), angle)
        return torch.cat([pairs.real, pairs.imag], -1)

    for b in range(B):
        queries_b = turned(norm(q[b], q_weight), positions[-queries:])
        keys_b = turned(norm(k0[b], k_weight), positions).transpose(0, 1)
        values_b = norm(v0[b], 1.0).transpose(0, 1)
        expected = literal(queries_b, keys_b, values_b, scale, visible_keys(queries, T, True, window))
        torch.testing.assert_close(out[b].double(), expected, rtol=1e-4, atol=1e-4)


@given(st.floats(0.2, 50), st.floats(0.2, 50), st.floats(0.2, 50))
def test_scaling_raw_projections_changes_nothing(a, b, c):
    q, k0, v0, q_weight, k_weight = raw()
    expected = qk_norm_attention(q, k0, v0, q_weight, k_weight, torch.arange(T), INV_FREQ)
    out = qk_norm_attention(a * q, b * k0, c * v0, q_weight, k_weight, torch.arange(T), INV_FREQ)
    torch.testing.assert_close(out, expected, rtol=1e-3, atol=1e-3)


def test_scores_and_outputs_are_bounded():
    q, k0, v0, q_weight, k_weight = raw()
    queries, keys = rms_norm(q, q_weight), rms_norm(k0, k_weight)
    queries, keys = (apply_rope(x, torch.arange(T).expand(B, T), INV_FREQ) for x in (queries, keys))
    scores = torch.einsum("btnd,bsgd->btnsg", queries, keys)
    assert scores.abs().max() <= D * q_weight.abs().max() * k_weight.abs().max()
    out = qk_norm_attention(q, k0, v0, q_weight, k_weight, torch.arange(T), INV_FREQ)
    assert (out.square().mean(-1).sqrt() <= 1 + 1e-6).all()


@pytest.mark.parametrize("window", [1, 2, 4, T + 3])
def test_a_row_depends_on_exactly_the_keys_of_its_window(window):
    q, k0, v0, q_weight, k_weight = raw()

    def run(keys, values):
        return qk_norm_attention(q, keys, values, q_weight, k_weight, torch.arange(T), INV_FREQ, window)

    base, depends = run(k0, v0), torch.zeros(T, T, dtype=torch.bool)
    for j in range(T):
        keys, values = k0.clone(), v0.clone()
        keys[:, j] += 1
        values[:, j] -= 1
        depends[:, j] = ((run(keys, values) - base).abs().amax((0, 2, 3))) > 0
    assert torch.equal(depends, visible_keys(T, T, True, window))
    assert depends.sum(1).tolist() == [min(i + 1, window) for i in range(T)]


def test_keys_follow_from_values_when_they_share_a_projection():
    _, k0, _, _, k_weight = raw()
    positions = torch.arange(T).expand(B, T)
    keys = apply_rope(rms_norm(k0, k_weight), positions, INV_FREQ)
    values = rms_norm(k0)
    assert torch.equal(keys, apply_rope(k_weight * values, positions, INV_FREQ))
