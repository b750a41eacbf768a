"""NVFP4 bit by bit: the worked example, ties, a literal definition, and the properties of each choice of scales."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.kernels import e2m1
from sparing.weights.nvfp4 import SCALES, block_scales, nvfp4_dequantize, nvfp4_quantize, tensor_scale

EXAMPLE = torch.tensor([0.1 * i * (-1) ** i for i in range(16)] + [0.01 * i for i in range(16)])


def sqnr(w, back):
    return 10 * math.log10(w.square().sum() / (w - back).square().sum())


def test_the_worked_example():
    packed, scale, scale_2 = nvfp4_quantize(EXAMPLE)
    assert packed.tolist() == [144, 162, 195, 212, 229, 230, 246, 247, 16, 34, 67, 84, 101, 102, 118, 119]
    assert scale.view(torch.uint8).tolist() == [126, 99]
    assert scale.float().tolist() == [448.0, 44.0]
    assert scale_2.item() == pytest.approx(5.580357e-4, rel=1e-6) and scale_2.shape == ()
    expected = [0, -0.125, 0.25, -0.25, 0.375, -0.5, 0.5, -0.75]
    assert nvfp4_dequantize(packed, scale, scale_2)[:8].tolist() == pytest.approx(expected, abs=1e-7)


STEPS = torch.arange(32.0)
TIES = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0, 6.0, -0.25, -0.75, -1.25, -1.75, -2.5, -3.5, -5.0, -6.0])
# What `NVFP4QTensor.quantize` of nvidia-modelopt 0.47.0 made of these: codes, bits of the scales, scale_2.
MODELOPT = {
    "ties and zeros": (
        torch.stack((torch.cat((TIES * 448, TIES)), torch.cat((TIES * 0.001, TIES * 0)))),
        [32, 66, 100, 118, 168, 202, 236, 254, 32, 66, 100, 118, 168, 202, 236, 254,
         16, 33, 67, 85, 152, 169, 203, 221, 0, 0, 0, 0, 0, 0, 0, 0],
        [126, 56, 1, 56],
        "0x1.0000000000000p+0",
    ),
    "small to large": (
        ((STEPS - 15) ** 3 / 50).view(2, 16),
        [239, 222, 188, 170, 153, 136, 136, 8, 0, 0, 16, 17, 50, 84, 101, 118],
        [124, 126],
        "0x1.f352680000000p-6",
    ),
    "bfloat16": (
        ((STEPS * 37 % 29 - 14) * 0.61).bfloat16().view(1, 32),
        [223, 98, 190, 116, 13, 245, 60, 230, 90, 215, 97, 191, 115, 158, 245, 45],
        [126, 126],
        "0x1.a186180000000p-9",
    ),
    "below the least scale": (
        torch.cat((STEPS[:16] * 3 - 20, (STEPS[:16] - 5) * 1e-7)).view(1, 32),
        [238, 221, 172, 9, 50, 84, 102, 119, 136, 136, 8, 0, 0, 0, 0, 0],
        [126, 1],
        "0x1.30c30c0000000p-7",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(MODELOPT))
def test_modelopt_makes_the_same_bits(name):
    w, codes, scales, scale_2 = MODELOPT[name]
    packed, scale, g = nvfp4_quantize(w)
    assert packed.flatten().tolist() == codes
    assert scale.view(torch.uint8).flatten().tolist() == scales
    assert g.item() == float.fromhex(scale_2)


@pytest.mark.parametrize(
    ("value", "code"),
    [
        (0.25, 0), (0.75, 2), (1.25, 2), (1.75, 4), (2.5, 4), (3.5, 6), (5.0, 6), (5.01, 7), (6.37, 7), (100.0, 7),
        (-0.25, 8), (-0.0, 0), (-5.0, 14), (-7.0, 15), (0.2500001, 1), (2.4999998, 4), (4.9999995, 6),
    ],
)  # fmt: skip
def test_ties_go_to_the_even_code(value, code):
    assert e2m1.encode(torch.tensor([value])).item() == code


def literal(w):
    """The rules of the format, number by number."""
    values = e2m1.VALUES
    g = torch.tensor(max(abs(v) for v in w.flatten().tolist())) / 2688
    packed, scales = [], []
    for row in w.tolist():
        codes = []
        for start in range(0, len(row), 16):
            block = row[start : start + 16]
            s = torch.tensor(max(map(abs, block))) / (6 * g)
            s = torch.where(s == 0, 1.0, s).clamp(2**-9, 448).to(torch.float8_e4m3fn)
            scales.append(s.view(torch.uint8).item())
            for v in block:
                scaled = (torch.tensor(v) / (s.float() * g)).item()
                near = min(range(8), key=lambda c: (abs(abs(scaled) - values[c]), c % 2))
                codes.append(near + 8 * (scaled < 0))
        packed.append([a | b << 4 for a, b in zip(codes[::2], codes[1::2], strict=True)])
    return packed, scales, g


def test_a_literal_definition_gives_the_same_bits():
    w = torch.randn(12, 64) * torch.logspace(-6, 2, 12)[:, None]
    w[3, 16:32] = 0
    packed, scale, scale_2 = nvfp4_quantize(w)
    expected, scales, g = literal(w)
    assert packed.tolist() == expected
    assert scale.view(torch.uint8).flatten().tolist() == scales
    assert torch.equal(scale_2, g)


def test_dequantising_is_codes_times_scales():
    packed, scale, scale_2 = nvfp4_quantize(torch.randn(5, 48))
    table = torch.tensor([*e2m1.VALUES, *(-v for v in e2m1.VALUES)], dtype=torch.float64)
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2)
    exact = table[codes.int()] * scale.double().repeat_interleave(16, -1) * scale_2.double()
    assert torch.allclose(nvfp4_dequantize(packed, scale, scale_2).double(), exact, rtol=2e-7, atol=0)


@pytest.mark.parametrize("scales", SCALES)
def test_zeros_stay_zeros(scales):
    packed, scale, scale_2 = nvfp4_quantize(torch.zeros(16, 32), scales)
    assert scale_2 == 0 and not scale_2.signbit() and (scale.float() == 1).all() and (packed == 0).all()
    assert not nvfp4_dequantize(packed, scale, scale_2).signbit().any()
    w = torch.randn(16, 32)
    w[:, :16] = 0
    packed, scale, scale_2 = nvfp4_quantize(w, scales)
    back = nvfp4_dequantize(packed, scale, scale_2)
    assert (back[:, :16] == 0).all() and (scale[:, 0].float() == 1).all()


@pytest.mark.parametrize(("scales", "db"), [("max", 20.4), ("four_over_six", 21.2), ("mse", 21.8), ("2d", 19.1)])
def test_error_on_a_gaussian_is_the_published_one(scales, db):
    w = torch.randn(256, 512)
    back = nvfp4_dequantize(*nvfp4_quantize(w, scales))
    assert sqnr(w, back) == pytest.approx(db, abs=0.1)
    if scales == "max":
        assert ((w - back).norm() / w.norm()).item() == pytest.approx(0.0953, abs=1e-3)


@given(st.integers(-20, 20), st.integers(0, 2**31))
def test_a_power_of_two_changes_the_tensor_scale_alone(k, seed):
    w = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed))
    packed, scale, scale_2 = nvfp4_quantize(w)
    other = nvfp4_quantize(w * 2.0**k)
    assert torch.equal(packed, other[0]) and torch.equal(scale.float(), other[1].float())
    assert torch.equal(scale_2 * 2.0**k, other[2])


@pytest.mark.parametrize("scales", SCALES)
def test_negation_flips_signs_alone(scales):
    w = torch.randn(16, 64)
    plus, minus = nvfp4_quantize(w, scales), nvfp4_quantize(-w, scales)
    assert torch.equal(nvfp4_dequantize(*plus), -nvfp4_dequantize(*minus))
    assert torch.equal(plus[1].float(), minus[1].float())


@pytest.mark.parametrize("spread", [0.0, 3.0, 6.0])
def test_the_searched_scale_is_the_best_of_all(spread):
    """Also for blocks far below the tensor's largest, whose scales are subnormal."""
    blocks = torch.randn(60, 1, 16) * torch.exp(spread * torch.randn(60, 1, 1))
    g = tensor_scale(blocks)
    candidates = torch.arange(1, 127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    steps = (candidates * g)[:, None]  # [126, 1]
    errors = (e2m1.decode(e2m1.encode(blocks / steps)) * steps - blocks).square().sum(-1)  # [60, 126]
    step = block_scales(blocks, g, "mse").float()[..., None] * g
    found = (e2m1.decode(e2m1.encode(blocks / step)) * step - blocks).square().sum((-1, -2))
    assert torch.allclose(found, errors.amin(-1), rtol=1e-5, atol=0)


def test_two_dimensional_blocks_are_the_same_transposed():
    w = torch.randn(48, 32)
    back, turned = (nvfp4_dequantize(*nvfp4_quantize(m, "2d")) for m in (w, w.T.contiguous()))
    assert torch.equal(back, turned.T)
    one = nvfp4_dequantize(*nvfp4_quantize(w)), nvfp4_dequantize(*nvfp4_quantize(w.T.contiguous()))
    assert not torch.equal(one[0], one[1].T)


def test_a_given_tensor_scale_saturates():
    w = torch.randn(2, 32)
    small = tensor_scale(w) / 4
    packed, scale, scale_2 = nvfp4_quantize(w, scale_2=small)
    assert scale_2 == small
    limit = 6 * 448 * small
    assert nvfp4_dequantize(packed, scale, scale_2).abs().max() == limit
    assert torch.allclose(nvfp4_dequantize(packed, scale, scale_2), w.clamp(-limit, limit), atol=limit.item() / 4)


def test_bfloat16_is_computed_in_float32():
    w = torch.randn(8, 64).bfloat16()
    pairs = zip(nvfp4_quantize(w), nvfp4_quantize(w.float()), strict=True)
    assert all(torch.equal(a.float(), b.float()) for a, b in pairs)


def test_refusals():
    with pytest.raises(ValueError, match=r"multiple of 16, found shape \[4, 24\]"):
        nvfp4_quantize(torch.ones(4, 24))
    with pytest.raises(ValueError, match="scales='best' is not known, use max"):
        nvfp4_quantize(torch.ones(4, 16), "best")
    with pytest.raises(ValueError, match="rows in multiples of 16"):
        nvfp4_quantize(torch.ones(4, 16), "2d")


def test_stochastic_rounding_is_unbiased():
    x = torch.tensor([0.0, 0.1, 0.25, -0.6, 1.3, -2.5, 3.9, 4.4, -5.5, 6.0])
    generator = torch.Generator().manual_seed(1)
    drawn = e2m1.rounded(x.expand(20000, -1), generator)
    assert torch.allclose(drawn.mean(0), x, atol=0.03)
    values = torch.tensor(e2m1.VALUES)
    for column, value in zip(drawn.T, x, strict=True):
        low, high = values[values <= value.abs()].max(), values[values >= value.abs()].min()
        assert set(column.abs().tolist()) <= {low.item(), high.item()}
    assert e2m1.rounded(torch.tensor([9.0, -9.0]), generator).tolist() == [6.0, -6.0]
