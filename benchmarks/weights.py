"""Products with weights in few bits: one row and up to 256, against torch's own kernels, in bytes of weights a second.

    python benchmarks/weights.py [--matrices 24] [--repetitions 7]

The matrices together are larger than the last-level cache, as in decoding, and those of every side lie in huge pages,
as loaded weights do. Sides take turns in one process. `speedup` is over torch's bfloat16 `F.linear`; `share` is of the
speed at which the same threads read as many bytes as the bfloat16 matrices have, which is one of the sides. Four bits
are also multiplied by the kernels for CPUs that have fewer instructions.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from typing import Any

from harness import interleave, spread, write_result

OUT, IN = 4096, 1024
ROWS = (1, 2, 4, 8, 16, 64, 256)
BF16 = "torch bf16 F.linear"
READ = "reading memory"  # sums of 64-bit integers


def sides(matrices: int) -> dict[str, tuple[int, Callable[[Any], None]]]:
    """Name -> (bytes of all matrices, product of x bfloat16 [rows, IN] with each of them)."""
    import torch
    from torch.nn import functional as F

    from sparing import kernels
    from sparing.config.formats import FORMATS
    from sparing.kernels import dispatch
    from sparing.kernels.huge_pages import HugePages
    from sparing.weights.weight import empty_packed

    memory = HugePages()

    def laid(weight: torch.Tensor) -> torch.Tensor:
        return memory.empty(weight.shape, dtype=weight.dtype, device="cpu").copy_(weight)

    dense = [laid(torch.randn(OUT, IN).bfloat16()) for _ in range(matrices)]
    found: dict[str, tuple[int, Callable[[Any], None]]] = {}

    def add(name: str, weights: list[Any], nbytes: int, product: Callable[[Any, Any], Any]) -> None:
        def run(x: Any) -> None:
            for weight in weights:
                product(x, weight)

        found[name] = (nbytes * matrices, run)

    words = [w.view(torch.int64) for w in dense]
    add(READ, words, dense[0].nbytes, lambda x, w: w.sum())
    add(BF16, dense, dense[0].nbytes, F.linear)
    add("sparing bf16", dense, dense[0].nbytes, kernels.linear)
    for format in FORMATS:
        packed = [empty_packed(format, w.shape, empty=memory.empty) for w in dense]
        for weight, w in zip(packed, dense, strict=True):
            weight.fill(lambda w=w: iter(w.float().split(256)))
        add(f"sparing {format}", packed, packed[0].nbytes, kernels.linear)
        for older in dispatch.available()[1:-1] if FORMATS[format].block > 1 else ():
            add(f"sparing {format}, {older}", packed, packed[0].nbytes, partial(with_kernels, older))

    eight = [laid(torch.randint(-127, 128, (OUT, IN), dtype=torch.int8)) for _ in dense]
    row_scales = torch.rand(OUT).bfloat16()
    add("torch int8", eight, eight[0].nbytes + row_scales.nbytes,
        lambda x, w: torch.ops.aten._weight_int8pack_mm(x, w, row_scales))  # fmt: skip
    codes = torch.randint(0, 16, (OUT, IN), dtype=torch.int32)
    four = [laid(torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)) for _ in dense]
    scales = torch.rand(IN // 32, OUT, 2).bfloat16()
    add("torch int4, groups of 32", four, four[0].nbytes + scales.nbytes,
        lambda x, w: torch.ops.aten._weight_int4pack_mm_for_cpu(x, w, 32, scales))  # fmt: skip
    return found


def with_kernels(name: str, x: Any, weight: Any) -> None:
    from sparing import kernels
    from sparing.kernels import dispatch

    dispatch.use(name)
    kernels.linear(x, weight)
    dispatch.use(None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--matrices", type=int, default=24)
    parser.add_argument("--repetitions", type=int, default=7)
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--threads", type=int, nargs="*", default=(1, 2))
    parser.add_argument("--dry", action="store_true", help="write nothing")
    arguments = parser.parse_args()

    import torch

    from sparing.kernels import dispatch

    found = sides(arguments.matrices)
    results = []
    with torch.inference_mode():
        for threads in arguments.threads:
            torch.set_num_threads(threads)
            for rows in arguments.rows:
                x = torch.randn(rows, IN).bfloat16()
                taking = {name: partial(run, x) for name, (_, run) in found.items()}
                interleave(taking, 1)
                seconds = interleave(taking, arguments.repetitions)
                base = spread(seconds[BF16])["median"]
                bandwidth = found[READ][0] / spread(seconds[READ])["median"]
                for name, times in seconds.items():
                    speed = found[name][0] / spread(times)["median"]
                    line = {
                        "threads": threads,
                        "rows": rows,
                        "side": name,
                        "microseconds": {k: v * 1e6 / arguments.matrices for k, v in spread(times).items()},
                        "gigabytes_per_second": speed / 1e9,
                        "share": speed / bandwidth,
                        "speedup": base / spread(times)["median"],
                    }
                    results.append(line)
                    micro = line["microseconds"]["median"]
                    print(f"{threads} threads, {rows:3} rows  {name:26} {micro:8.0f} us  {speed / 1e9:6.1f} GB/s "
                          f"{line['share']:5.0%}  {line['speedup']:5.2f}x", flush=True)  # fmt: skip
    if not arguments.dry:
        shape = {"matrices": arguments.matrices, "out": OUT, "in": IN, "kernels": dispatch.active()}
        write_result("weights", {**shape, "results": results})


if __name__ == "__main__":
    main()
