"""Rotary positions in every set of kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparing.kernels import apply_rope, norm_rotate, proportional_inv_freq, rms_norm, rope_tables, rotate

pytestmark = pytest.mark.usefixtures("each_kernel_set")


def turned(x: Tensor, cos: Tensor, sin: Tensor, layout: str, last: bool) -> Tensor:
    """Every pair of x [tokens, heads, d] as a complex number, in float64."""
    out, half = x.double().clone(), cos.shape[-1]
    first = x.shape[-1] - 2 * half if last else 0
    for m in range(half):
        i, j = (first + m, first + m + half) if layout == "halves" else (first + 2 * m, first + 2 * m + 1)
        by = torch.complex(cos[..., m].double(), sin[..., m].double())
        pair = torch.complex(x[..., i].double(), x[..., j].double()) * by
        out[..., i], out[..., j] = pair.real, pair.imag
    return out


def literal(x: Tensor, position: int, inv_freq: Tensor) -> Tensor:
    """One head [d], pair by pair as a rotation of a complex number, in float64."""
    half = len(x) // 2
    pairs = torch.complex(x[:half].double(), x[half:].double())
    turned = pairs * torch.polar(torch.ones(half).double(), position * inv_freq.double())
    return torch.cat([turned.real, turned.imag])


def test_worked_frequencies():
    expected = torch.tensor([1, 0.17782794, 0, 0, 0, 0, 0, 0])
    torch.testing.assert_close(proportional_inv_freq(16, 1e6, 0.25), expected)
    wide = proportional_inv_freq(512, 1e6, 0.25)
    assert wide.shape == (256,)
    assert int((wide != 0).sum()) == 64
    assert (wide[64:] == 0).all()
    assert wide[63].item() == pytest.approx(0.033376247, rel=1e-6)


def test_worked_rotation():
    x = torch.arange(1.0, 9.0)
    y = apply_rope(x, torch.tensor(3), proportional_inv_freq(8, 1e4, 0.5))
    expected = torch.tensor([-1.6955925, 0.1375517, 3, 4, -4.8088426, 6.3230596, 7, 8])
    torch.testing.assert_close(y, expected, rtol=0, atol=2e-6)
    assert torch.equal(y[[2, 3, 6, 7]], x[[2, 3, 6, 7]])  # pairs that do not turn pass bit for bit


@pytest.mark.parametrize(("d", "fraction", "factor"), [(8, 1.0, 1.0), (10, 0.5, 4.0), (14, 0.25, 1.0), (64, 0.3, 2.0)])
def test_frequencies_written_out(d, fraction, factor):
    turning = int(fraction * d // 2)
    expected = [10000.0 ** (-2 * m / d) / factor if m < turning else 0.0 for m in range(d // 2)]
    torch.testing.assert_close(proportional_inv_freq(d, 1e4, fraction, factor), torch.tensor(expected))


@pytest.mark.parametrize("shape", [(5, 2, 8), (3, 5, 1, 14), (1, 4, 64)])
def test_against_float64(shape):
    x, inv_freq = torch.randn(shape), proportional_inv_freq(shape[-1], 100.0, 0.75)
    positions = torch.randint(0, 500, shape[:-2])
    y = apply_rope(x, positions, inv_freq)
    for index in torch.cartesian_prod(*map(torch.arange, shape[:-1])).tolist():
        expected = literal(x[tuple(index)], int(positions[tuple(index[:-1])]), inv_freq)
        torch.testing.assert_close(y[tuple(index)].double(), expected, rtol=1e-4, atol=1e-4)


def test_without_a_head_dimension():
    x, inv_freq = torch.randn(5, 8), proportional_inv_freq(8, 1e4, 1.0)
    y = apply_rope(x, torch.arange(5), inv_freq)
    assert torch.equal(y, apply_rope(x[:, None], torch.arange(5), inv_freq)[:, 0])
    assert torch.equal(y[3], apply_rope(x[3], torch.tensor(3), inv_freq))


@given(st.integers(0, 5000))
def test_norms_are_preserved(position):
    x = torch.randn(6, 16, generator=torch.Generator().manual_seed(0))
    y = apply_rope(x, torch.full((6,), position), proportional_inv_freq(16, 1e4, 0.5))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))


@given(st.integers(0, 300), st.integers(0, 300), st.integers(0, 300))
def test_scores_depend_on_the_difference_of_positions(i, j, shift):
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(16, generator=generator), torch.randn(16, generator=generator)
    inv_freq = proportional_inv_freq(16, 1e4, 0.75)

    def score(a, b):
        return apply_rope(q, torch.tensor(a), inv_freq) @ apply_rope(k, torch.tensor(b), inv_freq)

    torch.testing.assert_close(score(i, j), score(i + shift, j + shift), rtol=0, atol=2e-3)


def test_tables_in_bfloat16_are_rounded_once():
    inv_freq = proportional_inv_freq(16, 1e6, 1.0)
    cos, sin = rope_tables(torch.arange(3000), inv_freq, torch.bfloat16)
    cos32, sin32 = rope_tables(torch.arange(3000), inv_freq, torch.float32)
    assert torch.equal(cos, cos32.bfloat16())
    assert torch.equal(sin, sin32.bfloat16())


def test_narrow_tables_leave_the_rest_of_a_head():
    x = torch.randn(4, 2, 16)
    cos, sin = rope_tables(torch.arange(4), proportional_inv_freq(8, 1e4, 1.0), torch.float32)
    y = rotate(x, cos, sin)
    assert torch.equal(y[..., 8:], x[..., 8:])
    torch.testing.assert_close(y[..., :8], rotate(x[..., :8].contiguous(), cos, sin))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("tokens", "heads", "d", "half"), [(1, 8, 128, 64), (5, 3, 80, 40), (300, 2, 66, 33), (2, 1, 24, 5)]
)
def test_all_sizes_as_exact_as_one_rounding(dtype, tokens, heads, d, half):
    x = torch.randn(tokens, 2 * heads, d).to(dtype)[:, ::2]  # not contiguous
    cos, sin = rope_tables(torch.arange(tokens), torch.rand(half), dtype)
    exact = rotate(x.double(), cos.double(), sin.double())
    rounding = 3e-7 if dtype == torch.float32 else 3 * torch.finfo(dtype).eps  # torch rounds three times
    torch.testing.assert_close(rotate(x, cos, sin).double(), exact, rtol=rounding, atol=rounding)


def test_a_pair_turns_alike_wherever_it_stands():
    """Values-only layers turn some pairs of a key on their own and must find the bits of the whole."""
    x = torch.randn(4, 2, 128)
    cos, sin = rope_tables(torch.arange(4), torch.rand(64), torch.float32)
    whole = rotate(x, cos, sin).unflatten(-1, (2, 64))
    for pairs in (1, 7, 16, 33):
        part = rotate(x.unflatten(-1, (2, 64))[..., :pairs].flatten(-2), cos[..., :pairs], sin[..., :pairs])
        assert torch.equal(part.unflatten(-1, (2, pairs)), whole[..., :pairs])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "d", "half"), [(4, 64, 32), (1, 24, 12), (3, 10, 5), (2, 48, 8)])
def test_norm_rotate_is_the_rotation_of_the_norm(dtype, heads, d, half):
    """To the bit: keys rebuilt from values go the two steps apart. Also where a table turns part of a head."""
    wide = torch.randn(7, 2 * heads, d).to(dtype)
    cos, sin = rope_tables(torch.arange(7), torch.rand(half), dtype)
    weight = torch.randn(d).to(dtype)
    for x in (wide, wide[:, ::2]):
        for shift in (0.0, 1.0):
            turned = norm_rotate(x, weight, cos, sin, 1e-5, shift=shift)
            assert torch.equal(turned, rotate(rms_norm(x, weight, 1e-5, shift), cos, sin))
    x = wide.clone().requires_grad_()
    norm_rotate(x, weight, cos, sin).float().sum().backward()
    assert x.grad is not None and x.grad.any()


LAYOUTS = pytest.mark.parametrize(("layout", "last"), [("halves", True), ("pairs", False), ("pairs", True)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize(
    ("tokens", "heads", "d", "half"), [(1, 8, 512, 32), (5, 3, 83, 9), (300, 1, 66, 33), (2, 4, 6, 1)]
)
@LAYOUTS
def test_layouts_against_complex_numbers(layout, last, tokens, heads, d, half, is_wide, dtype):
    """Of float32 tables too, where the result is rounded once. What does not turn passes bit for bit."""
    x = torch.randn(tokens, 2 * heads, d).to(dtype)[:, ::2]  # not contiguous
    cos, sin = rope_tables(torch.arange(tokens), torch.rand(half), torch.float32 if is_wide else dtype)
    y = rotate(x, cos, sin, layout=layout, last=last)
    assert y.dtype == dtype
    eps = torch.finfo(dtype).eps
    rounding = 3e-7 if dtype == torch.float32 else 0.51 * eps if is_wide else 3 * eps  # torch rounds three times
    torch.testing.assert_close(
        y.double(), turned(x, cos, sin, layout, last), rtol=rounding, atol=max(rounding / 2, 3e-7)
    )
    still = slice(None, d - 2 * half) if last else slice(2 * half, None)
    assert torch.equal(y[..., still], x[..., still])
    torch.set_num_threads(3)
    assert torch.equal(rotate(x, cos, sin, layout=layout, last=last), y)
    torch.set_num_threads(1)


@LAYOUTS
def test_the_negative_sine_turns_back(layout, last):
    x = torch.randn(40, 2, 24)
    cos, sin = rope_tables(torch.arange(40), torch.rand(7), torch.float32)
    back = rotate(rotate(x, cos, sin, layout=layout, last=last), cos, -sin, layout=layout, last=last)
    torch.testing.assert_close(back, x, rtol=1e-6, atol=1e-6)


def test_layouts_are_permutations_of_each_other():
    x = torch.randn(6, 2, 24)
    cos, sin = rope_tables(torch.arange(6), torch.rand(12), torch.float32)
    order = torch.arange(24).view(2, 12).T.flatten()  # 0, 12, 1, 13, ...
    expected = rotate(x, cos, sin)[..., order]
    torch.testing.assert_close(rotate(x[..., order], cos, sin, layout="pairs"), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("is_wide", [False, True])
@pytest.mark.parametrize("has_weight", [False, True])
@pytest.mark.parametrize(("layout", "last"), [("halves", False), ("pairs", True)])
def test_norms_with_and_without_weight(layout, last, has_weight, is_wide, dtype):
    x, weight = torch.randn(7, 3, 50).to(dtype), torch.randn(50).to(dtype) if has_weight else None
    cos, sin = rope_tables(torch.arange(7), torch.rand(9), torch.float32 if is_wide else dtype)
    expected = rotate(rms_norm(x, weight, 1e-5), cos, sin, layout=layout, last=last)
    assert torch.equal(norm_rotate(x, weight, cos, sin, 1e-5, layout=layout, last=last), expected)


@LAYOUTS
def test_gradients_of_layouts(layout, last):
    """A rotation's transpose is the turn back."""
    x = torch.randn(5, 2, 10, requires_grad=True)
    cos, sin = rope_tables(torch.arange(5), torch.rand(3), torch.float32)
    up = torch.randn(5, 2, 10)
    rotate(x, cos, sin, layout=layout, last=last).backward(up)
    torch.testing.assert_close(x.grad, rotate(up, cos, -sin, layout=layout, last=last), rtol=1e-5, atol=1e-6)
