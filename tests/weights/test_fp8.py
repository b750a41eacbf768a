"""FP8 weights with one scale, a scale for each row, or for each block."""

import pytest
import torch

from sparing.weights.fp8 import FP8Weight, fp8_block_dequant, fp8_block_quant, fp8_dequantize, fp8_quantize


@pytest.mark.parametrize(("scales", "shape"), [("tensor", (3,)), ("row", (3, 140)), ("block", (3, 2, 3))])
def test_scales_map_the_largest_to_448(scales, shape):
    w = torch.randn(3, 140, 300)
    codes, scale = fp8_quantize(w, scales)
    assert codes.dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == shape
    assert codes.float().abs().max() == 448
    back = fp8_dequantize(codes, scale)
    assert torch.allclose(back, w, rtol=2**-4, atol=w.abs().max().item() / 448 * 2**-9)  # half a unit, or subnormal


def test_each_block_by_itself():
    """A block's numbers depend on no other block, the partial ones at the edges included."""
    w = torch.randn(200, 130)
    codes, scale = fp8_block_quant(w)
    for i, j in [(0, 0), (1, 0), (0, 1), (1, 1)]:
        part = w[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)]
        own, own_scale = fp8_quantize(part, "tensor")
        assert torch.equal(own.float(), codes[128 * i : 128 * (i + 1), 128 * j : 128 * (j + 1)].float())
        assert own_scale == scale[i, j]
    assert torch.equal(fp8_block_dequant(codes, scale), fp8_dequantize(codes, scale))


@pytest.mark.parametrize("scales", ["tensor", "row", "block"])
def test_a_weight_dequantises_any_of_them_by_tiles(scales):
    w = torch.randn(300, 160)
    codes, scale = fp8_quantize(w, scales)
    weight = FP8Weight(codes=codes, scale=scale)
    assert torch.equal(weight.dequantize(), fp8_dequantize(codes, scale))
    tiles = torch.cat([weight.decode(weight.rows(a, min(a + 128, 300))) for a in (0, 128, 256)])
    assert torch.equal(tiles, weight.dequantize())


def test_no_infinity_and_no_nan():
    codes, scale = fp8_quantize(torch.tensor([[3.4e38, -3.4e38], [0.0, 0.0]]))
    assert codes.float().tolist() == [[448.0, -448.0], [0.0, 0.0]]
    assert scale[1] == 1
    with pytest.raises(ValueError, match="scales='column' is not known"):
        fp8_quantize(torch.ones(2, 2), "column")
