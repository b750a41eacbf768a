"""Copies that look at their numbers: the bits arrive, and not one NaN or infinity passes, in every kernel set."""

import pytest
import torch

from sparing.kernels import dispatch
from sparing.kernels.finite import all_finite, copy_finite
from tests.kernel_sets import using

BITS = {torch.float32: torch.int32, torch.bfloat16: torch.int16, torch.float16: torch.int16}


@pytest.mark.parametrize("kernels", dispatch.available())
@pytest.mark.parametrize("dtype", BITS)
def test_every_exponent_and_sign(kernels, dtype):
    """One number of each 16 leading bits among finite ones, at places that no vector begins at."""
    with using(kernels):
        for high in range(-(2**15), 2**15, 1 if dtype is torch.bfloat16 else 37):
            numbers = torch.zeros(67, dtype=BITS[dtype])
            numbers[high % 67] = high << 16 if dtype is torch.float32 else high
            source = numbers.view(dtype)
            target = torch.full_like(source, 7.0)
            assert copy_finite(target, source) == bool(source.isfinite().all()), hex(high)
            assert torch.equal(target.view(BITS[dtype]), numbers)


@pytest.mark.parametrize("kernels", dispatch.available())
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("dtype", BITS)
def test_a_single_one_far_inside_many(kernels, dtype, bad):
    source = torch.randn(700_001, generator=torch.Generator().manual_seed(1)).to(dtype)
    with using(kernels):
        for place in (None, 0, 131_071, 131_072, 700_000):
            if place is not None:
                source[place] = bad
            target = torch.empty_like(source)
            assert copy_finite(target, source) == (place is None)
            assert torch.equal(target.view(BITS[dtype]), source.view(BITS[dtype]))
            if place is not None:
                source[place] = 1.0


@pytest.mark.parametrize("kernels", dispatch.available())
def test_finite_as_the_target_holds_them(kernels):
    with using(kernels):
        assert not copy_finite(torch.empty(3, dtype=torch.float16), torch.tensor([1.0, 70000.0, 2.0]))
        assert copy_finite(torch.empty(2), torch.tensor([3e38, 3e38]))  # whose sum is not
        assert copy_finite(torch.empty(0), torch.empty(0))
        spread = torch.empty(8)[::2]
        assert copy_finite(spread, torch.arange(4.0)) and torch.equal(spread, torch.arange(4.0))
    assert all_finite(torch.full((4,), 3e38)) and not all_finite(torch.tensor([1.0, float("nan")]))
