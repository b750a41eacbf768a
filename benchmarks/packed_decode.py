"""Greedy decoding at batch 1 with weights in few bits, against transformers in bfloat16, on random weights of 220 M.

    python benchmarks/packed_decode.py [--models llama] [--formats int4] [--threads 1]

Every model and number of threads runs in a process of its own, all sides in turn step by step. Output heads are int8,
as everywhere beside packed weights: `bytes` says what a step reads, head included. `limit` is the share of the memory's
read bandwidth (a sum over 256 MiB, in the same process) that a step reaches; `of_bytes` is the share of the speed that
bfloat16 would have with so few bytes: below 1, a step waits for something other than weights.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from typing import Any

from decode import MODELS, PROMPT, WARM, Ours, Theirs
from harness import child_json, interleave, read_bandwidth, spread, write_result

FORMATS = ("int8", "int4", "nvfp4")
STEPS = 24


def measure(name: str, formats: list[str], threads: int) -> dict[str, Any]:
    """One model, in this process."""
    import torch
    import transformers

    import sparing

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        theirs = MODELS[name]().to(torch.bfloat16).eval()
        theirs.save_pretrained(folder)
        ours = {"bfloat16": sparing.load(folder, device="cpu")}
        ours |= {format: sparing.load(folder, weights=format, device="cpu") for format in formats}
    sides: dict[str, Any] = {side: Ours(model) for side, model in ours.items()}
    for way in ("eager", "sdpa"):
        sides[way] = Theirs(theirs, partial(theirs.set_attn_implementation, way))
    prompt = torch.randint(8, 30000, (PROMPT,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        for side in sides.values():
            side.start(prompt)
        steps = {key: side.step for key, side in sides.items()}
        interleave(steps, WARM)
        seconds = interleave(steps, STEPS)
    bandwidth = read_bandwidth(threads)
    way = min(("eager", "sdpa"), key=lambda key: spread(seconds[key])["median"])
    nbytes = {side: read_bytes(model) for side, model in ours.items()}
    dense = spread(seconds["bfloat16"])["median"] / nbytes["bfloat16"]
    rows = {}
    for side in ours:
        median = spread(seconds[side])["median"]
        rows[side] = {
            "tokens_per_second": spread([1 / s for s in seconds[side]]),
            "bytes": nbytes[side],
            "limit": nbytes[side] / median / bandwidth,
            "of_bytes": dense * nbytes[side] / median,
            "ratio": spread([t / s for t, s in zip(seconds[way], seconds[side], strict=True)]),
        }
    return {
        "model": name,
        "threads": threads,
        "read_bytes_per_second": bandwidth,
        "transformers": {"attention": way, "tokens_per_second": spread([1 / s for s in seconds[way]])},
        "sparing": rows,
    }


def read_bytes(model: Any) -> int:
    """Of the weights, packed and dense; a tied embedding table is the output head."""
    from sparing.weights.weight import PackedWeight

    packed = sum(module.nbytes for module in model.modules() if isinstance(module, PackedWeight))
    return packed + sum(parameter.nbytes for parameter in model.parameters())


def lines(result: dict[str, Any]) -> str:
    theirs = result["transformers"]
    text = [
        f"{result['model']:8}{result['threads']} threads  transformers bfloat16 ({theirs['attention']}) "
        f"{theirs['tokens_per_second']['median']:6.1f} tok/s, {result['read_bytes_per_second'] / 1e9:.0f} GB/s"
    ]
    for side, row in result["sparing"].items():
        ratio = row["ratio"]
        text.append(
            f"    {side:9}{row['bytes'] / 1e6:5.0f} MB {row['tokens_per_second']['median']:7.1f} tok/s "
            f"{ratio['median']:5.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f}), {row['limit']:4.0%} of the bandwidth, "
            f"{row['of_bytes']:4.0%} of what the bytes allow"
        )
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dry", action="store_true", help="write nothing")
    parser.add_argument("--one", action="store_true", help="one configuration in this process, printed as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.models[0], arguments.formats, arguments.threads[0])))
        return
    rows = []
    for model in arguments.models:
        for threads in arguments.threads:
            options = ["--one", "--models", model, "--formats", *arguments.formats, "--threads", str(threads)]
            rows.append(child_json(__file__, options, threads))
            print(lines(rows[-1]), flush=True)
    if not arguments.dry:
        write_result("packed_decode", {"prompt": PROMPT, "steps": STEPS, "rows": rows})


if __name__ == "__main__":
    main()
