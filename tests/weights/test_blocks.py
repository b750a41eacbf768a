"""Weights in GGUF's blocks: the numbers of the gguf package, bit for bit, and products with them."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

from sparing import kernels
from sparing.config.formats import BLOCKS
from sparing.kernels import dispatch
from sparing.kernels.experts import gated_gelu, gated_silu, relu2
from sparing.weights import weight as module
from sparing.weights.blocks import KINDS, BlockWeight
from tests.kernel_sets import using
from tests.weights.every_code import stacked


def blocks(kind: str, out: int, size: int, seed: int = 0) -> np.ndarray:
    """Rows of blocks with every code in them, and scales that are finite and of either sign."""
    raw = np.random.default_rng(seed).integers(0, 256, (out, size // BLOCKS[kind][0] * BLOCKS[kind][1]), dtype=np.uint8)
    spread = raw.reshape(-1, BLOCKS[kind][1])
    for at in range(0, BLOCKS[kind][1], 2) if kind in ("f16", "bf16") else HALVES[kind]:
        spread[:, at + 1] = spread[:, at + 1] % 0x38 | spread[:, at + 1] & 0x80
    return raw


HALVES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82), "q3_k": (108,),
    "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,),
}  # fmt: skip


def weight_of(kind: str, out: int, size: int, seed: int = 0) -> BlockWeight:
    return KINDS[kind](codes=torch.from_numpy(blocks(kind, out, size, seed)))


def theirs(weight: BlockWeight) -> torch.Tensor:
    return torch.from_numpy(gguf.quants.dequantize(weight.codes.numpy(), Kind[weight.format.upper()])).float()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.int32), b.view(torch.int32))


@pytest.fixture(params=dispatch.available())
def kernels_used(request):
    with using(request.param):
        yield request.param


@pytest.fixture(params=sorted(BLOCKS))
def kind(request):
    return request.param


def test_the_table_is_that_of_the_package():
    assert {n: gguf.GGML_QUANT_SIZES[Kind[n.upper()]] for n in BLOCKS} == BLOCKS
    assert KINDS.keys() == BLOCKS.keys()


def test_numbers_are_those_of_the_package(kind, kernels_used, monkeypatch):
    monkeypatch.setattr(module, "NATIVE_TILE_BYTES", 100_000)  # several tiles
    weight = weight_of(kind, 140, 512)
    expected = theirs(weight)
    assert weight.shape == expected.shape == (140, 512)
    assert same_bits(weight.dequantize(), expected)
    ids = torch.tensor([[3, 139], [3, 0]])
    assert same_bits(weight.look_up(ids), expected[ids])
    if kernels_used != "reference":
        assert same_bits(torch.cat([tile.clone() for tile in weight._native_tiles(torch.float32)]), expected)
        rounded = torch.cat([tile.clone() for tile in weight._native_tiles(torch.bfloat16)])
        assert torch.equal(rounded, expected.bfloat16())


def test_rows_of_sixteen_bits_have_any_length(kernels_used):
    for kind, size in [("f16", 1), ("bf16", 37), ("f16", 130)]:
        weight = weight_of(kind, 5, size)
        expected, x = theirs(weight), torch.randn(2, size)
        assert same_bits(weight.dequantize(), expected)
        assert torch.allclose(kernels.linear(x, weight), x @ expected.T, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(70, 256), (1, 512), (9, 4352)])
def test_products(kind, kernels_used, dtype, shape, monkeypatch):
    """Natively x is exact and sums are float32, so the difference is one rounding; tiles are rounded as x is."""
    monkeypatch.setattr(module, "NATIVE_TILE_BYTES", 100_000)  # several tiles
    weight = weight_of(kind, *shape)
    matrix, bias = theirs(weight).double(), torch.randn(shape[0]).to(dtype)
    for rows in (1, 2, 3, 4, 5, 8, 17):  # 17: dequantised tile by tile
        x = torch.randn(rows, shape[1]).to(dtype)
        exact = x.double() @ matrix.T + bias.double()
        y = kernels.linear(x, weight, bias)
        largest = (x.double().abs() @ matrix.abs().T).amax().item()
        exact_x = kernels_used != "reference" and rows <= weight.native_rows
        rounding = 2e-6 if dtype == torch.float32 else 2**-8 if exact_x else 2**-7
        assert y.dtype == dtype
        assert torch.allclose(y.double(), exact, rtol=1.01 * rounding, atol=(1e-6 if exact_x else rounding) * largest)
        assert not exact_x or torch.equal(kernels.linear(x[:1], weight, bias), y[:1])


@pytest.mark.parametrize("activation", [gated_gelu, gated_silu, relu2])
def test_experts_of_any_kinds(kernels_used, activation):
    """Gate and up in one kind, down in another, as files mix them."""
    gated = activation is not relu2
    for up_kind, down_kind in [("q4_k", "q6_k"), ("q5_0", "q8_0"), ("f16", "q2_k")]:
        up = stacked([weight_of(up_kind, 512 if gated else 256, 256, seed) for seed in range(4)])
        down = stacked([weight_of(down_kind, 256, 256, 10 + seed) for seed in range(4)])
        x, ids = torch.randn(3, 256) / 16, torch.tensor([[1, 3], [0, 1], [3, 2]])
        weights = torch.rand(3, 2)
        dense = (up.dequantize(), down.dequantize())
        expected = kernels.grouped_experts(x, weights, ids, *dense, activation)
        y = kernels.grouped_experts(x, weights, ids, up, down, activation)
        assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5 * expected.abs().amax().item())


def test_one_call_takes_a_gated_mlp_of_two_kinds(kernels_used, monkeypatch):
    gate, up, down = (weight_of(k, 256, 256, i) for i, k in enumerate(("q4_1", "q4_1", "q6_k")))
    x = torch.randn(2, 256) / 16
    expected = kernels.gated_mlp(x, gate.dequantize(), up.dequantize(), down.dequantize(), "silu")
    if kernels_used != "reference":
        monkeypatch.setattr(module.PackedWeight, "matmul", None)
    y = kernels.gated_mlp(x, gate, up, down, "silu")
    assert torch.allclose(y, expected, rtol=1e-4, atol=1e-5 * expected.abs().amax().item())


@pytest.mark.parametrize("number", [float("inf"), float("nan"), -float("inf")])
def test_a_scale_that_is_not_finite_is_seen(kind, kernels_used, number):
    places = HALVES.get(kind, (0,))
    for at in places:
        weight = weight_of(kind, 3, 512)
        assert weight.has_finite_scales()
        dtype = torch.bfloat16 if kind == "bf16" else torch.float16
        last = weight.codes.view(-1, BLOCKS[kind][1])[-1]
        last[at : at + 2] = torch.tensor([number], dtype=dtype).view(torch.uint8)
        assert not weight.has_finite_scales()
