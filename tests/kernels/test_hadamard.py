"""Hadamard matrices by their factors."""

import numpy as np
import pytest
import torch

from sparing.kernels.hadamard import hadamard, hadamard_factors, hadamard_matrices


def test_factors():
    assert hadamard_factors(512) == [32, 16] or hadamard_factors(512) == [16, 32]
    assert hadamard_factors(80) == [20, 4]
    assert hadamard_factors(192) == [12, 16]
    assert hadamard_factors(12) == [12]
    assert hadamard_factors(1) == []
    for d in (0, 3, 6, 28, 36, 44, 60, 100):
        assert hadamard_factors(d) is None
    for d in (2, 12, 20, 64, 80, 128, 192, 256, 4096):
        assert np.prod(hadamard_factors(d) or []) == d
        for matrix in hadamard_matrices(d):
            assert torch.equal(matrix @ matrix.T, len(matrix) * torch.eye(len(matrix), dtype=torch.float64))


@pytest.mark.parametrize("size", [1, 2, 32, 64, 128])
def test_the_transform_is_sylvesters(size):
    """Entry (i, j) is negative where i and j have an odd number of bits in common."""
    signs = torch.tensor([[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)])
    torch.testing.assert_close(hadamard(torch.eye(size)), signs / size**0.5)
    x, y = torch.randn(9, size), torch.randn(9, size)
    torch.testing.assert_close(hadamard(hadamard(x)), x)
    torch.testing.assert_close((hadamard(x) * hadamard(y)).sum(-1), (x * y).sum(-1), rtol=1e-4, atol=1e-5)
    assert torch.equal(hadamard(x), torch.stack([hadamard(row) for row in x]))
    assert torch.equal(hadamard(x.bfloat16()), hadamard(x.bfloat16().float()).bfloat16())


def test_refusal():
    with pytest.raises(ValueError, match=r"a power of two, found shape \[3, 96\]"):
        hadamard(torch.zeros(3, 96))
