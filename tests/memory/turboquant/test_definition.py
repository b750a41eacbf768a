"""The quantisers against worked numbers, exact identities and their known statistics."""

import math

import numpy as np
import pytest
import torch

from sparing.memory.turboquant.codebook import Codebook, lloyd_max_codebook
from sparing.memory.turboquant.definition import (
    SCALES,
    qjl_inner_product,
    qjl_sketch,
    sphere_codebook,
    tq_attention,
    tq_dequantize,
    tq_prod_inner_product,
    tq_prod_quantize,
    tq_quantize,
)
from sparing.memory.turboquant.rotation import make_rotation, random_rotation

ROTATION = 0.5 * torch.tensor([[1, -1, 1, 1], [1, 1, 1, -1], [1, -1, -1, -1], [1, 1, -1, 1]], dtype=torch.float64)
SKETCH = torch.tensor([[1, 0.5, -0.5, 2], [0, -1, 1, 1], [1.5, 1, 0, -1], [-2, 0.5, 1, 0]], dtype=torch.float64)
X = torch.tensor([2, -1, 0.5, 1.5], dtype=torch.float64)


def close(actual, expected, tolerance=1e-9):
    torch.testing.assert_close(actual.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("mode", "factor", "error"),
    [
        ("norm", 1.0, 0.12760554605),
        ("renorm", 1.2917399053, 0.0989436172),
        ("lsq", 1.2278351959, 0.0964961574),
        ("unbiased", 1.3589706408, 0.1068021550),
    ],
)
def test_the_worked_example(mode, factor, error):
    codes, scale = tq_quantize(X, ROTATION, 2, scale=mode)
    assert codes.tolist() == [3, 2, 2, 2]  # the second coordinate is exactly 0 and goes up
    close(scale, 2.7386127875 * factor, 1e-8)
    decoded = tq_dequantize(codes, scale, ROTATION, lloyd_max_codebook(4, 2))
    close(decoded, [factor * v for v in (1.8249493896, -0.6229947484, 0.6229947484, 0.6229947484)], 1e-8)
    close((X - decoded).square().sum() / X.square().sum(), error, 1e-9)


def test_what_the_scales_make_exact():
    x = torch.randn(50, 24, dtype=torch.float64)
    rotation = random_rotation(24, 1)
    decoded = {}
    for mode in SCALES:
        codes, scale = tq_quantize(x, rotation, 3, scale=mode)
        decoded[mode] = tq_dequantize(codes, scale, rotation, lloyd_max_codebook(24, 3))
        if mode == "norm":
            torch.testing.assert_close(scale, x.norm(dim=-1))
    torch.testing.assert_close((decoded["unbiased"] * x).sum(-1), (x * x).sum(-1))
    torch.testing.assert_close(decoded["renorm"].norm(dim=-1), x.norm(dim=-1))
    errors = {mode: (x - y).square().sum(-1) for mode, y in decoded.items()}
    assert all((errors["lsq"] <= error + 1e-12).all() for error in errors.values())
    torch.testing.assert_close(((x - decoded["lsq"]) * decoded["lsq"]).sum(-1), torch.zeros(50, dtype=torch.float64))


@pytest.mark.parametrize("mode", SCALES)
def test_codes_depend_on_the_direction_alone(mode):
    x = torch.randn(3, 5, 32)
    rotation = make_rotation("rht", 32, 0).matrix
    codes, scale = tq_quantize(x, rotation, 4, scale=mode)
    assert codes.shape == (3, 5, 32) and codes.dtype == torch.uint8 and scale.shape == (3, 5)
    again, four_times = tq_quantize(4 * x, rotation, 4, scale=mode)
    assert torch.equal(again, codes)
    torch.testing.assert_close(four_times, 4 * scale)


@pytest.mark.parametrize("mode", SCALES)
@pytest.mark.parametrize("bits", [1, 4, 8])
def test_zero_one_hot_and_constant_vectors(mode, bits):
    d = 64
    rotation = make_rotation("rht", d, 0).matrix
    x = torch.stack([torch.zeros(d), torch.eye(d)[5] * 3, torch.ones(d)])
    codes, scale = tq_quantize(x, rotation, bits, scale=mode)
    decoded = tq_dequantize(codes, scale, rotation, lloyd_max_codebook(d, bits))
    assert scale[0] == 0 and (codes[0] == 0).all() and (decoded[0] == 0).all()
    assert torch.isfinite(decoded).all()
    if mode != "norm":  # all coordinates of a rotated one-hot vector are +-1/sqrt(d): the scale makes it exact
        torch.testing.assert_close(decoded[1], x[1], rtol=0, atol=1e-5)


@pytest.mark.parametrize("bits", [1, 2, 3, 4, 8])
def test_distortion_is_that_of_the_codebook(bits):
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((4000, 128)))
    rotation = random_rotation(128, 3)
    codes, scale = tq_quantize(x, rotation, bits)
    decoded = tq_dequantize(codes, scale, rotation, lloyd_max_codebook(128, bits))
    relative = ((x - decoded).square().sum(-1) / x.square().sum(-1)).mean().item()
    assert relative == pytest.approx(128 * lloyd_max_codebook(128, bits)[2], rel=0.03)
    assert 4.0**-bits <= relative <= math.sqrt(3) * math.pi / 2 * 4.0**-bits


def test_unbiased_inner_products_and_the_price_of_the_sketch():
    """At 3 bits the sketch has 5.4 times the variance of the unbiased scale; the plain norm shrinks every product."""
    draw = np.random.default_rng(1).standard_normal
    x = torch.from_numpy(draw((4000, 128)))
    x /= x.norm(dim=-1, keepdim=True)
    y = torch.from_numpy(draw((4000, 128)))
    y -= (y * x).sum(-1, keepdim=True) * x
    y = 0.7 * x + math.sqrt(1 - 0.49) * y / y.norm(dim=-1, keepdim=True)  # unit, at an angle of cosine 0.7
    rotation, book = random_rotation(128, 5), lloyd_max_codebook(128, 3)
    for mode, bias in (("unbiased", 0.0), ("norm", -128 * book[2])):
        codes, scale = tq_quantize(x, rotation, 3, scale=mode)
        error = (y * tq_dequantize(codes, scale, rotation, book)).sum(-1) - 0.7
        deviation = 4 * (error.std() / 4000**0.5).item()
        assert error.mean().item() == pytest.approx(0.7 * bias, abs=deviation)
    far = torch.from_numpy(draw((4000, 128)))
    far /= far.norm(dim=-1, keepdim=True)
    codes, scale = tq_quantize(x, rotation, 3, scale="unbiased")
    plain = (far * (tq_dequantize(codes, scale, rotation, book) - x)).sum(-1)
    S = torch.from_numpy(draw((128, 128)))
    sketched = tq_prod_inner_product(far, *tq_prod_quantize(x, rotation, S, 3), rotation, S, 3) - (far * x).sum(-1)
    assert (sketched.var() / plain.var()).item() == pytest.approx(5.4, abs=0.5)
    assert abs(sketched.mean()) < 4 * sketched.std() / 4000**0.5


def test_the_sketch_of_the_worked_example():
    codes, signs, norm, residual = tq_prod_quantize(X, ROTATION, SKETCH, 2)
    assert codes.tolist() == [1, 1, 1, 1] and signs.tolist() == [1, 1, -1, 1] and signs.dtype == torch.int8
    close(norm, 2.7386127875)
    close(residual, 0.6933368139)
    y = torch.tensor([1, 0, -1, 2], dtype=torch.float64)
    close(tq_prod_inner_product(y, codes, signs, norm, residual, ROTATION, SKETCH, 2), 4.7043758843)
    decoded = [
        tq_prod_inner_product(unit, codes, signs, norm, residual, ROTATION, SKETCH, 2).item()
        for unit in torch.eye(4, dtype=torch.float64)
    ]
    assert decoded == pytest.approx([0.8372510127, -0.5949422879, 0.8924134319, 2.3797691518], abs=1e-9)
    assert (y @ torch.tensor(decoded, dtype=torch.float64)).item() == pytest.approx(4.7043758843, abs=1e-9)


def test_one_bit_is_the_sketch_alone():
    x, y = torch.randn(2, 6, 4, dtype=torch.float64)
    codes, signs, norm, residual = tq_prod_quantize(x, ROTATION, SKETCH, 1)
    assert (codes == 0).all()
    torch.testing.assert_close(residual, torch.ones(6, dtype=torch.float64))
    torch.testing.assert_close(
        tq_prod_inner_product(y, codes, signs, norm, residual, ROTATION, SKETCH, 1),
        qjl_inner_product(y, qjl_sketch(x, SKETCH), x.norm(dim=-1), SKETCH),
    )


def test_the_sketch_is_exact_on_average():
    """Gaussian: the variance is ((pi / 2) |y|^2 |r|^2 - <y, r>^2) / m. Orthonormal rows need another factor."""
    draw = np.random.default_rng(2).standard_normal
    r, y = torch.from_numpy(draw((2, 32)))
    trials = 3000
    gaussian = torch.from_numpy(draw((trials, 16, 32)))
    estimates = torch.stack([qjl_inner_product(y, qjl_sketch(r, S), r.norm(), S) for S in gaussian])
    variance = (math.pi / 2 * y.dot(y) * r.dot(r) - y.dot(r) ** 2) / 16
    assert estimates.mean().item() == pytest.approx(y.dot(r).item(), abs=4 * (variance / trials).sqrt().item())
    assert estimates.var().item() == pytest.approx(variance.item(), rel=0.12)
    rows = [random_rotation(32, seed) for seed in range(trials // 4)]
    estimates = torch.stack([qjl_inner_product(y, qjl_sketch(r, S), r.norm(), S, orthogonal=True) for S in rows])
    assert estimates.mean().item() == pytest.approx(
        y.dot(r).item(), abs=4 * (estimates.std() / len(rows) ** 0.5).item()
    )
    assert qjl_inner_product(torch.eye(128)[0], torch.ones(128), 1.0, torch.eye(128), True).item() == pytest.approx(
        0.1105622150, rel=1e-6
    )
    assert qjl_sketch(torch.zeros(32), torch.ones(3, 32)).tolist() == [1, 1, 1]


@pytest.mark.parametrize(("kv_heads", "group", "n"), [(1, 7, 1), (2, 1, 65), (2, 4, 130)])
def test_attention_equals_that_over_decoded_vectors(kv_heads, group, n):
    d, d_v = 48, 80
    k, v = torch.randn(kv_heads, n, d, dtype=torch.float64), torch.randn(kv_heads, n, d_v, dtype=torch.float64)
    q = torch.randn(kv_heads * group, d, dtype=torch.float64)
    rotations, books = (
        (random_rotation(d, 1), random_rotation(d_v, 2)),
        (
            lloyd_max_codebook(d, 3),
            lloyd_max_codebook(d_v, 4),
        ),
    )
    coded_k, coded_v = tq_quantize(k, rotations[0], 3), tq_quantize(v, rotations[1], 4, scale="unbiased")
    out = tq_attention(q, *coded_k, *coded_v, *rotations, books, 0.2)
    keys = tq_dequantize(*coded_k, rotations[0], books[0]).repeat_interleave(group, 0)
    values = tq_dequantize(*coded_v, rotations[1], books[1]).repeat_interleave(group, 0)
    weights = ((keys @ q[..., None])[..., 0] * 0.2).softmax(-1)
    torch.testing.assert_close(out, (weights[:, None] @ values)[:, 0], rtol=1e-9, atol=1e-9)


def test_equal_keys_give_the_mean_of_the_values_and_eight_bits_are_nearly_exact():
    k, v = torch.randn(1, 1, 64).expand(1, 9, 64), torch.randn(1, 9, 64)
    rotation, book = make_rotation("rht", 64, 0).matrix, lloyd_max_codebook(64, 8)
    out = tq_attention(
        torch.randn(2, 64),
        *tq_quantize(k, rotation, 8),
        *tq_quantize(v, rotation, 8),
        rotation,
        rotation,
        (book, book),
        1.0,
    )
    for row in out:
        assert (row - v[0].mean(0)).norm() / v[0].mean(0).norm() < 0.02


def test_arrays_and_narrow_types():
    x = np.random.default_rng(0).standard_normal((5, 16))
    rotation = random_rotation(16, 0)
    codes, scale = tq_quantize(x, rotation.numpy(), 4)
    assert torch.equal(codes, tq_quantize(torch.tensor(x), rotation, 4)[0]) and scale.dtype == torch.float64
    narrow = torch.tensor(x).bfloat16()
    codes, scale = tq_quantize(narrow, rotation, 4)
    assert scale.dtype == torch.float32
    assert torch.equal(codes, tq_quantize(narrow.float(), rotation, 4)[0])
    with pytest.raises(ValueError, match="scale='exact'"):
        tq_quantize(x, rotation, 4, scale="exact")


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_fast_search_is_the_binary_search(bits, dtype):
    book = sphere_codebook(64, bits)
    bounds = book.boundaries.to(dtype)
    near = torch.cat([bounds, torch.nextafter(bounds, bounds + 1), torch.nextafter(bounds, bounds - 1)])
    values = torch.cat([near, 3 * torch.randn(5000, dtype=dtype), torch.tensor([-1e30, 1e30, 0.0, -0.0], dtype=dtype)])
    expected = torch.searchsorted(bounds, values, right=True)
    assert torch.equal(book.assign(values).long(), expected)
    crowded = Codebook(torch.tensor([-1, -0.5, -0.49999, 1.0]))
    assert crowded.assign(torch.tensor([-0.499996, -0.499994])).tolist() == [1, 2]
