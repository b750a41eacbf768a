"""int8 with a scale for each row, int4 with a scale for each group."""

import math

import pytest
import torch

from sparing.weights.integer import int4_dequantize, int4_quantize, int8_dequantize, int8_quantize


def test_int8_worked():
    codes, scale = int8_quantize(torch.tensor([[1.27, -0.635, 0.014, 0.0], [0.0, 0.0, 0.0, 0.0]]))
    assert codes.tolist() == [[127, -64, 1, 0], [0, 0, 0, 0]]  # -63.5 to even
    assert scale.tolist() == pytest.approx([0.01, 1.0])


def test_int8_errs_by_half_a_step():
    w = torch.randn(30, 200)
    codes, scale = int8_quantize(w)
    assert ((int8_dequantize(codes, scale) - w).abs() <= scale[:, None] * 0.5001).all()
    assert codes.min() >= -127


def test_int4_worked():
    w = torch.zeros(64)
    w[:4] = torch.tensor([-8.0, 7.0, 3.4, 0.5])
    packed, scale = int4_quantize(w)
    assert scale.tolist() == [1.0, 1.0]
    assert packed[:2].tolist() == [0 | 15 << 4, 11 | 8 << 4]  # -8, 7; 3, 0
    assert set(packed[2:].tolist()) == {0x88}
    assert int4_dequantize(packed, scale)[:4].tolist() == [-8.0, 7.0, 3.0, 0.0]
    packed, scale = int4_quantize(-w)  # the largest is positive: the scale is negative
    assert scale[0] == -1.0 and int4_dequantize(packed, scale)[:4].tolist() == [8.0, -7.0, -3.0, 0.0]


def test_int4_on_a_gaussian():
    w = torch.randn(128, 256)
    back = int4_dequantize(*int4_quantize(w))
    assert 10 * math.log10(w.square().sum() / (back - w).square().sum()) == pytest.approx(21.3, abs=0.2)
    extreme = w.unflatten(-1, (-1, 32)).abs().amax(-1)
    assert ((back - w).unflatten(-1, (-1, 32)).abs().amax(-1) <= extreme / 8 * 1.01).all()  # +7 stands in for +8


def test_int4_groups_of_another_size_read_back():
    w = torch.randn(4, 256)
    packed, scale = int4_quantize(w, group=128)
    assert scale.shape == (4, 2)
    assert torch.allclose(int4_dequantize(packed, scale), w, atol=0.6)
    with pytest.raises(ValueError, match=r"multiple of 32, found shape \[4, 40\]"):
        int4_quantize(torch.ones(4, 40))
