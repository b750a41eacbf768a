"""NaN, infinities and every other bit pattern of codes and scales: every product gives what `dequantize` gives."""

import pytest
import torch

from sparing.kernels import experts, linear
from sparing.kernels.products import NATIVE_ROWS, look_up
from sparing.weights.fp8 import FP8Weight
from sparing.weights.integer import Int4Weight, Int8Weight
from sparing.weights.mxfp4 import MXFP4Weight
from sparing.weights.nvfp4 import NVFP4Weight
from sparing.weights.weight import PackedWeight
from tests.weights.every_code import stacked

INF, NAN = float("inf"), float("nan")
SPECIAL = torch.tensor([1.0, 0.0, -1.0, INF, -INF, NAN, 3e38, -2e37, 1e-44, 1e36])
BF16 = torch.arange(2**16, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)


def every_byte(count: int) -> torch.Tensor:
    return torch.arange(count).to(torch.uint8)


def weights(kind: str, size: int) -> PackedWeight:
    """[out, size]: rows of every scale over every code, and of every code (a row each) over a plain scale."""
    if kind == "int4":  # every 64th of 16 bits as a scale, and all around the largest
        special = torch.cat([BF16[::64], BF16[0x7DE0:0x7FA0:4]])
        scale = torch.full((len(special), size // 32), 2.0, dtype=torch.bfloat16)
        scale[:, size // 64] = special
        return Int4Weight(codes=every_byte(len(scale) * size // 2).view(len(scale), -1), scale=scale)
    if kind in ("nvfp4", "mxfp4"):
        block = {"nvfp4": 16, "mxfp4": 32}[kind]
        codes = torch.cat([every_byte(256 * size // 2), every_byte(256)[:, None].expand(-1, size // 2).flatten()])
        special = every_byte(256)[:, None].repeat(1, size // block)
        special[:, 1:] = 120  # one in a row: what is beside it stays as it is
        plain = torch.full_like(special, 60 if kind == "nvfp4" else 127)
        scale = torch.cat([special, plain]).contiguous()
        codes = codes.view(512, -1).contiguous()
        if kind == "mxfp4":
            return MXFP4Weight(codes=codes, scale=scale)
        return NVFP4Weight(codes=codes, scale=scale.view(torch.float8_e4m3fn), scale_2=torch.tensor(0.5))
    rows = 256 + len(SPECIAL)
    codes = torch.full((rows, size), 0x41, dtype=torch.uint8)
    codes[:256, size // 3] = every_byte(256)
    codes[256:] = every_byte(len(SPECIAL) * size).view(-1, size)
    if kind != "int8":
        codes[256:][(codes[256:] & 0x7F) == 0x7F] = 0
    scale = torch.cat([torch.full((256,), 0.5), SPECIAL])
    if kind == "int8":
        return Int8Weight(codes=codes.view(torch.int8), scale=scale)
    codes = codes.view(torch.float8_e4m3fn)
    if kind == "fp8 tensor":
        return FP8Weight(codes=codes, scale=torch.tensor(0.25))
    if kind == "fp8 block":
        scale = torch.ones(-(-rows // 128), -(-size // 128))
        scale[1, -1], scale[2, 0] = INF, NAN
        return FP8Weight(codes=codes, scale=scale)
    return FP8Weight(codes=codes, scale=scale)


SQUARE = 160
KINDS = ["int8", "int4", "nvfp4", "mxfp4", "fp8 tensor", "fp8 row", "fp8 block"]


def products(x: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """`x @ weight^T` in float64, and which results are known: sums far from float32's largest, and no infinity times a
    number below the normal ones, which bfloat16 arithmetic takes for 0."""
    each = [row.double() * weight.double() for row in x]
    finite = torch.stack([torch.where(one.isfinite(), one.abs(), 0.0).sum(-1) for one in each])
    is_tiny = ((weight != 0) & (weight.abs() < 1e-37)).any(-1)
    return torch.stack([one.sum(-1) for one in each]), (finite < 1e37) & ~(is_tiny & x.isinf().any(-1, keepdim=True))


def agree(found: torch.Tensor, expected: tuple[torch.Tensor, torch.Tensor], tolerance: float) -> None:
    found, wanted = (x[expected[1]] for x in (found.double(), expected[0]))
    assert len(found) > 0.7 * expected[1].numel()
    torch.testing.assert_close(found, wanted, rtol=tolerance, atol=1e-36, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [32, 160, 4224])
@pytest.mark.parametrize("kind", KINDS)
def test_products(kind, size, dtype, each_kernel_set):
    weight = weights(kind, size)
    if size > 1000 and kind != "fp8 block":  # some rows are enough of long ones
        weight = type(weight)(
            **{n: part[:: len(part) // 64].contiguous() if part.ndim else part for n, part in weight.named_buffers()}
        )
    dense = weight.dequantize()
    x = torch.rand(17, size).add(0.5).to(dtype)
    expected, tolerance = products(x.float(), dense), 1e-3 if dtype == torch.float32 else 0.1
    for rows in (1, 3, 17):
        agree(linear(x[:rows], weight), (expected[0][:rows], expected[1][:rows]), tolerance)
    x[0, size // 2], x[1, 3], x[2, 5] = NAN, INF, -INF
    agree(linear(x[:3], weight), products(x[:3].float(), dense), tolerance)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_looked_up(kind):
    weight = weights(kind, 288)
    ids = torch.randint(0, len(weight.codes), (50,))
    if kind.startswith("fp8") and kind != "fp8 row":
        return
    torch.testing.assert_close(look_up(ids, weight), weight.dequantize()[ids], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tokens", [1, NATIVE_ROWS + 3])
def test_experts(kind, tokens, each_kernel_set):
    up, down = (stacked([square(weights(kind, SQUARE), seed) for seed in (0, 1)]) for _ in range(2))
    x, ids = torch.rand(tokens, SQUARE), torch.arange(tokens)[:, None] % 2
    found = experts.grouped_experts(x, torch.ones(tokens, 1), ids, up, down, experts.relu2)
    hidden = torch.cat([products(x[t : t + 1], up.dequantize()[t % 2])[0] for t in range(tokens)]).float()
    hidden = experts.relu2(hidden)
    expected = torch.cat([products(hidden[t : t + 1], down.dequantize()[t % 2])[0] for t in range(tokens)])
    assert torch.equal(found.isnan(), expected.isnan())


def square(weight: PackedWeight, seed: int) -> PackedWeight:
    """As many rows of a weight as it has inputs, drawn at random."""
    size = weight.shape[1]
    rows = torch.randint(0, len(weight.codes), (size,), generator=torch.Generator().manual_seed(seed))
    parts = (
        {n: p[rows] if p.ndim and n not in weight.whole_parts else p for n, p in weight.named_buffers()}
        if not (weight.format == "fp8" and weight.scale.ndim == 2)
        else {"codes": weight.codes[:size], "scale": weight.scale[: -(-size // 128)]}
    )
    return type(weight)(**parts)


@pytest.mark.parametrize("rows", [1, 4])
@pytest.mark.parametrize("size", [64, 1024, 4224])
@pytest.mark.parametrize("kind", ["int8", "int4", "nvfp4", "mxfp4", "fp8 row"])
def test_what_is_rare_changes_its_own_row_alone(kind, size, rows, each_kernel_set):
    """A row that is multiplied with care leaves those that are read beside it as they were, to the bit."""
    weight = weights(kind, size)
    part = {n: p[:16].clone() if p.ndim else p for n, p in weight.named_buffers()}
    plain = {"int8": 0.5, "int4": 0.5, "nvfp4": 60, "mxfp4": 120, "fp8 row": 0.5}[kind]
    scale = part["scale"].view(torch.uint8) if kind == "nvfp4" else part["scale"]
    scale.fill_(plain)
    x = torch.randn(rows, size).to(torch.bfloat16)
    before = linear(x, type(weight)(**part))
    assert before.isfinite().all()
    (scale if scale.ndim == 1 else scale[:, -1])[5] = 0x7F if kind == "nvfp4" else 255 if kind == "mxfp4" else NAN
    after = linear(x, type(weight)(**part))
    assert after[:, 5].isnan().all()
    others = torch.arange(16) != 5
    assert torch.equal(after[:, others], before[:, others])
