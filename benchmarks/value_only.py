"""A layer whose keys and values are one projection: what storing values alone saves and costs, against `dense`.

    python benchmarks/value_only.py [--threads 1] [--contexts 4096]

One full attention layer of Gemma 4's shape (31B: 4 key-value heads of 512, 32 query heads), both sides with the kernels
of this machine: a decoding step over entries that other memory traffic has driven out of the caches, as a model's
weights do, and a prompt that is read at once into an empty memory.
"""

from __future__ import annotations

import argparse
import json
from typing import Any

from harness import child_json, interleave, spread, write_result

KV_HEADS, HEADS, HEAD_DIM, STEPS, PROMPT, PREFILLS = 4, 32, 512, 24, 256, 5
CONTEXTS = (4096, 32768)
ELSEWHERE = 64 << 20  # bytes read between two steps: more than the caches hold
CONFIG = {
    "model_type": "gemma4_text",
    "vocab_size": 8,
    "hidden_size": 8,
    "intermediate_size": 8,
    "num_hidden_layers": 1,
    "layer_types": ["full_attention"],
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_global_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "global_head_dim": HEAD_DIM,
    "attention_k_eq_v": True,
    "hidden_size_per_layer_input": 0,
    "sliding_window": 1024,
}


def measure(dtype_name: str, context: int) -> dict[str, Any]:
    """Both memories in this process, in turn."""
    import torch

    from sparing import kernels
    from sparing.config.gemma4 import Gemma4Config
    from sparing.config.policy import parse_policy
    from sparing.memory.plan import plan_memory
    from sparing.memory.sequence import Memory

    dtype = getattr(torch, dtype_name)
    config = Gemma4Config.from_dict(CONFIG)
    generator = torch.Generator().manual_seed(0)
    weight = torch.empty(HEAD_DIM).uniform_(0.5, 1.5, generator=generator).to(dtype)
    keys = kernels.KeysFromValues(weight, config.rope["full_attention"])

    def memory(name: str) -> Memory:
        plan = plan_memory(
            config.memory_specs(),
            parse_policy("dense"),
            dtype=dtype,
            device=torch.device("cpu"),
            keys_from_values=[keys if name == "value_only" else None],
            key_biases=[None],
        )
        return plan.memory()

    def attend(held: Memory, tokens: int) -> None:
        layer = held.layers[0]
        assert layer is not None
        held.stage(tokens)
        layer.write(k[-tokens:], v[-tokens:])
        layer.attend(q[-tokens:], scale=1.0)

    v = kernels.rms_norm(torch.randn(context, KV_HEADS, HEAD_DIM, generator=generator)).to(dtype)
    k = keys(v.transpose(0, 1), torch.arange(context)).transpose(0, 1).contiguous()
    q = torch.randn(PROMPT, HEADS, HEAD_DIM, generator=generator).to(dtype)
    memories = {name: memory(name) for name in ("dense", "value_only")}
    for held in memories.values():
        layer = held.layers[0]
        assert layer is not None
        held.stage(context)
        layer.write(k, v)
        held.commit(context)
    elsewhere = torch.ones(ELSEWHERE // 8, dtype=torch.int64)

    def step(name: str) -> None:
        attend(memories[name], 1)
        memories[name].rollback()

    def prefill(name: str) -> None:
        attend(memory(name), PROMPT)

    def timed(run: Any, repetitions: int) -> dict[str, list[float]]:
        calls: dict[str, Any] = {}
        for name in memories:
            calls[f"before {name}"] = elsewhere.sum
            calls[name] = lambda name=name: run(name)
        interleave(calls, 2)
        return {name: seconds for name, seconds in interleave(calls, repetitions).items() if name in memories}

    result: dict[str, Any] = {
        "dtype": dtype_name,
        "threads": torch.get_num_threads(),
        "context": context,
        "bytes": {name: held.nbytes for name, held in memories.items()},
        "table_bytes": keys.table(context, dtype).nbytes,  # one for all layers and memories of a model
    }
    with torch.inference_mode():
        for phase, seconds in (("step", timed(step, STEPS)), ("prefill", timed(prefill, PREFILLS))):
            pairs = zip(seconds["dense"], seconds["value_only"], strict=True)
            result[f"{phase}_seconds"] = {name: spread(values) for name, values in seconds.items()}
            result[f"{phase}_ratio"] = spread([alone / both for both, alone in pairs])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--contexts", nargs="+", type=int, default=CONTEXTS)
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--one", action="store_true", help="one configuration in this process, printed as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.dtypes[0], arguments.contexts[0])))
        return
    rows = []
    for dtype in arguments.dtypes:
        for context in arguments.contexts:
            for threads in arguments.threads:
                options = ["--one", "--dtypes", dtype, "--contexts", str(context)]
                row = child_json(__file__, options, threads)
                rows.append(row)
                step, prefill = row["step_ratio"], row["prefill_ratio"]["median"]
                print(
                    f"{dtype:10}{context:6} entries, {threads} threads | bytes"
                    f" {row['bytes']['value_only'] / row['bytes']['dense']:.2f} | times dense: step"
                    f" {step['median']:.2f} ({step['min']:.2f}-{step['max']:.2f}), prompt of {PROMPT} {prefill:.2f}",
                    flush=True,
                )
    write_result("value_only", {"prompt": PROMPT, "rows": rows})


if __name__ == "__main__":
    main()
