"""A decoding step of several rows: its time, that of its kernels alone, and what a further row costs.

    python benchmarks/rows.py [--models smollm2 smollm2+turboquant:4 gemma hybrid] [--threads 1 2]
    python benchmarks/rows.py --models smollm2 --source ../other/src

Rows hold 200 to 2,000 tokens of random entries, under the memory policy that follows the model after a plus. "kernels"
is the same native calls again, one after the other with nothing between them. Python calls are those of a whole step,
counted. With --source the step is also timed with another version of the library, each in a process of its own, in
turn.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from harness import child_json, interleave, spread, write_result
from hybrid import HYBRID, random_model

GEMMA = {
    "model_type": "gemma4_text",
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 128,
    "global_head_dim": 256,
    "sliding_window": 512,
    "hidden_size_per_layer_input": 0,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 32768,
}
ROWS = (1, 2, 4, 8, 16)
STEPS, WARM, ROUNDS = 15, 3, 5
SHORTEST, LONGEST = 200, 2000


def load(name: str) -> Any:
    import sparing

    if name == "smollm2":
        return sparing.load("smollm2")
    return random_model({"gemma": GEMMA, "hybrid": HYBRID}[name])


def lengths(rows: int) -> list[int]:
    """From the shortest to the longest; one row is in between."""
    if rows == 1:
        return [1000]
    return [SHORTEST + (LONGEST - SHORTEST) * i // (rows - 1) for i in range(rows)]


def stepper(model: Any, rows: int, kv: str = "dense") -> Callable[[], object]:
    """One token for each of `rows` sequences; nothing is kept, so that every step is the same."""
    import torch

    from sparing.models.base import Row  # from here, as older versions have it too

    memories, make = [], model.memory if kv == "dense" else model.memory_plan(kv).memory
    for length in lengths(rows):
        memory = make()
        model.run([Row(torch.randint(0, 1000, (length,)), memory, wanted=0)])
        memory.commit(length)
        memories.append(memory)
    token = torch.tensor([7])

    def step() -> None:
        model.head(model.run([Row(token, memory, wanted=1) for memory in memories]))
        for memory in memories:
            memory.rollback()

    return step


class Recorder:
    """Stands in for the native module and notes every call."""

    def __init__(self, native: Any):
        self._native = native
        self.calls: list[tuple[Callable[..., object], tuple[Any, ...], dict[str, Any]]] = []

    def __getattr__(self, name: str) -> Any:
        function = getattr(self._native, name)

        def call(*values: Any, **fields: Any) -> object:
            self.calls.append((function, values, fields))
            return function(*values, **fields)

        return call


def kernels_of(step: Callable[[], object]) -> Callable[[], object]:
    """The native calls of a step, again, with the tensors and tables that they were given."""
    from sparing.kernels import dispatch
    from sparing.kernels.coded_rows import CodesTable
    from sparing.kernels.rows import RowTable

    kinds: list[Any] = [RowTable, CodesTable]
    tables, plain = [], {kind: kind.__init__ for kind in kinds}

    def kept(self: Any, *arguments: Any) -> None:
        plain[type(self)](self, *arguments)
        tables.append(self)

    native, recorder = dispatch.native, Recorder(dispatch.native)
    dispatch.native = recorder
    for kind in plain:
        kind.__init__ = kept
    try:
        step()
    finally:
        dispatch.native = native
        for kind, own in plain.items():
            kind.__init__ = own
    calls = recorder.calls

    def again() -> None:
        for function, values, fields in calls:
            function(*values, **fields)
        assert tables or not calls  # whose addresses the calls hold

    return again


def python_calls(step: Callable[[], object]) -> int:
    """Functions of Python that a step calls."""
    count = 0

    def note(frame: Any, event: str, argument: Any) -> None:
        nonlocal count
        count += event == "call"

    sys.setprofile(note)
    step()
    sys.setprofile(None)
    return count


def measure(name: str, rows: int) -> dict[str, Any]:
    import torch

    import sparing

    torch.manual_seed(0)
    with torch.inference_mode():
        base, _, kv = name.partition("+")
        model = load(base)
        step = stepper(model, rows, kv or "dense")
        interleave({"step": step}, WARM)
        seconds = interleave({"step": step}, STEPS)
        found = spread(seconds["step"])["median"]
        return {"seconds": found, "python_calls": python_calls(step), "library": sparing.__file__}


def measure_kernels(name: str, rows: int) -> dict[str, Any]:
    """Step and kernels in turn, in this version alone."""
    import torch

    torch.manual_seed(0)
    with torch.inference_mode():
        base, _, kv = name.partition("+")
        model = load(base)
        step = stepper(model, rows, kv or "dense")
        sides = {"step": step, "kernels": kernels_of(step)}
        interleave(sides, WARM)
        seconds = interleave(sides, STEPS)
    return {side: spread(values) for side, values in seconds.items()}


def elsewhere(arguments: list[str], threads: int, source: str) -> Any:
    """`child_json` with the library of another source tree."""
    path = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = source if not path else f"{source}{os.pathsep}{path}"
    try:
        found = child_json(__file__, arguments, threads)
        if not Path(found["library"]).is_relative_to(Path(source).resolve()):
            raise SystemExit(f"--source {source}: an installed version comes first, {found['library']}")
        return found
    finally:
        os.environ.pop("PYTHONPATH")
        if path is not None:
            os.environ["PYTHONPATH"] = path


def compare(name: str, threads: int, source: str | None, rows_of: list[int]) -> list[dict[str, Any]]:
    found = []
    for rows in rows_of:
        one = ["--one", name, "--rows", str(rows)]
        row: dict[str, Any] = {"model": name, "threads": threads, "rows": rows}
        row |= child_json(__file__, ["--kernels", *one], threads)
        ours, theirs = [], []
        for _ in range(ROUNDS if source else 1):
            ours.append(child_json(__file__, one, threads))
            if source:
                theirs.append(elsewhere(one, threads, source))
        row["python_calls"] = ours[0]["python_calls"]
        row["beside_kernels"] = row["step"]["median"] / row["kernels"]["median"]
        if theirs:
            row["python_calls_before"] = theirs[0]["python_calls"]
            row["before"] = spread([t["seconds"] for t in theirs])
            row["ratio"] = spread([t["seconds"] / o["seconds"] for o, t in zip(ours, theirs, strict=True)])
        found.append(row)
        text = f"{name:8} {threads} threads {rows:2} rows: {1e3 * row['step']['median']:.1f} ms, kernels"
        text += f" {1e3 * row['kernels']['median']:.1f} ms, {row['python_calls']} Python calls"
        print(text + (f", {row['ratio']['median']:.2f}x as fast as before" if theirs else ""), flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2", "smollm2+turboquant:4", "gemma", "hybrid"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rows", nargs="+", type=int, default=list(ROWS))
    parser.add_argument("--source", help="the src folder of another version, to be timed in turn")
    parser.add_argument("--one", help="one model in this process, printed as JSON")
    parser.add_argument("--kernels", action="store_true", help="with --one: beside the kernels alone")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps((measure_kernels if arguments.kernels else measure)(arguments.one, arguments.rows[0])))
        return
    rows = []
    for name in arguments.models:
        for threads in arguments.threads:
            rows += compare(name, threads, arguments.source, arguments.rows)
    write_result("rows", {"shortest": SHORTEST, "longest": LONGEST, "rows": rows})


if __name__ == "__main__":
    main()
