"""Rotary positions in every set of kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sparing.kernels import apply_rope, norm_rotate, proportional_inv_freq, rms_norm, rope_tables, rotate

pytestmark = pytest.mark.usefixtures("each_kernel_set")


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
        assert torch.equal(norm_rotate(x, weight, cos, sin, 1e-5), rotate(rms_norm(x, weight, 1e-5), cos, sin))
    x = wide.clone().requires_grad_()
    norm_rotate(x, weight, cos, sin).float().sum().backward()
    assert x.grad is not None and x.grad.any()
