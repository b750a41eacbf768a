"""Keys made from values as attention reads them, against the same keys made before."""

import gc
from importlib import import_module

import pytest
import torch

from sparing.config.rope import RopeParameters
from sparing.kernels import KeysFromValues, apply_rope, attention, attention_over_values, inverse_frequencies
from sparing.kernels.rope import RotationTable, _tables

attention_module = import_module("sparing.kernels.attention")  # the package gives its name to the function

# tokens, heads, kv_heads, keys, head size, share of pairs that turn
SHAPES = [
    (1, 8, 2, 1, 64, 0.25),
    (1, 16, 2, 1100, 64, 0.25),
    (2, 3, 3, 65, 72, 0.5),
    (1, 4, 4, 600, 512, 0.25),
    (5, 3, 1, 130, 10, 0.7),
    (1, 4, 2, 70, 24, 1.0),
    (3, 2, 1, 66, 16, 0.0),
    (40, 8, 2, 150, 40, 0.3),  # several blocks of queries
    (33, 8, 1, 33, 72, 0.5),
]
MASKS = [(True, None), (True, 40), (False, None)]


def draw(shape, dtype, scattered):
    tokens, heads, kv_heads, keys, d, share = shape
    generator = torch.Generator().manual_seed(keys)
    weight = (0.5 + torch.rand(d, generator=generator)).to(dtype)
    rope = RopeParameters("proportional", 1e4, share)
    q = torch.randn(tokens, heads, d, generator=generator).to(dtype)
    v = torch.randn(kv_heads, 3 + keys, d, generator=generator).to(dtype)[:, 3:]  # a view, as of a buffer
    where = 17
    positions = torch.arange(17, 17 + keys).expand(kv_heads, keys)
    if scattered:
        steps = torch.randint(1, 9, (kv_heads, keys), generator=generator)
        where = positions = steps.cumsum(1)
    return q, v, KeysFromValues(weight, rope), where, positions


@pytest.mark.parametrize("scattered", [False, True])
@pytest.mark.parametrize(("causal", "window"), MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_float32_is_that_of_stored_keys_bit_for_bit(each_kernel_set, shape, causal, window, scattered, monkeypatch):
    q, v, keys, where, positions = draw(shape, torch.float32, scattered)
    found = attention_over_values(q, v, keys, where, scale=0.3, causal=causal, window=window)
    k = keys(v, positions)
    monkeypatch.setattr(attention_module, "NATIVE_ROWS", 10**9)  # the native kernel wherever there is one
    assert torch.equal(found, attention(q, k, v, scale=0.3, causal=causal, window=window))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("causal", "window"), MASKS)
@pytest.mark.parametrize("shape", SHAPES)
def test_against_float64(native_kernel_set, shape, causal, window, dtype):
    q, v, keys, where, positions = draw(shape, dtype, scattered=False)
    scale = 2 * q.shape[-1] ** -0.5
    found = attention_over_values(q, v, keys, where, scale=scale, causal=causal, window=window)
    assert found.dtype == dtype
    tokens, heads, kv_heads, n = len(q), q.shape[1], *v.shape[:2]
    inv_freq, _ = inverse_frequencies(keys.rope, q.shape[-1])
    k = apply_rope((v.double() * keys.weight.double())[..., None, :], positions, inv_freq.double()).squeeze(-2)
    query, key = torch.arange(n - tokens, n)[:, None], torch.arange(n)
    visible = (key <= query) & (key > query - (window or n + 1)) if causal else torch.ones(tokens, n, dtype=torch.bool)
    scores = torch.einsum("tgrd,gsd->tgrs", q.double().unflatten(1, (kv_heads, -1)), k) * scale
    weights = scores.masked_fill(~visible[:, None, None], float("-inf")).softmax(-1)
    expected = torch.einsum("tgrs,gsd->tgrd", weights, v.double()).reshape(tokens, heads, -1)
    error = (found.double() - expected).norm() / expected.norm()
    assert error < (2e-5 if dtype == torch.float32 else 8e-3)  # the angles, up to 1,117, are float32


def test_threads_change_nothing(native_kernel_set):
    for shape in ((1, 4, 2, 3000, 64, 0.25), (64, 4, 2, 200, 64, 0.25)):
        q, v, keys, where, _ = draw(shape, torch.float32, scattered=False)
        alone, threads = attention_over_values(q, v, keys, where), torch.get_num_threads()
        torch.set_num_threads(3)
        try:
            assert all(torch.equal(attention_over_values(q, v, keys, where), alone) for _ in range(10))
        finally:
            torch.set_num_threads(threads)


def test_keys_are_the_norm_s_weight_and_the_rotation():
    _, v, keys, _, positions = draw((1, 4, 2, 9, 24, 0.5), torch.float32, scattered=True)
    inv_freq, _ = inverse_frequencies(keys.rope, 24)
    expected = apply_rope((v * keys.weight)[..., None, :], positions, inv_freq).squeeze(-2)
    assert torch.equal(keys(v, positions), expected)


def test_a_table_is_the_same_however_it_grew_and_is_shared():
    inv_freq = torch.tensor([1.0, 0.3, 0.01])
    grown, at_once = RotationTable(inv_freq, torch.float32), RotationTable(inv_freq, torch.float32)
    for n in (1, 5, 64, 65, 700):
        assert len(grown.upto(n)) >= n
    assert torch.equal(grown.upto(700)[:700], at_once.upto(700)[:700])
    rope = RopeParameters("proportional", 12345.0, 0.5)
    one, other = KeysFromValues(torch.ones(16), rope), KeysFromValues(torch.zeros(16), rope)
    assert one.table(10, torch.float32) is other.table(10, torch.float32)
    assert any(rope in key for key in _tables)
    del one, other
    gc.collect()
    assert not any(rope in key for key in _tables)
