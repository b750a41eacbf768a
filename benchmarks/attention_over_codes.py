"""One decode step of attention: codes of 4, 3 and 2 bits against torch's attention and our own in bfloat16.

    python benchmarks/attention_over_codes.py [--keys 32768] [--dims 128] [--threads 1]

8 kv heads with 4 query heads each, one new token, random vectors. torch: scaled_dot_product_attention with the query
heads of a kv head as rows (`enable_gqa=True` is several times slower on a CPU), in bfloat16 and float32. Codes are
measured as a bfloat16 model asks for them (products of bytes) and exact; the rotations of one query and one output are
not in it. All keys and values lie in huge pages, as large memories do. `bandwidth`: share of the read bandwidth, a sum
over 256 MiB in the same process, that the bytes of keys and values come in with. All sides in turn, a process for each
number of threads.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from harness import child_json, interleave, read_bandwidth, spread, write_result

KV_HEADS, GROUP = 8, 4
BITS = (4, 3, 2)
REPETITIONS = 9


def measure(keys: int, d: int, threads: int) -> dict[str, Any]:
    """One shape, in this process."""
    import torch
    from torch.nn import functional as F

    from sparing import kernels
    from sparing.kernels.code_layout import BLOCK, block_bytes
    from sparing.kernels.codes import Codes, attention_over_codes
    from sparing.kernels.huge_pages import HugePages
    from sparing.memory.turboquant.codebook import lloyd_max_codebook

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    q = torch.randn(1, KV_HEADS * GROUP, d)
    scale, blocks = d**-0.5, keys // BLOCK
    pages = HugePages()

    def lay(x: torch.Tensor) -> torch.Tensor:
        return pages.empty(x.shape, dtype=x.dtype, device=x.device).copy_(x)

    def codes(bits: int) -> Codes:  # random bytes are random codes
        laid_out = torch.randint(0, 256, (KV_HEADS, blocks, block_bytes(d, bits)), dtype=torch.uint8)
        factor = torch.full((KV_HEADS, blocks, BLOCK), d**-0.5, dtype=torch.float16)
        return Codes(lay(laid_out), lay(factor), lloyd_max_codebook(None, bits)[0].float(), d)

    k32, v32 = lay(torch.randn(1, KV_HEADS, keys, d)), lay(torch.randn(1, KV_HEADS, keys, d))
    k16, v16, q16 = lay(k32.bfloat16()), lay(v32.bfloat16()), q.bfloat16()
    rows = q.view(1, KV_HEADS, GROUP, d)
    sides: dict[str, Any] = {
        "torch float32": lambda: F.scaled_dot_product_attention(rows, k32, v32),
        "torch bfloat16": lambda: F.scaled_dot_product_attention(rows.bfloat16(), k16, v16),
        "sparing float32": lambda: kernels.attention(q, k32[0], v32[0], scale=scale),
        "sparing bfloat16": lambda: kernels.attention(q16, k16[0], v16[0], scale=scale),
    }
    held = {"float32": k32.nbytes + v32.nbytes, "bfloat16": k16.nbytes + v16.nbytes}
    for bits in BITS:
        k, v = codes(bits), codes(bits)
        held[f"{bits} bits"] = sum(t.nbytes for side in (k, v) for t in (side.blocks, side.scale))
        for exact in (False, True):
            name = f"{bits} bits exact" if exact else f"{bits} bits"
            sides[name] = lambda k=k, v=v, exact=exact: attention_over_codes(
                [q], [k], [v], keys, scale=scale, exact=exact
            )
    with torch.inference_mode():
        interleave(sides, 2)
        seconds = interleave(sides, REPETITIONS)
    bandwidth = read_bandwidth(threads)
    size = {name: next(n for kind, n in held.items() if kind in name) for name in sides}
    return {
        "keys": keys,
        "head_dim": d,
        "threads": threads,
        "read_bytes_per_second": bandwidth,
        "sides": {
            name: {
                "milliseconds": spread([1e3 * s for s in seconds[name]]),
                "bytes": size[name],
                "bandwidth": size[name] / spread(seconds[name])["median"] / bandwidth,
                "times_torch_bfloat16": times(seconds["torch bfloat16"], seconds[name]),
                "times_sparing_bfloat16": times(seconds["sparing bfloat16"], seconds[name]),
            }
            for name in sides
        },
    }


def times(theirs: list[float], ours: list[float]) -> dict[str, float]:
    return spread([a / b for a, b in zip(theirs, ours, strict=True)])


def table(result: dict[str, Any]) -> str:
    lines = [f"{result['keys']} keys, head size {result['head_dim']}, {result['threads']} threads"]
    for name, side in result["sides"].items():
        lines.append(
            f"  {name:18}{side['milliseconds']['median']:9.3f} ms |"
            f" {side['times_torch_bfloat16']['median']:5.2f}x torch bfloat16,"
            f" {side['times_sparing_bfloat16']['median']:5.2f}x ours | {side['bandwidth']:.0%} of the bandwidth"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--keys", nargs="+", type=int, default=[4096, 32768, 131072])
    parser.add_argument("--dims", nargs="+", type=int, default=[64, 128, 256])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--one", action="store_true", help="one configuration in this process, printed as JSON")
    arguments = parser.parse_args()
    chosen = [(n, d, t) for t in arguments.threads for d in arguments.dims for n in arguments.keys]
    if arguments.one:
        print(json.dumps(measure(*chosen[0])))
        return
    rows = []
    for keys, d, threads in chosen:
        options = ["--one", "--keys", str(keys), "--dims", str(d), "--threads", str(threads)]
        rows.append(child_json(__file__, options, threads))
        print(table(rows[-1]), flush=True)
        write_result("attention_over_codes", {"kv_heads": KV_HEADS, "group": GROUP, "rows": rows})


if __name__ == "__main__":
    main()
