"""One decode step of attention on a GPU over keys and values in 2, 3 and 4 bits, against PyTorch's over bfloat16.

    python benchmarks/attention_over_codes_gpu.py                      # needs a CUDA device
    TRITON_INTERPRET=1 python benchmarks/attention_over_codes_gpu.py   # no timing: only that results agree

8 key-value heads, 4 queries each. Before it is timed, every result is compared with PyTorch's attention over the same
codes, decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from harness import finished, interleave, spread, triton_device, write_result
from sparing.kernels.code_layout import BLOCK, block_bytes
from sparing.kernels.codes import Codes, decode_codes
from sparing.kernels.gpu.codes import attention_over_codes
from sparing.memory.turboquant.definition import sphere_codebook

DEVICE = triton_device()
TIMED = DEVICE == "cuda"
KV_HEADS, GROUP, BITS, REPETITIONS = 8, 4, (2, 3, 4), 50
SHAPES = [(dims, n) for dims in (64, 128, 256) for n in (4096, 32768, 131072)] if TIMED else [(64, 192)]
TOLERANCE = 1e-3  # products of three in bfloat16
DENSE = "sdpa bfloat16"


def random_codes(n: int, dims: int, bits: int) -> Codes:
    laid_out = torch.randint(0, 256, (KV_HEADS, n // BLOCK, block_bytes(dims, bits)), device=DEVICE, dtype=torch.uint8)
    scale = (0.5 + torch.rand(KV_HEADS, n // BLOCK, BLOCK, device=DEVICE)) / dims**0.5
    return Codes(laid_out, scale.half(), sphere_codebook(dims, bits).centroids.float().to(DEVICE), dims)


def over_codes(q: Tensor, keys: Codes, values: Codes, n: int, exact: bool = True) -> Tensor:
    return attention_over_codes([q], [keys], [values], n, scale=q.shape[-1] ** -0.5, exact=exact)[0][0]


def dense(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """q: [1, heads, d]; k, v: [kv_heads, n, d]"""
    out = F.scaled_dot_product_attention(q.transpose(0, 1)[None], k[None], v[None], enable_gqa=True)
    return out[0].transpose(0, 1)


def sides(dims: int, n: int) -> tuple[dict[str, Callable[[], None]], dict[str, int]]:
    """What is timed, and how many bytes each reads."""
    q = torch.randn(1, KV_HEADS * GROUP, dims, device=DEVICE)
    calls, nbytes = {}, {}
    for bits in BITS:
        keys, values = random_codes(n, dims, bits), random_codes(n, dims, bits)
        k, v = decode_codes(keys, "keys", 0, n), decode_codes(values, "values", 0, n)
        error = float((over_codes(q, keys, values, n) - dense(q, k, v)).abs().max() / v.abs().max())
        if error > TOLERANCE:
            raise SystemExit(f"{bits} bits, size {dims}, {n} keys: off by {error:.2g}")
        calls[f"{bits} bits"] = partial(finished, partial(over_codes, q, keys, values, n, exact=False))
        nbytes[f"{bits} bits"] = sum(part.nbytes for codes in (keys, values) for part in (codes.blocks, codes.scale))
        calls[DENSE] = partial(finished, partial(dense, q.bfloat16(), k.bfloat16(), v.bfloat16()))
        nbytes[DENSE] = 2 * k.numel() * 2
    return calls, nbytes


def main() -> None:
    torch.manual_seed(0)
    rows = []
    for dims, n in SHAPES:
        calls, nbytes = sides(dims, n)
        if not TIMED:
            print(f"size {dims}, {n} keys: results agree; nothing is timed without a CUDA device")
            continue
        interleave(calls, 3)
        for side, seconds in interleave(calls, REPETITIONS).items():
            taken = spread(seconds)
            speed = nbytes[side] / taken["median"]
            rows.append({"head_dim": dims, "keys": n, "side": side, "seconds": taken, "bytes_per_second": speed})
            print(f"{dims:4} {n:7} {side:14} {taken['median'] * 1e6:8.1f} us")
    if TIMED:
        write_result("attention_over_codes_gpu", {"gpu": torch.cuda.get_device_name(), "rows": rows})


if __name__ == "__main__":
    main()
