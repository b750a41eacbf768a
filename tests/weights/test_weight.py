"""Packed weights: products against the dequantised matrix, stacks, streaming, and what moves and what stays."""

import itertools

import pytest
import torch

from sparing import kernels
from sparing.config.formats import FORMATS, format_loaded, packed_nbytes, stays_packed
from sparing.config.roles import ROLES
from sparing.kernels import dispatch
from sparing.kernels.experts import gated_gelu, gated_silu, relu2
from sparing.weights import weight as module
from sparing.weights.fp8 import fp8_quantize
from sparing.weights.nvfp4 import nvfp4_quantize
from sparing.weights.weight import empty_packed, packed_class
from tests.kernel_sets import using
from tests.weights.every_code import KINDS, stacked, weight_of

INF = float("inf")


def packed(format, w, tile=None, watch=None):
    """w quantised, given in tiles of that many rows."""
    weight = empty_packed(format, w.shape)
    rows = w.reshape(-1, w.shape[-1])
    weight.fill(lambda: iter(rows.split(tile or len(rows))), watch)
    return weight


@pytest.fixture(params=sorted(FORMATS))
def format(request):
    return request.param


def test_bytes_are_those_of_the_table(format):
    for shape in [(40, 64), (3, 40, 64)]:
        weight = packed(format, torch.randn(shape))
        assert weight.nbytes == packed_nbytes(format, shape)
        assert weight.shape == shape and weight.ndim == len(shape) and len(weight) == shape[0]
        assert {n: (str(b.dtype).removeprefix("torch."), tuple(b.shape)) for n, b in weight.named_buffers()} == FORMATS[
            format
        ].layout(shape)


@pytest.fixture(params=dispatch.available())
def kernels_used(request):
    with using(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(300, 96), (1, 32), (7, 1024), (129, 2080), (3, 4704)])
@pytest.mark.parametrize("kind", KINDS)
def test_every_code_in_every_kernel(kind, kernels_used, dtype, shape, monkeypatch):
    """Natively x is exact and sums are float32, so the difference is one rounding; tiles are rounded as x is."""
    monkeypatch.setattr(module, "NATIVE_TILE_BYTES", 100_000)  # several tiles
    weight = weight_of(kind, *shape)
    matrix = weight.dequantize().double()
    bias = torch.randn(shape[0]).to(dtype)
    for rows in (1, 2, 3, 4, 5, 8, 17):  # 17: dequantised tile by tile
        x = torch.randn(rows, shape[1]).to(dtype)
        exact = x.double() @ matrix.T + bias.double()
        y = kernels.linear(x, weight, bias)
        largest = (x.double().abs() @ matrix.abs().T).amax().item()
        exact_x = kernels_used != "reference" and rows <= weight.native_rows
        rounding = 2e-6 if dtype == torch.float32 else 2**-8 if exact_x else 2**-7
        assert y.dtype == dtype
        assert torch.allclose(
            y.double(),
            exact,
            rtol=1.01 * rounding,
            atol=(1e-6 if exact_x else rounding) * largest,
        )
        assert not exact_x or torch.equal(kernels.linear(x[:1], weight, bias), y[:1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [(1,), (7,), (2, 3), (0,), (300,)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_matmul_multiplies_with_the_dequantised_matrix(format, dtype, rows, has_bias, monkeypatch):
    monkeypatch.setattr(module, "TILE_BYTES", 100_000)  # several tiles
    weight = packed(format, torch.randn(300, 96))
    x, bias = torch.randn(*rows, 96).to(dtype), torch.randn(300).to(dtype) if has_bias else None
    y = kernels.linear(x, weight, bias)
    exact = x.double() @ weight.dequantize().double().T + (0 if bias is None else bias.double())
    assert y.dtype == dtype and y.shape == exact.shape
    rounding = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-10}[dtype]
    assert torch.allclose(y.double(), exact, rtol=rounding, atol=32 * rounding)


def test_close_to_the_original(format):
    w, x = torch.randn(64, 256), torch.randn(5, 256)
    error = (kernels.linear(x, packed(format, w)) - x @ w.T).norm() / (x @ w.T).norm()
    assert error < {"int8": 0.012, "fp8": 0.04, "int4": 0.11, "nvfp4": 0.12, "mxfp4": 0.14}[format]


@pytest.mark.parametrize("tile", [1, 7, 40])
def test_streaming_in_any_tiles_gives_the_same_bits(format, tile):
    w = torch.randn(3, 40, 64) * torch.tensor([1.0, 30.0, 0.01])[:, None, None]
    whole = packed(format, w)
    for name, part in packed(format, w, tile).named_buffers():
        assert torch.equal(part.view(torch.uint8), dict(whole.named_buffers())[name].view(torch.uint8))


@pytest.mark.parametrize(
    ("format", "scales", "step"), [(f, scales, n) for f in FORMATS for scales, n in FORMATS[f].scales.items()]
)
def test_every_choice_of_scales_is_filled_as_the_whole_matrix_is(format, scales, step):
    """In tiles that start where rows that share a scale do; also when the rows of a stack come in one tile."""
    quantise = {"fp8": fp8_quantize, "nvfp4": nvfp4_quantize}[format]
    w = torch.randn(3, 400, 160) * torch.tensor([1.0, 30.0, 0.01])[:, None, None]
    stack = empty_packed(format, w.shape, scales=scales)
    stack.fill(lambda: iter([w.view(1200, 160)]) if step == 1 else iter(w), scales=scales)
    for e in range(3):
        parts = dict(zip(("codes", "scale", "scale_2"), quantise(w[e], scales), strict=False))
        alone = empty_packed(format, w[e].shape, scales=scales)
        alone.fill(lambda e=e: iter(w[e].split(57 if step == 1 else step)), scales=scales)
        for weight in (alone, stack[e]):
            for name, part in weight.named_buffers():
                assert part.shape == parts[name].shape and torch.equal(part.float(), parts[name].float())


def test_each_matrix_of_a_stack_is_its_own(format):
    """Of the same bits as alone, also where it is filled alone, and multiplied without a copy."""
    w = torch.randn(3, 40, 64) * torch.tensor([1.0, 30.0, 0.01])[:, None, None]
    stack, one_by_one = packed(format, w), empty_packed(format, w.shape)
    for e in range(3):
        one_by_one[e].fill(lambda e=e: iter([w[e]]))
        assert torch.equal(stack[e].dequantize(), packed(format, w[e]).dequantize())
        assert stack[e].codes.data_ptr() == stack.codes[e].data_ptr()
        assert stack[e] is stack[e]
    assert torch.equal(one_by_one.dequantize(), stack.dequantize())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "limit"), [(gated_gelu, INF), (relu2, INF), (gated_silu, 1.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_experts_in_every_kernel(kind, activation, limit, kernels_used, dtype):
    """Few tokens in one native call, more of them expert by expert. One expert gets most tokens, one none."""
    size, width, experts, k = 96, 160, 5, 2
    outs, options = width if activation is relu2 else 2 * width, () if limit == INF else (limit,)
    up, down = (stacked([weight_of(kind, *shape) for _ in range(experts)]) for shape in ((outs, size), (size, width)))
    for tokens in (1, 3, 8, 11):
        ids = torch.stack([torch.randperm(experts - 1)[:k] for _ in range(tokens)])
        ids[: tokens // 2, 0], ids[: tokens // 2, 1] = 2, 0
        x, weights = torch.randn(tokens, size).to(dtype), torch.rand(tokens, k)
        exact = torch.zeros(tokens, size, dtype=torch.float64)
        largest = torch.zeros_like(exact)
        for t, j in itertools.product(range(tokens), range(k)):
            u, d = (stack[int(ids[t, j])].dequantize().double() for stack in (up, down))
            hidden = activation(u @ x[t].double(), *options)
            exact[t] += weights[t, j] * (d @ hidden)
            largest[t] += weights[t, j] * (d.abs() @ hidden.abs())
        y = kernels.grouped_experts(x, weights, ids, up, down, activation, limit)
        rounding = 2e-6 if dtype == torch.float32 else 2**-6
        assert y.dtype == dtype and bool(((y.double() - exact).abs() <= rounding * largest.amax()).all())
        if kernels_used != "reference" and tokens <= 8:  # a token's output does not depend on the others
            alone = kernels.grouped_experts(x[:1], weights[:1], ids[:1], up, down, activation, limit)
            assert torch.equal(alone, y[:1])


@pytest.mark.parametrize("kind", KINDS)
def test_packed_mlp_in_every_kernel(kind, kernels_used):
    up, down = weight_of(kind, 160, 96), weight_of(kind, 96, 160)
    for tokens in (1, 8, 9):
        x = torch.randn(tokens, 96)
        hidden = relu2(x.double() @ up.dequantize().double().T)
        exact = hidden @ down.dequantize().double().T
        y = kernels.squared_mlp(x, up, down)
        assert torch.allclose(y.double(), exact, rtol=1e-5, atol=1e-5 * exact.abs().max().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("activation", "limit"), [("silu", 1.5), ("silu", INF), ("gelu", 1.5)])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_gated_mlp_in_every_kernel(kind, activation, limit, kernels_used, dtype):
    """Of gate and up apart: few tokens in one native call, rounded once between the products."""
    gate, up, down = weight_of(kind, 160, 96), weight_of(kind, 160, 96), weight_of(kind, 96, 160)
    parts = [w.dequantize().double() for w in (gate, up, down)]
    for tokens in (1, 3, 8, 9):
        x = torch.randn(tokens, 96).to(dtype)
        units = torch.cat([x.double() @ part.T for part in parts[:2]], -1)
        hidden = (gated_silu if activation == "silu" else gated_gelu)(units, limit)
        exact, largest = hidden @ parts[2].T, (hidden.abs() @ parts[2].abs().T).amax().item()
        y = kernels.gated_mlp(x, gate, up, down, activation, limit)
        rounding = 2e-6 if dtype == torch.float32 else 2**-6
        assert y.dtype == dtype and torch.allclose(y.double(), exact, rtol=0, atol=rounding * largest)
        if kernels_used != "reference" and tokens <= 8:
            assert torch.equal(kernels.gated_mlp(x[:1], gate, up, down, activation, limit), y[:1])
            torch.set_num_threads(3)
            assert torch.equal(kernels.gated_mlp(x, gate, up, down, activation, limit), y)
            torch.set_num_threads(1)


def test_a_gated_mlp_of_two_formats():
    gate, up, down = (packed(f, torch.randn(64, 64) / 8) for f in ("nvfp4", "int8", "int8"))
    x = torch.randn(2, 64)
    expected = kernels.gated_mlp(x, *(w.dequantize() for w in (gate, up, down)), "silu", 0.5)
    assert torch.allclose(kernels.gated_mlp(x, gate, up, down, "silu", 0.5), expected, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_packed_products_in_groups(kind, kernels_used, dtype):
    """Each as alone, to the bit; few rows also by any number of threads."""
    groups, out, size = 3, 150, 96
    weight = stacked([weight_of(kind, out, size) for _ in range(groups)])
    for tokens in (0, 1, 3, 8, 17):
        x = torch.randn(tokens, groups, size).to(dtype)
        y = kernels.grouped_linear(x, weight)
        assert y.dtype == dtype and y.shape == (tokens, groups, out)
        assert torch.equal(y, torch.stack([kernels.linear(x[:, g], weight[g]) for g in range(groups)], 1))
        if tokens <= 8:
            torch.set_num_threads(3)
            assert torch.equal(kernels.grouped_linear(x, weight), y)
            torch.set_num_threads(1)


def test_experts_of_two_formats():
    x, ids, weights = torch.randn(2, 64), torch.tensor([[0, 2], [1, 0]]), torch.rand(2, 2)
    a, b = packed("nvfp4", torch.randn(3, 64, 64) / 8), packed("int8", torch.randn(3, 64, 64) / 8)
    expected = kernels.grouped_experts(x, weights, ids, a.dequantize(), b.dequantize(), relu2)
    assert torch.allclose(kernels.grouped_experts(x, weights, ids, a, b, relu2), expected, atol=1e-5)


def test_watching_sees_every_tile_and_what_it_became(format):
    w, seen = torch.randn(2, 10, 64), []
    weight = packed(format, w, 7, lambda tile, back: seen.append((tile, back)))
    assert torch.equal(torch.cat([tile for tile, _ in seen]), w.view(20, 64))
    assert torch.equal(torch.cat([back for _, back in seen]), weight.dequantize().view(20, 64))


def test_a_change_of_type_leaves_packed_numbers_alone(format):
    weight = packed(format, torch.randn(8, 64))
    before = weight.dequantize()
    model = torch.nn.Sequential(weight).to(torch.float64).bfloat16()
    assert torch.equal(weight.dequantize(), before)
    assert model.to("meta")[0].codes.is_meta


def test_gradients_reach_the_input(format):
    x = torch.randn(4, 64, requires_grad=True)
    weight = packed(format, torch.randn(8, 64))
    kernels.linear(x, weight).sum().backward()
    assert x.grad is not None
    assert torch.allclose(x.grad, weight.dequantize().sum(0).expand(4, -1), atol=1e-5)


@pytest.mark.parametrize("role", ROLES, ids=lambda role: role.name)
def test_what_is_packed(role, format):
    """Matrices whose inputs fit the blocks; of heads those that are read as a whole, in a format of their own."""
    inside = {"matrix", "experts", "self-conditioning", "self-conditioning up", "latent input", "latent output"}
    inside |= {f"{name} projection" for name in ("query", "key", "value", "output", "up", "down")}
    expected = "int8" if role.name in {"head", "tied table"} else format if role.name in inside else None
    assert format_loaded(role, (64, 64), format) == expected
    assert stays_packed(role, format, "float32") == (role.name in inside | {"head"})
    looked_up = {"embedding", "lookup", "hash table"}
    for block in ("q4_k", "bf16"):
        assert stays_packed(role, block, "float32") == (role.name in inside | {"head", "tied table"} | looked_up)
    assert not stays_packed(role, "bf16", "bfloat16") and not stays_packed(role, "f16", "float16")
    if role.is_matrix and FORMATS[format].block > 1:
        assert format_loaded(role, (64, 40), format) is None


def test_an_unknown_format_lists_all():
    with pytest.raises(ValueError, match="weights='int3' is not known, use int8, int4, nvfp4, mxfp4, fp8"):
        packed_class("int3")
