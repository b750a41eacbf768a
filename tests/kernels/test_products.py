"""Products with weights against float64: by torch in their own type and through float32, and by the native kernels."""

import pytest
import torch
from torch.nn.functional import gelu

from sparing import kernels
from sparing.kernels import dispatch
from sparing.kernels import products as module
from tests.kernel_sets import using

PAIRED = "avx512_bf16"  # the set whose products of many rows are native
SHAPES = [((1, 24), 40), ((3, 24), 40), ((4, 24), 40), ((2, 5, 24), 7), ((17, 300), 129), ((0, 24), 5)]


@pytest.fixture(params=["native", "widened", "widened in small pieces"])
def way(request, monkeypatch):
    native = request.param == "native"
    monkeypatch.setattr(module, "_has_arithmetic", lambda dtype: native or dtype == torch.float32)
    if request.param.endswith("pieces"):
        monkeypatch.setattr(module, "PIECE_BYTES", 4000)
    with using("reference"):
        yield request.param


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(("shape", "size"), SHAPES)
def test_linear(way, dtype, has_bias, shape, size):
    """The widened way is as exact as one rounding of the result allows."""
    x = torch.randn(shape).to(dtype)
    weight, bias = torch.randn(size, shape[-1]).to(dtype), torch.randn(size).to(dtype) if has_bias else None
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    out = kernels.linear(x, weight, bias)
    assert out.dtype == dtype and out.shape == exact.shape
    rounding = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    assert torch.allclose(out.double(), exact, rtol=rounding, atol=8 * rounding)
    if way != "native" and dtype != torch.float32 and x.numel() >= module.FEW_ROWS * x.shape[-1]:
        assert torch.allclose(out.double(), exact, rtol=0.51 * rounding, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", [None, "gelu", "silu"])
@pytest.mark.parametrize(("shape", "size"), [((3, 24), 40), ((2, 9, 512), 300)])  # the second one is oneDNN's
def test_linear_with_activation(way, dtype, activation, shape, size):
    """As exact as the product alone; and with gradients to follow, the same numbers to rounding."""
    x, weight, bias = (torch.randn(s).to(dtype) for s in (shape, (size, shape[-1]), (size,)))
    exact = torch.nn.functional.linear(x.double(), weight.double(), bias.double())
    if activation is not None:
        exact = torch.nn.functional.silu(exact) if activation == "silu" else gelu(exact, approximate="tanh")
    rounding = 2e-5 if dtype == torch.float32 else torch.finfo(dtype).eps
    for follows in (False, True):
        with torch.set_grad_enabled(follows):
            out = kernels.linear(x, weight, bias, activation)
        assert out.dtype == dtype and out.shape == exact.shape
        assert torch.allclose(out.double(), exact, rtol=2 * rounding, atol=8 * rounding)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weighted_rows(way, dtype):
    weights, table = torch.rand(5, 200).softmax(-1).to(dtype), torch.randn(200, 24).to(dtype)
    out = kernels.weighted_rows(weights, table)
    assert out.dtype == torch.float32
    tolerance = 1e-6 if dtype == torch.float32 or way != "native" else 8e-3
    assert torch.allclose(out.double(), weights.double() @ table.double(), atol=tolerance)


@pytest.mark.parametrize("causal", [True, False])
def test_attention(way, causal):
    """Attention in bfloat16 too, in the type that the CPU can multiply."""
    q, k, v = (torch.randn(shape).bfloat16() for shape in ((6, 4, 16), (2, 9, 16), (2, 9, 16)))
    exact = kernels.attention(q.double(), k.double(), v.double(), scale=0.25, causal=causal)
    out = kernels.attention(q, k, v, scale=0.25, causal=causal)
    assert out.dtype == torch.bfloat16
    assert torch.allclose(out.double(), exact, atol=2e-2 if way == "native" else 8e-3)


def test_gradients_flow(way):
    x = torch.randn(6, 24, dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(40, 24, dtype=torch.bfloat16, requires_grad=True)
    kernels.linear(x, weight).sum().backward()
    assert x.grad is not None and weight.grad is not None
    assert torch.allclose(x.grad.float(), weight.detach().float().sum(0).expand(6, -1), atol=0.1, rtol=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize("size", [1, 7, 8, 31, 64, 65, 200, 1000])
def test_few_rows(native_kernel_set, dtype, has_bias, size):
    """As exact as float32 sums and one rounding of the result allow; odd sizes, any number of rows."""
    outs = 37
    weight, bias = torch.randn(outs, size).to(dtype), torch.randn(outs).to(dtype) if has_bias else None
    x = torch.randn(2, module.NATIVE_ROWS // 2, size).to(dtype)
    exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
    out = kernels.linear(x, weight, bias)
    assert out.dtype == dtype and out.shape == exact.shape
    rounding = 2e-6 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    assert torch.allclose(out.double(), exact, rtol=rounding, atol=3e-6 * size**0.5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_row_does_not_depend_on_how_many_there_are(native_kernel_set, dtype):
    x, weight = torch.randn(module.NATIVE_ROWS, 300).to(dtype), torch.randn(50, 300).to(dtype)
    alone = torch.cat([kernels.linear(row[None], weight) for row in x])
    for rows in range(1, module.NATIVE_ROWS + 1):
        assert torch.equal(kernels.linear(x[:rows], weight), alone[:rows])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
def test_few_rows_through_an_activation(native_kernel_set, dtype, activation):
    """Also far out, where the sigmoid ends; rounded once, so closer than an activation of the rounded product."""
    x, weight, bias = torch.randn(3, 40).to(dtype), torch.randn(100, 40).to(dtype), torch.zeros(100, dtype=dtype)
    bias[:20], bias[20:40] = -200.0, 200.0
    out = kernels.linear(x, weight, bias, activation)
    exact = module.activate(torch.nn.functional.linear(x.double(), weight.double(), bias.double()), activation)
    rounding = 2e-6 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    assert torch.allclose(out.double(), exact, rtol=rounding, atol=2e-5)


def test_few_rows_however_they_lie(native_kernel_set):
    wide, weight = torch.randn(6, 200), torch.randn(30, 100)
    for x in (wide[:, :100], wide[::2, 100:], wide.T[:6, :6].repeat(1, 17)[:, :100], wide[0, :100].expand(4, 100)):
        assert torch.allclose(kernels.linear(x, weight), torch.nn.functional.linear(x, weight), atol=1e-4)
    columns = torch.randn(200, 3).T[:, ::2]  # neither dimension contiguous
    assert torch.allclose(kernels.linear(columns, weight), torch.nn.functional.linear(columns, weight), atol=1e-4)
    sparse = torch.randn(30, 200)[:, ::2]
    assert torch.allclose(kernels.linear(columns, sparse), torch.nn.functional.linear(columns, sparse), atol=1e-4)
    assert kernels.linear(wide[0, :100], weight).shape == (30,)


def test_few_rows_of_unusual_numbers(native_kernel_set):
    """Infinities and NaN arrive as torch gives them; small numbers are not lost."""
    weight = torch.tensor([[1.0, 1.0], [1.0, -1.0], [0.0, 1.0]]).bfloat16()
    x = torch.tensor([[float("inf"), float("inf")], [float("nan"), 1.0], [1e-30, 0.0]]).bfloat16()
    expected = torch.nn.functional.linear(x, weight)
    assert torch.equal(kernels.linear(x, weight).isnan(), expected.isnan())
    assert torch.equal(kernels.linear(x, weight).nan_to_num(), expected.nan_to_num())


MANY = [(9, 32, 1), (16, 96, 31), (17, 64, 33), (65, 320, 200), (200, 128, 70), (1100, 2080, 9), (70, 17024, 35)]


@pytest.mark.parametrize("activation", [None, "silu", "gelu"])
@pytest.mark.parametrize(("rows", "size", "outs"), MANY)
def test_many_rows(native_kernel_set, activation, rows, size, outs):
    """As exact as float32 sums and one rounding allow where pairs are multiplied: panels of all sizes, any outputs."""
    x, weight, bias = (torch.randn(shape).bfloat16() for shape in ((rows, size), (outs, size), (outs,)))
    other, other_bias = torch.randn(outs, size).bfloat16(), torch.randn(outs).bfloat16()
    once = 0.51 if module._multiplies_pairs(x.dtype) else 2
    rounding, small = once * torch.finfo(x.dtype).eps, 6e-6 * size**0.5 * (1 if once < 1 else 1000)
    for bias_1, bias_2 in ((None, None), (bias, other_bias)):
        exact, factor = (
            torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
            for w, b in ((weight, bias_1), (other, bias_2))
        )
        exact = module.activate(exact, activation)
        out = kernels.linear(x, weight, bias_1, activation)
        assert out.dtype == x.dtype and out.shape == exact.shape
        assert torch.allclose(out.double(), exact, rtol=rounding, atol=small)
        if activation is not None:
            out = kernels.gated(x, weight, other, activation, bias_1, bias_2)
            tolerance = rounding * (exact * factor).abs() + small * (1 + exact.abs() + factor.abs())
            assert ((out.double() - exact * factor).abs() <= tolerance).all()


@pytest.fixture
def paired_kernels(monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)  # where oneDNN has tiles, it goes first
    with using(PAIRED):
        yield


@pytest.mark.skipif(PAIRED not in dispatch.available(), reason="the CPU multiplies no pairs of bfloat16 numbers")
def test_a_row_depends_neither_on_the_others_nor_on_the_threads(paired_kernels):
    x, weight, other = (torch.randn(n, 96).bfloat16() for n in (200, 700, 700))
    whole, threads = kernels.linear(x, weight), torch.get_num_threads()
    for rows in (9, 31, 33, 64, 80, 112):
        assert torch.equal(kernels.linear(x[:rows], weight), whole[:rows])
        assert torch.equal(kernels.linear(x[-rows:], weight), whole[-rows:])
    assert torch.equal(kernels.linear(x, weight[100:135]), whole[:, 100:135])
    try:
        torch.set_num_threads(3)
        assert torch.equal(kernels.linear(x, weight), whole)
        assert torch.equal(kernels.linear_pair(x, other, weight)[1], whole)
    finally:
        torch.set_num_threads(threads)


def test_many_rows_of_unusual_numbers(native_kernel_set):
    """Infinities and NaN stay in their row and arrive as torch gives them; padded rows do not leak."""
    x, weight = torch.randn(37, 64).bfloat16(), torch.randn(50, 64).bfloat16()
    plain = kernels.linear(x, weight)
    x[3, 5], x[36, 0], x[20, 7] = float("nan"), float("inf"), 1e-30
    out, expected = kernels.linear(x, weight), torch.nn.functional.linear(x, weight)
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())
    untouched = [i for i in range(37) if i not in (3, 20, 36)]
    assert torch.equal(out[untouched], plain[untouched])
    assert torch.equal(kernels.linear(x.T.contiguous().T, weight).nan_to_num(), out.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("has_bias", [False, True])
@pytest.mark.parametrize(
    ("shape", "size"), [((1, 24), 40), ((3, 300), 7), ((2, 4, 64), 2000), ((20, 24), 40), ((90, 64), 70), ((0, 24), 5)]
)
def test_two_weights_in_one_call(each_kernel_set, dtype, has_bias, shape, size):
    """A pair is two products, to the bit; a gated product is as exact as its two factors rounded."""
    x = torch.randn(shape).to(dtype)
    weights = [torch.randn(size, shape[-1]).to(dtype) for _ in range(2)]
    biases = [torch.randn(size).to(dtype) if has_bias else None for _ in range(2)]
    pair = kernels.linear_pair(x, *weights, *biases)
    for out, weight, bias in zip(pair, weights, biases, strict=True):
        assert torch.equal(out, kernels.linear(x, weight, bias))
    pair = kernels.linear_pair(x, *weights, *biases, wide=True)
    for out, weight, bias in zip(pair, weights, biases, strict=True):
        exact = torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert out.dtype == torch.float32 and torch.allclose(out.double(), exact, rtol=1e-5, atol=1e-4)
    for activation in ("silu", "gelu"):
        gate, up = (
            torch.nn.functional.linear(x.double(), weight.double(), None if bias is None else bias.double())
            for weight, bias in zip(weights, biases, strict=True)
        )
        out = kernels.gated(x, *weights, activation, *biases)
        assert out.dtype == dtype and out.shape == pair[0].shape
        rounding = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
        exact = module.activate(gate, activation) * up
        scale = 1 + up.abs().amax() if up.numel() else 1.0
        assert torch.allclose(out.double(), exact, rtol=rounding, atol=float(4 * rounding * scale))


def test_two_weights_of_other_kinds(each_kernel_set):
    """One that is no tensor, and one that training follows."""
    x, weight = torch.randn(2, 24), torch.randn(40, 24)

    class Doubled:
        shape = weight.shape

        def matmul(self, x, bias=None):
            return torch.nn.functional.linear(x, 2 * weight, bias)

    plain, doubled = kernels.linear_pair(x, weight, Doubled())
    assert torch.allclose(doubled, 2 * plain, atol=1e-4)
    gate = torch.nn.functional.silu(doubled)
    assert torch.allclose(kernels.gated(x, Doubled(), weight, "silu"), gate * plain, atol=1e-3)
    follows = weight.clone().requires_grad_()
    kernels.gated(x, follows, follows, "gelu").sum().backward()
    assert follows.grad is not None and follows.grad.any()
    shorter = torch.randn(8, 24)
    assert [len(out[0]) for out in kernels.linear_pair(x, weight, shorter)] == [40, 8]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("groups", "size", "outs"), [(1, 40, 33), (3, 65, 20), (8, 256, 64)])
@pytest.mark.parametrize("tokens", [0, 1, 2, 8, 9, 50])
def test_products_in_groups(native_kernel_set, dtype, groups, size, outs, tokens):
    """Each as alone, to the bit; few rows also by any number of threads."""
    x = torch.randn(groups, tokens, size).to(dtype).transpose(0, 1)
    weight = torch.randn(groups * outs, size).to(dtype).unflatten(0, (groups, -1))
    out = kernels.grouped_linear(x, weight)
    assert out.dtype == dtype and out.shape == (tokens, groups, outs)
    exact = torch.einsum("tgi,goi->tgo", x.double(), weight.double())
    rounding = 2e-6 if dtype == torch.float32 else 0.51 * torch.finfo(dtype).eps
    few = tokens <= module.NATIVE_ROWS or dtype == torch.float32
    assert torch.allclose(
        out.double(), exact, rtol=rounding * (1 if few else 2), atol=3e-6 * size**0.5 * (1 if few else 99)
    )
    alone = [kernels.linear(x[:, g], weight[g]) for g in range(groups)]
    assert torch.equal(out, torch.stack(alone, 1))
    if tokens <= module.NATIVE_ROWS:
        torch.set_num_threads(3)
        assert torch.equal(kernels.grouped_linear(x, weight), out)
        torch.set_num_threads(1)


def test_gradients_in_groups():
    x, weight = torch.randn(4, 3, 10, requires_grad=True), torch.randn(3, 5, 10, requires_grad=True)
    up = torch.randn(4, 3, 5)
    found = torch.autograd.grad((kernels.grouped_linear(x, weight) * up).sum(), (x, weight))
    expected = torch.einsum("tgo,goi->tgi", up, weight), torch.einsum("tgo,tgi->goi", up, x)
    for mine, exact in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("activation", ["silu", "gelu"])
@pytest.mark.parametrize(("rows", "size", "outs"), [(1, 40, 33), (8, 65, 20), (12, 64, 70), (70, 96, 33)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_gates_that_are_cut_off(native_kernel_set, dtype, activation, rows, size, outs, has_bias):
    x = torch.randn(rows, size).to(dtype)
    (gate, gate_bias), (up, up_bias) = (
        (torch.randn(outs, size).to(dtype), torch.randn(outs).to(dtype)) for _ in range(2)
    )
    if not has_bias:
        gate_bias = up_bias = None
    limit = 2.5
    out = kernels.gated(x, gate, up, activation, gate_bias, up_bias, limit)
    left, right = (
        torch.nn.functional.linear(x.double(), w.double(), None if b is None else b.double())
        for w, b in ((gate, gate_bias), (up, up_bias))
    )
    assert (left > limit).any() and (right < -limit).any() and (left < -limit).any()
    exact = module.activate(left.clamp(max=limit), activation) * right.clamp(-limit, limit)
    rounding = 1e-5 if dtype == torch.float32 else 2 * torch.finfo(dtype).eps
    assert out.dtype == dtype and torch.allclose(out.double(), exact, rtol=rounding, atol=limit * rounding)
