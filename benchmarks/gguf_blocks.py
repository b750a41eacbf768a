"""A GGUF file in its blocks, against the same numbers in float32 and packed anew in int4: loading, decoding, a prompt.

    python benchmarks/gguf_blocks.py [FILE ...] [--threads 1]

Without files: SmolLM2 135M (extra [smollm2]). Steps of decoding and prompts of 256 tokens are taken by all sides in
turn, in one process; loading and the first token of each side run in processes of their own, counted from their start.
`bytes` is what the weights hold.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

from decode import Ours
from harness import child_json, interleave, peak_rss, spread, write_result

STEPS, PROMPTS, PROMPT = 30, 5, 256
SIDES = ("stored", "float32", "int4")


def load(file: str, side: str) -> Any:
    import torch

    import sparing
    from sparing.weights.weight import PackedWeight

    if side != "float32":
        return sparing.load(file, weights=side, device="cpu")
    model = sparing.load(file, device="cpu")
    for module in list(model.modules()):
        for name, part in list(module.named_children()):
            if isinstance(part, PackedWeight):
                delattr(module, name)
                module.register_parameter(name, torch.nn.Parameter(part.dequantize(), requires_grad=False))
    return model


def first_token(file: str, side: str) -> dict[str, float]:
    """In this process: seconds of its CPU until a first token is known, imports included, and its peak of memory."""
    load(file, side).logits([1, 2, 3])
    return {"cpu_seconds": time.process_time(), "peak_bytes": peak_rss()}


def measure(file: str, threads: int) -> dict[str, Any]:
    """Decoding and prompts, in this process."""
    import torch

    torch.set_num_threads(threads)
    models = {side: load(file, side) for side in SIDES}
    rows = {side: Ours(model) for side, model in models.items()}
    prompt = torch.randint(8, 30000, (PROMPT,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for row in rows.values():
            row.start(prompt[:32])
        steps = interleave({side: row.step for side, row in rows.items()}, STEPS)
        prompts = interleave({side: lambda m=m: m.logits(prompt, m.memory()) for side, m in models.items()}, PROMPTS)
    return {
        side: {
            "bytes": sum(part.nbytes for _, _, _, part in models[side].parts()),
            "tokens_per_second": spread([1 / s for s in steps[side]]),
            "against_float32": spread([a / b for a, b in zip(steps["float32"], steps[side], strict=True)]),
            "prompt_seconds": spread(prompts[side]),
        }
        for side in SIDES
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="*", default=["smollm2"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--one", choices=("first", "measure"), help="in this process, print JSON")
    parser.add_argument("--side", choices=SIDES, default="stored")
    arguments = parser.parse_args()
    if arguments.one == "first":
        return print(json.dumps(first_token(arguments.files[0], arguments.side)))
    if arguments.one == "measure":
        return print(json.dumps(measure(arguments.files[0], arguments.threads)))
    result: dict[str, Any] = {"threads": arguments.threads, "files": {}}
    for file in arguments.files:
        rows = child_json(__file__, [file, "--one", "measure", "--threads", str(arguments.threads)], arguments.threads)
        for side in SIDES:
            rows[side] |= child_json(__file__, [file, "--one", "first", "--side", side], arguments.threads)
            print(Path(file).name, side, json.dumps(rows[side]))
        result["files"][Path(file).name] = rows
    write_result("gguf_blocks", result)


if __name__ == "__main__":
    main()
