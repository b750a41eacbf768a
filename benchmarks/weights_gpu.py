"""Products with weights in few bits on a GPU, of 1 to 256 rows, against PyTorch's bfloat16 `F.linear`.

    python benchmarks/weights_gpu.py                      # needs a CUDA device
    TRITON_INTERPRET=1 python benchmarks/weights_gpu.py   # no timing: only that results agree

The matrices together are larger than the last-level cache, as in decoding. Before it is timed, every format is
multiplied and compared with PyTorch's product of the dequantised matrix.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from harness import finished, interleave, spread, triton_device, write_result
from sparing.config.formats import FORMATS
from sparing.kernels.gpu.packed import matmul
from sparing.weights.weight import PackedWeight, empty_packed

DEVICE = triton_device()
TIMED = DEVICE == "cuda"
OUT, IN, MATRICES = (14336, 4096, 8) if TIMED else (192, 256, 1)
ROWS = (1, 4, 16, 64, 256) if TIMED else (1, 65)
REPETITIONS = 50
TOLERANCE = 1e-2  # of the largest result: roundings of bfloat16
DENSE = "torch bfloat16 F.linear"


def quantised(format: str) -> PackedWeight:
    w = torch.randn(OUT, IN, device=DEVICE) / IN**0.5
    weight = empty_packed(format, w.shape, device=DEVICE)
    weight.fill(lambda: iter(w.split(4096)))
    return weight


def product(x: Tensor, weight: PackedWeight) -> Tensor:
    parts = dict(weight.named_buffers())
    return matmul(weight.format, parts["codes"], parts["scale"], parts.get("scale_2"), x)


def compare(x: Tensor, weight: PackedWeight) -> None:
    exact = F.linear(x.float(), weight.dequantize())
    error = float((product(x, weight).float() - exact).abs().max() / exact.abs().max())
    if error > TOLERANCE:
        raise SystemExit(f"{weight.format}, {len(x)} rows: off by {error:.2g}")


def each(call: Callable[[Any], Tensor], weights: list[Any]) -> None:
    for weight in weights:
        call(weight)


def main() -> None:
    torch.manual_seed(0)
    packed = {f"sparing {f}": [quantised(f) for _ in range(MATRICES)] for f in FORMATS}
    dense = [torch.randn(OUT, IN, device=DEVICE).bfloat16() for _ in range(MATRICES)]
    nbytes = {DENSE: dense[0].nbytes} | {side: weights[0].nbytes for side, weights in packed.items()}
    lines = []
    for rows in ROWS:
        x = torch.randn(rows, IN, device=DEVICE).bfloat16()
        for weights in packed.values():
            compare(x, weights[0])
        if not TIMED:
            print(f"{rows} rows: results agree; nothing is timed without a CUDA device")
            continue
        calls = {DENSE: partial(finished, partial(each, partial(F.linear, x), dense))}
        calls |= {s: partial(finished, partial(each, partial(product, x), weights)) for s, weights in packed.items()}
        interleave(calls, 3)
        seconds = interleave(calls, REPETITIONS)
        base = spread(seconds[DENSE])["median"]
        for side, times in seconds.items():
            taken = {name: value / MATRICES for name, value in spread(times).items()}
            speed = nbytes[side] / taken["median"]
            speedup = base / spread(times)["median"]
            lines.append({"rows": rows, "side": side, "seconds": taken, "bytes_per_second": speed, "speedup": speedup})
            print(f"{rows:4} rows  {side:24} {taken['median'] * 1e6:8.1f} us  {speed / 1e9:7.0f} GB/s  {speedup:5.2f}x")
    if TIMED:
        shape = {"matrices": MATRICES, "out": OUT, "in": IN}
        write_result("weights_gpu", {"gpu": torch.cuda.get_device_name(), **shape, "results": lines})


if __name__ == "__main__":
    main()
