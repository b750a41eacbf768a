"""The Triton kernels of packed weights, interpreted on the CPU, against the dequantised matrix; and compiled."""

import pytest
import torch

from sparing import kernels
from sparing.kernels import dispatch
from tests.kernels.gpu import compiled
from tests.weights.every_code import KINDS, weight_of

gpu = pytest.importorskip("sparing.kernels.gpu.packed", reason="Triton is not installed", exc_type=ImportError)

# One rounding of a weight or of a result. The interpreter cuts what the device rounds to bfloat16.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2**-7, torch.float16: 2**-11}


def parts(weight):
    tensors = dict(weight.named_buffers())
    return weight.format, tensors["codes"], tensors["scale"], tensors.get("scale_2")


def check(weight, x, bias=None):
    y = gpu.matmul(*parts(weight), x, bias)
    matrix = weight.dequantize().double()
    exact = x.double() @ matrix.T + (0 if bias is None else bias.double())
    largest = x.double().abs().reshape(-1, x.shape[-1]) @ matrix.abs().T
    assert y.dtype == x.dtype and y.shape == exact.shape
    error = (y.double() - exact).abs().view_as(largest)
    assert bool((error <= ROUNDING[x.dtype] * (largest + exact.abs().view_as(largest))).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_few_rows(kind, dtype):
    """More rows than a tile holds, inputs that end within a step, within a block of FP8 and in a step of their own."""
    for rows, out, size in [(1, 130, 96), (3, 70, 288), (17, 3, 160)]:
        x, bias = torch.randn(rows, size).to(dtype), torch.randn(out).to(dtype)
        check(weight_of(kind, out, size), x, bias)
        check(weight_of(kind, out, size), x.view(1, rows, size))


@pytest.mark.parametrize("kind", ["int8", "fp8 block"])
def test_any_number_of_inputs(kind):
    check(weight_of(kind, 5, 133), torch.randn(2, 133))
    check(weight_of(kind, 1, 1), torch.randn(2, 1))


@pytest.mark.parametrize("kind", KINDS)
def test_programs_that_share_the_inputs_of_a_weight(kind, monkeypatch):
    """A bias is added once; the inputs do not divide evenly."""
    monkeypatch.setattr(gpu, "multiprocessors", lambda device: 4)
    check(weight_of(kind, 70, 1184), torch.randn(2, 1184), torch.randn(70))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_many_rows_by_pieces_of_the_weight(kind, dtype, monkeypatch):
    monkeypatch.setattr(gpu, "PIECE_BYTES", 64 * 160 * dtype.itemsize)
    weight = weight_of(kind, 150, 160)
    pieces = [piece.clone() for piece in gpu.unpacked(*parts(weight), dtype)]
    assert [len(piece) for piece in pieces] == [64, 64, 22]
    matrix = weight.dequantize()
    assert torch.allclose(torch.cat(pieces).float(), matrix, rtol=ROUNDING[dtype], atol=0)
    check(weight, torch.randn(gpu.FEW_ROWS + 1, 160).to(dtype), torch.randn(150).to(dtype))


def test_powers_of_two_at_both_ends():
    weight = weight_of("mxfp4", 2, 32)
    weight.scale.copy_(torch.tensor([[0], [255]]))
    y = gpu.matmul(*parts(weight), torch.ones(1, 32))
    expected = weight.dequantize().sum(1)
    assert y[0, 0] == expected[0] and y[0, 1].isnan() and expected[1].isnan()


def test_which_twin_runs(monkeypatch):
    """Packed weights ask for the twin of GPUs, which leaves other types and no rows to the plain function."""
    weight = weight_of("nvfp4", 20, 32)
    assert dispatch.on_gpu("packed", torch.ones(1, 32)) is None
    calls = []

    def counted(*args):
        calls.append(args[4].dtype)
        return gpu.matmul(*args)

    Twin = type("Twin", (), {"takes": staticmethod(gpu.takes), "matmul": staticmethod(counted)})
    monkeypatch.setattr(dispatch, "on_gpu", lambda name, *tensors: Twin if name == "packed" else None)
    for rows, dtype in ((2, torch.bfloat16), (2, torch.float64), (0, torch.float32), (2, torch.float32)):
        assert kernels.linear(torch.randn(rows, 32, dtype=dtype), weight).shape == (rows, 20)
    assert calls == [torch.bfloat16, torch.float32]


def test_compiles_for_a_gpu(tmp_path):
    shared = compiled.shared_memory("packed", tmp_path)
    assert len(shared) == 13 and max(shared) <= compiled.SHARED_MEMORY
