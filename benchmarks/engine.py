"""How long a row that decodes waits between its tokens while a prompt of 8,000 tokens is read beside it.

    python benchmarks/engine.py [--dtypes bfloat16] [--threads 1]

SmolLM2-135M-Instruct (extra [smollm2]). Each step of the engine gives the decoding row a token and reads a piece of the
prompt; in turn with it the same piece is read alone, into a memory that holds as much. `ratio` is the gap between two
tokens over the time of such a piece, `alone` the gap without a neighbour before the prompt comes. Every configuration
runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from harness import child_json, interleave, spread, write_result

PROMPT, ALONE = 8000, 16


def measure(dtype: str, threads: int) -> dict[str, Any]:
    """One configuration, in this process."""
    import torch

    import sparing
    from sparing.decoding.autoregressive import AutoregressiveStepper
    from sparing.decoding.engine import PIECE_BESIDE, Engine
    from sparing.decoding.outputs import Pending
    from sparing.decoding.row import ActiveRow, unspoken
    from sparing.decoding.sampling import Sampling
    from sparing.decoding.stepper import Reader
    from sparing.decoding.transcript import Transcript
    from sparing.models.batch import Row

    torch.set_num_threads(threads)
    model = sparing.load("smollm2", dtype=dtype, device="cpu")
    assert model.tokenizer is not None
    question = torch.tensor(model.tokenizer.encode("Once upon a time there was a king who had three sons"))
    prompt = torch.randint(100, 40000, (PROMPT,), generator=torch.Generator().manual_seed(0))
    row = ActiveRow(0, question, model.memory(), Transcript(None, (), (), PROMPT), torch.Generator())
    engine = Engine(model)
    engine.add(AutoregressiveStepper(model, row, Sampling()))
    step = {"alone": lambda: list(engine.step())}
    interleave(step, 2)
    alone = interleave(step, ALONE)["alone"]

    reader = Reader(unspoken(prompt, model.memory()), Pending(outputs=0))
    engine.add(reader)
    twin, gaps, pieces = model.memory(), [], []
    for piece in prompt.split(PIECE_BESIDE):
        start = time.perf_counter()
        tokens = list(engine.step())
        between = time.perf_counter()
        model.run([Row(piece, twin, wanted=0, text_end=PROMPT)])
        twin.commit(len(piece), prompt=True)
        gaps.append(between - start)
        pieces.append(time.perf_counter() - between)
        assert len(tokens) == 1 and reader.row.memory.length == twin.length
    assert reader.finished
    return {
        "dtype": dtype,
        "threads": threads,
        "piece": PIECE_BESIDE,
        "alone_milliseconds": spread([1e3 * s for s in alone]),
        "gap_milliseconds": spread([1e3 * s for s in gaps]),
        "piece_milliseconds": spread([1e3 * s for s in pieces]),
        "ratio": spread([gap / piece for gap, piece in zip(gaps, pieces, strict=True)]),
    }


def line(result: dict[str, Any]) -> str:
    alone, gap, piece = (result[f"{name}_milliseconds"]["median"] for name in ("alone", "gap", "piece"))
    ratio = result["ratio"]
    return (
        f"{result['dtype']:10}{result['threads']} threads | gap {gap:.0f} ms beside the prompt, {alone:.0f} ms alone,"
        f" a piece of {result['piece']} {piece:.0f} ms: {ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--one", action="store_true", help="one configuration in this process, printed as JSON")
    arguments = parser.parse_args()
    chosen = [(dtype, threads) for dtype in arguments.dtypes for threads in arguments.threads]
    if arguments.one:
        print(json.dumps(measure(*chosen[0])))
        return
    rows = []
    for dtype, threads in chosen:
        options = ["--one", "--dtypes", dtype, "--threads", str(threads)]
        rows.append(child_json(__file__, options, threads))
        print(line(rows[-1]), flush=True)
    write_result("engine", {"prompt": PROMPT, "rows": rows})


if __name__ == "__main__":
    main()
