"""What a fork costs: bytes that both sides hold, and the step that follows.

    python benchmarks/forks.py [--kv dense turboquant:4] [--contexts 2000 20000] [--threads 1]

SmolLM2 over random tokens. A step of one token after a fork, of the fork and of the memory that was forked, is timed in
turn with the usual step; 64 forks of one prompt each go on by one token.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from harness import child_json, interleave, spread, write_result

STEPS, WARM, FORKS, PROMPT = 15, 3, 64, 4000


def measure(kv: str, context: int) -> dict[str, Any]:
    import torch

    import sparing
    from sparing.memory.sequence import Memory
    from sparing.models.batch import Row

    model = sparing.load("smollm2")
    torch.manual_seed(0)

    def filled(tokens: int) -> Memory:
        memory = model.memory(kv)
        for ids in torch.randint(0, 40_000, (tokens,)).split(1000):
            model.run([Row(ids, memory, wanted=0, text_end=tokens)])
            memory.commit(len(ids), prompt=True)
        return memory

    def step(memory: Memory) -> None:
        model.head(model.run([Row(torch.tensor([7]), memory, wanted=1)]))
        memory.commit(1)

    # A fork is made anew before each of its steps, which then are all the first after one.
    def after_fork(forked: Callable[[], Memory]) -> float:
        memory = forked()
        return interleave({"step": lambda: step(memory)}, 1)["step"][0]

    with torch.inference_mode():
        plain, parent = filled(context), filled(context)
        seconds: dict[str, list[float]] = {"usual": [], "fork": [], "forked": []}
        for _ in range(WARM + STEPS):
            seconds["usual"] += interleave({"step": lambda: step(plain)}, 1)["step"]
            seconds["fork"].append(after_fork(parent.fork))
            twin = parent.fork()
            seconds["forked"].append(after_fork(lambda: parent))
            del twin
        seconds = {side: values[WARM:] for side, values in seconds.items()}
        memory = filled(context)
        alone, twin = sparing.resident_bytes([memory]), memory.fork()
        for one in (memory, twin):
            step(one)
        both = sparing.resident_bytes([memory, twin])
        prompt = filled(PROMPT)
        once, forks = sparing.resident_bytes([prompt]), [prompt.fork() for _ in range(FORKS)]
        for one in forks:
            step(one)
        all_forks = sparing.resident_bytes([prompt, *forks])
    return {
        "kv": kv,
        "context": context,
        "seconds": {side: spread(values) for side, values in seconds.items()},
        "ratio": {
            side: spread([s / u for s, u in zip(seconds[side], seconds["usual"], strict=True)])
            for side in ("fork", "forked")
        },
        "resident": {"one": alone, "both": both, "of_one": both / alone},
        "forks": {"count": FORKS, "prompt": once, "all": all_forks, "a_fork": (all_forks - once) / FORKS / once},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kv", nargs="+", default=["dense", "turboquant:4"])
    parser.add_argument("--contexts", nargs="+", type=int, default=[2000, 20000])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--one", action="store_true", help="one configuration in this process, printed as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.kv[0], arguments.contexts[0])))
        return
    rows = []
    for kv in arguments.kv:
        for context in arguments.contexts:
            row = child_json(__file__, ["--one", "--kv", kv, "--contexts", str(context)], arguments.threads)
            rows.append(row)
            print(
                f"{kv:14}{context:6} tokens | both hold {row['resident']['of_one']:.3f} of one | step after a fork"
                f" {row['ratio']['fork']['median']:.2f}, of what was forked {row['ratio']['forked']['median']:.2f} |"
                f" a fork of {PROMPT} tokens adds {row['forks']['a_fork']:.3f}",
                flush=True,
            )
    write_result("forks", {"threads": arguments.threads, "rows": rows})


if __name__ == "__main__":
    main()
