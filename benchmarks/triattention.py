"""Decoding after 32,768 tokens of context: everything remembered, against a budget of 2,048 entries.

    python benchmarks/triattention.py [--dtype bfloat16 float32] [--layers 14]

The model is random, with layers of Qwen3-0.6B's shape (8 key-value heads of 128, 16 query heads) and half as many of
them, 254 M parameters. Its memories are filled with random keys and values, which takes no prefill; the first new token
then sets off the round that cuts 32,768 entries to 2,048. The sides decode in turn, one token and eight; the pruned
side's time holds all its rounds. A dtype that is not named keeps its last result. Also: what rounds cost a token of the
real SmolLM2-135M.
"""

from __future__ import annotations

import argparse
import json
import time
from typing import Any

from harness import RESULTS, spread, write_result

CONTEXT, BUDGET, INTERVAL = 32768, 2048, 128
CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 32768,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "tie_word_embeddings": True,
}


def main() -> None:
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dtype", nargs="+", default=["bfloat16"])
    parser.add_argument("--layers", type=int, default=14)
    parser.add_argument("--blocks", type=int, default=3, help="blocks of 128 tokens of the pruned side")
    arguments = parser.parse_args()
    path = RESULTS / "triattention.json"
    earlier = json.loads(path.read_text())["rows"] if path.exists() else {}
    rows = {dtype: end_to_end(getattr(torch, dtype), arguments.layers, arguments.blocks) for dtype in arguments.dtype}
    write_result(
        "triattention",
        {
            "context": CONTEXT,
            "budget": BUDGET,
            "interval": INTERVAL,
            "layers": arguments.layers,
            "threads": torch.get_num_threads(),
            "rows": earlier | rows,
            "smollm2": smollm2(),
        },
    )


def end_to_end(dtype: Any, layers: int, blocks: int) -> dict[str, Any]:
    import torch

    import sparing
    from sparing.config import parse_config
    from sparing.models.loading import build

    torch.manual_seed(0)
    model = build(parse_config(CONFIG | {"num_hidden_layers": layers})).to_empty(device="cpu").eval()
    for parameter in model.requires_grad_(False).parameters():
        torch.nn.init.normal_(parameter, 1.0 if parameter.ndim == 1 else 0.0, 0.02)
    model.to(dtype)
    statistics = sparing.calibrate(model, torch.randint(0, 32768, (256,)))
    options = {"interval": INTERVAL, "protect_prompt": False, "statistics": statistics}
    sides = {"dense": model.memory(), "pruned": model.memory(f"triattention:{BUDGET}", **options)}
    fill(CONTEXT, *sides.values())
    scoring = stopwatch(sides["pruned"].pruner, "_evict")

    peaks = {"dense": 0, "pruned": 0}

    def decode(name: str, tokens: int) -> float:
        began = time.perf_counter()
        for _ in range(tokens):
            model.logits([7], sides[name], prompt=False)
            peaks[name] = max(peaks[name], sides[name].nbytes)
        return (time.perf_counter() - began) / tokens

    decode("pruned", 1)
    first_round, scoring[:] = sum(scoring), []
    decode("dense", 1)
    peaks.update(dense=0, pruned=0)
    seconds: dict[str, list[float]] = {"dense": [], "pruned": []}
    for _ in range(blocks):
        turns = [(decode("dense", 1), decode("pruned", 8)) for _ in range(INTERVAL // 8)]
        for name, values in zip(seconds, zip(*turns, strict=True), strict=True):
            seconds[name].append(sum(values) / len(values))
    row = {
        "parameters": sum(p.numel() for p in model.parameters()),
        "bytes_most": peaks,
        "times_smaller": peaks["dense"] / peaks["pruned"],
        "token_seconds": {name: spread(values) for name, values in seconds.items()},
        "times_faster": spread([a / b for a, b in zip(seconds["dense"], seconds["pruned"], strict=True)]),
        "first_round_seconds": first_round,
        "round_seconds": spread(scoring),
        "scoring_share": sum(scoring) / (sum(seconds["pruned"]) * INTERVAL),
    }
    print(row, flush=True)
    return row


def smollm2() -> dict[str, Any]:
    """Seconds of a round per token, and of a token, after 8,000 tokens and a budget of 2,048."""
    import torch

    import sparing
    from sparing.config.llama import LlamaConfig

    model = sparing.load("smollm2", dtype="float32")
    assert model.tokenizer is not None and isinstance(model.config, LlamaConfig)
    statistics = sparing.calibrate(model, "Once upon a time there was a king who had three daughters. " * 8)
    memory = model.memory(f"triattention:{BUDGET}", interval=INTERVAL, protect_prompt=False, statistics=statistics)
    fill(BUDGET, memory)
    scoring = stopwatch(memory.pruner, "_evict")
    began = time.perf_counter()
    for _ in range(2 * INTERVAL):
        model.logits([7], memory, prompt=False)
    total = time.perf_counter() - began
    heads, (layers, d) = model.config.num_attention_heads, (model.config.num_hidden_layers, model.config.head_dim)
    row = {
        "rounds": len(scoring),
        "round_seconds": spread(scoring),
        "microseconds_per_token": 1e6 * sum(scoring) / len(scoring) / INTERVAL,
        "scoring_share": sum(scoring) / total,
        "flop_per_round": 2 * layers * (BUDGET + INTERVAL) * heads * (d + d // 2),
        "threads": torch.get_num_threads(),
    }
    print(row, flush=True)
    return row


def fill(tokens: int, *memories: Any) -> None:
    """Commit the same random entries as a prompt in all memories."""
    import torch

    for memory in memories:
        memory.stage(tokens)
    for layers in zip(*(memory.own for memory in memories), strict=True):
        spec, dtype = layers[0].spec, layers[0].read()[0].dtype
        for start in range(0, tokens, 4096):
            shape = (2, min(4096, tokens - start), spec.num_key_value_heads, spec.head_dim)
            k, v = torch.randn(shape).to(dtype)
            with torch.inference_mode():
                for layer in layers:
                    layer.stage(k, v)
    for memory in memories:
        memory.commit(tokens, prompt=True)


def stopwatch(thing: Any, method: str) -> list[float]:
    """From now on, the seconds of each call of a method of `thing`."""
    seconds: list[float] = []
    plain = getattr(thing, method)

    def timed(*arguments: Any) -> Any:
        began = time.perf_counter()
        result = plain(*arguments)
        seconds.append(time.perf_counter() - began)
        return result

    setattr(thing, method, timed)
    return seconds


if __name__ == "__main__":
    main()
