"""The Triton kernel, interpreted on the CPU, against the plain function; and that it compiles for a GPU."""

import itertools

import pytest
import torch

from sparing.kernels import codes, dispatch
from sparing.kernels.code_layout import BLOCK, lay_out
from sparing.memory.turboquant.codebook import lloyd_max_codebook
from tests.kernel_sets import using
from tests.kernels.gpu import compiled

gpu = pytest.importorskip("sparing.kernels.gpu.codes", reason="Triton is not installed", exc_type=ImportError)

KV_HEADS = 2
GROUPS = (1, 3, 4, 8)
SHAPES = list(itertools.product((2, 3, 4), (64, 80, 128, 256), (1, 15, 64, 65, 200)))


def part(n: int, dims: int, bits: int, role: str) -> codes.Codes:
    """Random codes in a larger buffer, as a memory lends them; what stands after the last token must not matter."""
    blocks = -(-n // BLOCK)
    scale = torch.full((KV_HEADS, blocks * BLOCK), torch.inf).half()
    scale[:, :n] = 0.2 + torch.rand(KV_HEADS, n)
    laid_out = lay_out(torch.randint(0, 1 << bits, (KV_HEADS, n, dims)).to(torch.uint8), bits, role)
    roomy = torch.full((KV_HEADS, blocks + 1, laid_out.shape[-1]), 255, dtype=torch.uint8)
    roomy[:, :blocks] = laid_out
    centroids = lloyd_max_codebook(dims, bits)[0].float() * dims**0.5
    return codes.Codes(roomy[:, :blocks], scale.unflatten(1, (blocks, BLOCK)), centroids, dims)


def check(q, keys, values, n, **options) -> None:
    with using("reference"):
        expected, expected_lse = codes.attention_over_codes(q, keys, values, n, **options)
    out, lse = gpu.attention_over_codes(q, keys, values, n, **options)
    torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("i", "shape"), list(enumerate(SHAPES)), ids=[str(shape) for shape in SHAPES])
def test_one_query(i, shape):
    bits, dims, n = shape
    group = GROUPS[(i + i // 20) % len(GROUPS)]  # every group with every bits, size and length
    q = torch.randn(1, KV_HEADS * group, dims) / dims**0.5
    check([q], [part(n, dims, bits, "keys")], [part(n, dims, bits, "values")], n, scale=0.7)


@pytest.mark.parametrize("bits", [1, 5, 6, 7, 8])
def test_other_numbers_of_bits(bits):
    q = torch.randn(1, KV_HEADS * 2, 48) / 7
    check([q], [part(70, 48, bits, "keys")], [part(70, 16, 9 - bits, "values")], 70)


def test_several_queries_parts_and_a_bias():
    n, dims = 130, (16, 48)
    keys = [part(n, d, bits, "keys") for d, bits in zip(dims, (3, 1), strict=True)]
    values = [part(n, d, bits, "values") for d, bits in ((20, 2), (32, 1))]
    q = [torch.randn(KV_HEADS * 3, 5, d).transpose(0, 1) / 8 for d in dims]  # not contiguous
    check(q, keys, values, n, scale=1.3, bias=torch.randn(5, KV_HEADS * 3, n))


def test_float32_scales():
    keys, values = (part(65, 32, 4, role) for role in ("keys", "values"))
    keys, values = (part._replace(scale=part.scale.float()) for part in (keys, values))
    check([torch.randn(1, KV_HEADS, 32)], [keys], [values], 65)


def test_which_twin_runs(monkeypatch):
    """The public function asks for the twin of GPUs, which leaves what is too large to the plain function."""
    assert dispatch.on_gpu("codes", torch.ones(1)) is None
    keys, values = (part(65, 32, 4, role) for role in ("keys", "values"))
    calls = []

    def counted(*args, **options):
        calls.append(len(args[0][0]))
        return gpu.attention_over_codes(*args, **options)

    monkeypatch.setattr(dispatch, "on_gpu", lambda name, *tensors: Twin if name == "codes" else None)
    Twin = type("Twin", (), {"takes": staticmethod(gpu.takes), "attention_over_codes": staticmethod(counted)})
    for tokens, dtype in ((4, torch.float32), (200, torch.float32), (4, torch.float64)):
        out, _ = codes.attention_over_codes([torch.randn(tokens, KV_HEADS, 32, dtype=dtype)], [keys], [values], 65)
        assert out[0].shape == (tokens, KV_HEADS, 32)
    assert calls == [4]


def test_compiles_for_a_gpu(tmp_path):
    shared = compiled.shared_memory("codes", tmp_path)
    assert len(shared) == 2 and max(shared) <= compiled.SHARED_MEMORY
