"""One decode step of compressed sparse attention: what it costs as the text grows, against dense attention with a mask.

    python benchmarks/sparse_attention.py [--entries 1024 8192 32768 131072] [--threads 1 2]

One query of N heads over a window of 128 tokens and the compressed entries before it, of which k are selected, with
random vectors, in float32 and bfloat16. `select` is the indexer over all keys, `attend` the attention over what it
selected, `pool` the compressor for one token. dense: what transformers computes, attention over every entry with a mask
that hides those that are not selected, in torch and always in float32 (bfloat16 takes torch several times as long on
CPUs without such arithmetic); dense select: the indexer in torch with `topk`, likewise. All sides in turn, a process
for each number of threads.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from harness import child_json, interleave, spread, write_result

SHAPES = {"small": (8, 128, 16, 64), "flash": (64, 512, 64, 128)}  # N, d, indexer heads and size
WINDOW, M, K = 128, 4, 512
REPETITIONS = 9


def measure(shape: str, entries: int, threads: int, name: str) -> dict[str, Any]:
    """One shape, in this process."""
    import torch
    from torch.nn import functional as F

    from sparing.kernels.compressor import PooledRow, PoolTable, empty_windows, pool_rows
    from sparing.kernels.indexer import select_rows
    from sparing.kernels.rows import AttendedRow, RowTable
    from sparing.kernels.sparse_attention import attend_joint
    from sparing.memory.extents import Entries

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    (heads, d, index_heads, index_d), dtype = SHAPES[shape], getattr(torch, name)
    end, device = entries * M, torch.device("cpu")

    def table(n: int, size: int, **row: Any) -> tuple[RowTable, torch.Tensor]:
        held = Entries(1, 1, 1, size, dtype, device)
        held.extend(n, 0)
        (span,) = held.spans
        data = span.view(0, 0)[0].normal_()
        return RowTable([AttendedRow(held.spans, 1, end, **row)]), data

    window, recent = table(WINDOW, d, window=WINDOW, dropped=end - WINDOW)
    compressed, old = table(entries, d)
    keys_table, keys = table(entries, index_d)
    q, sinks = torch.randn(1, heads, d).to(dtype), torch.randn(heads)
    index_q, w = torch.randn(1, index_heads, index_d).to(dtype), torch.randn(1, index_heads)
    kv, gate, ape = torch.randn(1, 2 * d).to(dtype), torch.randn(1, 2 * d).to(dtype), torch.randn(M, 2 * d)
    windows = empty_windows(1, 2, d)
    pooled = PoolTable([PooledRow(1, end, windows, windows.clone())])
    selected = select_rows(index_q, w, keys_table, 0, m=M, k=K)
    both, keys, q32, index_q32 = torch.cat([recent, old]).float(), keys.float(), q[0].float(), index_q[0].float()

    def dense_select() -> torch.Tensor:
        scores = F.relu(index_q32 @ keys.T)
        return (w[0][:, None] * scores).sum(0).topk(min(K, entries)).indices

    def dense() -> torch.Tensor:
        mask = torch.full((WINDOW + entries,), -torch.inf)
        mask[:WINDOW], mask[WINDOW + selected[0].long()] = 0, 0
        scores = torch.cat([q32 @ both.T * d**-0.5 + mask, sinks[:, None]], 1)
        return torch.softmax(scores, 1)[:, :-1] @ both

    sides: dict[str, Any] = {
        "select": lambda: select_rows(index_q, w, keys_table, 0, m=M, k=K),
        "attend": lambda: attend_joint(q, window, compressed, 0, m=M, sinks=sinks, scale=d**-0.5, selected=selected),
        "pool": lambda: pool_rows(kv, gate, ape, pooled, 0),
        "dense select": dense_select,
        "dense": dense,
    }
    with torch.inference_mode():
        interleave(sides, 2)
        seconds = interleave(sides, REPETITIONS)
    return {
        "shape": dict(zip(("heads", "d", "index_heads", "index_d"), SHAPES[shape], strict=True)),
        "entries": entries,
        "dtype": name,
        "threads": threads,
        "microseconds": {side: spread([1e6 * s for s in values]) for side, values in seconds.items()},
        "times_dense": spread([a / b for a, b in zip(seconds["dense"], seconds["attend"], strict=True)]),
        "times_dense_select": spread([a / b for a, b in zip(seconds["dense select"], seconds["select"], strict=True)]),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--entries", nargs="+", type=int, default=[1024, 8192, 32768, 131072])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", choices=("float32", "bfloat16"), default=["float32", "bfloat16"])
    parser.add_argument("--one", action="store_true", help="one configuration in this process, printed as JSON")
    arguments = parser.parse_args()
    chosen = [
        (shape, n, t, name)
        for t in arguments.threads
        for shape in arguments.shapes
        for name in arguments.dtypes
        for n in arguments.entries
    ]
    if arguments.one:
        print(json.dumps(measure(*chosen[0])))
        return
    rows = []
    for shape, entries, threads, name in chosen:
        options = ["--one", "--shapes", shape, "--entries", str(entries), "--threads", str(threads), "--dtypes", name]
        row = child_json(__file__, options, threads)
        rows.append(row)
        medians = ", ".join(f"{side} {value['median']:.0f}" for side, value in row["microseconds"].items())
        print(f"{shape} {name} {entries} entries {threads} threads: {medians} us", flush=True)
        write_result("sparse_attention", {"window": WINDOW, "m": M, "k": K, "rows": rows})


if __name__ == "__main__":
    main()
