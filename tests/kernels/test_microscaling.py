"""Blocks that share a power of two: what scales of any size do to the codes, and numbers of eight bits."""

import math

import pytest
import torch

from sparing.kernels.microscaling import mxfp4_pack, mxfp4_unpack, ue8m0_decode, ue8m0_encode


@pytest.mark.parametrize(
    ("a", "byte"), [(1.0, 127), (1.0000001, 128), (2.0, 128), (0.75, 127), (2.0**-126, 1), (3e38, 255), (448.0, 136)]
)
def test_scale_bytes_round_up(a, byte):
    assert ue8m0_encode(torch.tensor([a])).item() == byte


def test_scale_bytes_are_exponents():
    back = ue8m0_decode(torch.arange(255, dtype=torch.uint8))
    assert back.tolist() == [2.0 ** (b - 127) for b in range(255)]
    assert ue8m0_decode(torch.tensor([255], dtype=torch.uint8)).isnan().all()
    assert ue8m0_encode(back[1:]).tolist() == list(range(1, 255))


def test_worked_block():
    w = torch.zeros(32)
    w[:6] = torch.tensor([6.0, -3.0, 0.5, 0.25, 5.0, -12.0])
    packed, scale = mxfp4_pack(w)
    assert scale.tolist() == [128]  # 12 / 6 = 2
    assert packed[:3].tolist() == [5 | 11 << 4, 0 | 0 << 4, 4 | 15 << 4]  # 3, -1.5; .25 and .125 to 0; 2.5 to 2, -6
    assert mxfp4_unpack(packed, scale)[:6].tolist() == [6.0, -3.0, 0.0, 0.0, 4.0, -12.0]


def test_nothing_saturates_and_powers_of_two_move_the_scale_alone():
    w = torch.randn(40, 96)
    packed, scale = mxfp4_pack(w)
    back = mxfp4_unpack(packed, scale)
    step = ue8m0_decode(scale).repeat_interleave(32, -1)
    assert ((back - w).abs() <= step).all()  # half of the widest gap, from 4 to 6
    assert 10 * math.log10(w.square().sum() / (back - w).square().sum()) == pytest.approx(18.8, abs=0.2)
    again = mxfp4_pack(w * 32)
    assert torch.equal(again[0], packed) and torch.equal(again[1], scale + 5)


def test_zeros_and_tiny_blocks():
    assert (mxfp4_unpack(*mxfp4_pack(torch.zeros(2, 32))) == 0).all()
    tiny = torch.full((32,), 1e-44)
    assert mxfp4_unpack(*mxfp4_pack(tiny)).isfinite().all()


def test_refusal():
    with pytest.raises(ValueError, match=r"multiple of 32, found shape \[48\]"):
        mxfp4_pack(torch.ones(48))
