"""RMS norms, residuals and soft caps in every set of kernels."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.kernels import dispatch, residual, residual_norm, rms_norm, softcap

pytestmark = pytest.mark.usefixtures("each_kernel_set")


def literal(x, weight=None, eps=1e-6):
    x = x.double()
    y = x / torch.sqrt((x * x).sum(-1, keepdim=True) / x.shape[-1] + eps)
    return y if weight is None else y * weight.double()


def test_worked_number():
    torch.testing.assert_close(
        rms_norm(torch.tensor([3.0, 4.0])), torch.tensor([0.84852813, 1.13137078]), rtol=0, atol=2e-7
    )


@pytest.mark.parametrize("shape", [(1,), (7,), (3, 5), (2, 3, 64), (0, 4)])
@pytest.mark.parametrize("eps", [1e-6, 1e-2])
@pytest.mark.parametrize("weighted", [False, True])
def test_against_float64(shape, eps, weighted):
    x, weight = torch.randn(shape) * 3, torch.randn(shape[-1]) if weighted else None
    torch.testing.assert_close(rms_norm(x, weight, eps).double(), literal(x, weight, eps), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1024), (300, 80), (2, 7, 33)])
def test_all_sizes_as_exact_as_one_rounding(dtype, shape):
    x, weight = torch.randn(shape).to(dtype).mT.contiguous().mT, torch.randn(shape[-1]).to(dtype)
    rounding = 1e-6 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    torch.testing.assert_close(rms_norm(x, weight).double(), literal(x, weight), rtol=rounding, atol=1e-6)
    rows = torch.stack([rms_norm(row, weight) for row in x.flatten(0, -2)])
    assert torch.equal(rms_norm(x, weight).flatten(0, -2), rows) or dispatch.active() == "reference"


@given(st.floats(0.1, 1e4))
def test_unchanged_by_positive_scaling(c):
    x = torch.randn(4, 16, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rms_norm(c * x), rms_norm(x), rtol=1e-4, atol=1e-5)


def test_output_has_unit_rms():
    rms = rms_norm(torch.randn(50, 64)).square().mean(-1).sqrt()
    torch.testing.assert_close(rms, torch.ones(50), rtol=0, atol=1e-6)


def test_zeros():
    assert not rms_norm(torch.zeros(3, 8)).any()
    assert not rms_norm(torch.randn(3, 8), torch.zeros(8)).any()  # the weight is w, not 1 + w


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_float32_inside_and_one_rounding_at_the_end(dtype):
    x, weight = (torch.randn(20, 48) * 30).to(dtype), torch.randn(48).to(dtype)
    y = rms_norm(x, weight)
    assert y.dtype == dtype
    assert torch.equal(y, rms_norm(x.float(), weight.float()).to(dtype))


def test_softcap():
    torch.testing.assert_close(
        softcap(torch.tensor([45.0, 1.0]), 30.0), torch.tensor([27.1544476, 0.9996298]), rtol=0, atol=2e-6
    )
    x = torch.linspace(-200, 200, 2001)
    y = softcap(x, 30.0)
    assert torch.equal(softcap(-x, 30.0), -y)  # odd
    assert (y.diff() >= 0).all()
    assert (y.abs() <= 30.0).all()
    logits = torch.randn(10, 99) * 20
    assert torch.equal(softcap(logits, 30.0).argmax(-1), logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1024), (300, 80), (2, 7, 33), (1,), (0, 4)])
@pytest.mark.parametrize(("normed", "scaled"), [(False, False), (True, False), (True, True)])
def test_residual_against_float64(dtype, shape, normed, scaled):
    x, y = torch.randn(shape).to(dtype), (3 * torch.randn(shape)).to(dtype)
    norm, scale = torch.randn(shape[-1]).to(dtype), torch.tensor([0.37]).to(dtype)
    exact = x.double() + (literal(y, norm) if normed else y.double())
    out = residual(x, y, norm if normed else None, scale if scaled else None)
    assert out.dtype == dtype and out.shape == x.shape
    rounding = 1e-6 if dtype == torch.float32 else 1.6 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.double(), exact * (scale.double() if scaled else 1), rtol=rounding, atol=rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("normed", [False, True])
def test_residual_norm_is_the_norm_of_the_residual(dtype, normed):
    x, y, weight, norm = (torch.randn(s).to(dtype) for s in ((5, 70), (5, 70), (70,), (70,)))
    norm = norm if normed else None
    total, after = residual_norm(x[:, ::2], y[:, ::2], weight[::2], None if norm is None else norm[::2])
    assert torch.equal(total, residual(x[:, ::2], y[:, ::2], None if norm is None else norm[::2]))
    assert torch.equal(after, rms_norm(total, weight[::2]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(1, 1024), (2, 7, 33), (3, 1), (0, 4)])
def test_weights_around_zero(dtype, shape):
    """1 + w is added up in float32: of a small w in bfloat16 hardly anything would be left."""
    x, y = (torch.randn(shape).to(dtype) for _ in range(2))
    weight, norm = ((0.01 * torch.randn(shape[-1])).to(dtype) for _ in range(2))
    rounding = 1e-6 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    exact = literal(x, 1 + weight.double())
    torch.testing.assert_close(rms_norm(x, weight, shift=1.0).double(), exact, rtol=rounding, atol=1e-6)
    assert torch.equal(rms_norm(x, None, shift=1.0), rms_norm(x))
    total, after = residual_norm(x, y, weight, norm, shift=1.0)
    assert torch.equal(total, residual(x, y, norm, shift=1.0)) and torch.equal(
        after, rms_norm(total, weight, shift=1.0)
    )
    exact = x.double() + literal(y, 1 + norm.double())
    rounding = 1e-6 if dtype == torch.float32 else 1.6 * torch.finfo(dtype).eps
    torch.testing.assert_close(total.double(), exact, rtol=rounding, atol=rounding)


def test_gradients_reach_the_branch_and_the_stream():
    parts = [torch.randn(s, requires_grad=True) for s in ((3, 8), (3, 8), (8,), (8,), (1,))]
    x, y, weight, norm, scale = parts
    for shift in (0.0, 1.0):
        total, after = residual_norm(x, y, weight, norm, shift=shift)
        (residual(total, after, norm, scale, shift=shift)).square().sum().backward()
        assert all(part.grad is not None and part.grad.any() for part in parts)
        for part in parts:
            part.grad = None
