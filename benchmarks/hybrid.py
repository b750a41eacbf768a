"""A hybrid of Mamba-2, attention and latent experts of 176 M random parameters: speed, and memory as context grows.

    python benchmarks/hybrid.py speed [--dtypes bfloat16] [--threads 2]
    python benchmarks/hybrid.py memory
    python benchmarks/hybrid.py replay

speed: prefill and greedy decoding at batch 1 against transformers on the same weights, both sides in turn step by step,
each configuration in a process of its own; transformers with sdpa attention and the fastest of its ways to run experts,
apart for prefill and for decoding. `limit` is the share of the memory's read bandwidth that decoding reaches with the
bytes a token must move: weights of the chosen experts and all else, keys, values, states read and written (`plan`).
Beside bfloat16 the same model decodes with its weights in few bits, against transformers' bfloat16.
memory: bytes held and seconds a step at 1 k to 64 k tokens, against a model of
attention layers alone with as many layers and parameters; entries are drawn at random, as computing 64 k tokens would
take hours.
replay: taking tokens back by replay against keeping a copy of the state after each: seconds of one layer of Nemotron 3
Super, and bytes of the storages that either holds for the drafts, of that layer and of all layers of the model here.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any

from decode import Ours, Theirs, compare
from harness import child_json, interleave, read_bandwidth, spread, write_result

PROMPT, STEPS, WARM, PREFILLS = 256, 20, 2, 2
PACKED = ("int8", "int4", "nvfp4")
PATTERN = "MEMEM*EMEMEM*EMEMEME"
HYBRID = {
    "model_type": "nemotron_h",
    "hybrid_override_pattern": PATTERN,
    "vocab_size": 16384,
    "hidden_size": 1024,
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "ssm_state_size": 128,
    "mamba_num_heads": 32,
    "mamba_head_dim": 64,
    "n_groups": 8,
    "conv_kernel": 4,
    "n_routed_experts": 16,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "moe_shared_expert_intermediate_size": 1024,
    "moe_latent_size": 256,
    "routed_scaling_factor": 2.5,
    "max_position_embeddings": 131072,
}
ATTENTION = {
    "model_type": "llama",
    "vocab_size": 16384,
    "hidden_size": 1024,
    "intermediate_size": 1536,
    "num_hidden_layers": len(PATTERN),
    "num_attention_heads": 16,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": False,
}
CONTEXTS = (1024, 4096, 16384, 65536)


def speed(dtype: str, threads: int) -> dict[str, Any]:
    """One configuration, in this process."""
    import torch
    import transformers

    import sparing

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    settings = {key: value for key, value in HYBRID.items() if key != "model_type"}
    with tempfile.TemporaryDirectory() as folder:
        theirs = transformers.NemotronHForCausalLM(transformers.NemotronHConfig(**settings))
        theirs = theirs.to(getattr(torch, dtype)).eval()
        theirs.save_pretrained(folder)
        ours = sparing.load(folder, dtype=dtype, device="cpu")
        formats = PACKED if dtype == "bfloat16" else ()
        packed = {format: Ours(sparing.load(folder, weights=format, device="cpu")) for format in formats}
    theirs.set_attn_implementation("sdpa")
    sides: dict[str, Any] = {"sparing": Ours(ours)}
    for way in ("eager", "grouped_mm"):
        sides[way] = Theirs(theirs, partial(theirs.set_experts_implementation, way))
    prompt = torch.randint(8, 16000, (PROMPT,), generator=torch.Generator().manual_seed(1))
    with torch.inference_mode():
        interleave({key: lambda side=side: side.start(prompt) for key, side in sides.items()}, 1)
        prefill = interleave({key: lambda side=side: side.start(prompt) for key, side in sides.items()}, PREFILLS)
        for side in packed.values():
            side.start(prompt)
        steps = {key: side.step for key, side in (sides | packed).items()}
        interleave(steps, WARM)
        seconds = interleave(steps, STEPS)
    decode = {key: seconds[key] for key in sides}
    bandwidth = read_bandwidth(threads)
    raw = {**HYBRID, "dtype": dtype}
    moved = sparing.plan(raw, context=PROMPT).bytes_per_token
    result = {
        "dtype": dtype,
        "threads": threads,
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "weight_bytes": sum(parameter.nbytes for parameter in ours.parameters()),
        "bytes_per_token": moved,
        "read_bytes_per_second": bandwidth,
        "prefill": compare(prefill, PROMPT, "experts"),
        "decode": compare(decode, 1, "experts"),
    }
    result["decode"]["limit"] = moved / spread(decode["sparing"])["median"] / bandwidth
    theirs_taking = seconds[result["decode"]["experts"]]
    result["packed"] = {}
    for format in packed:
        moved = sparing.plan(raw, context=PROMPT, weights=format).bytes_per_token
        result["packed"][format] = {
            "tokens_per_second": spread([1 / s for s in seconds[format]]),
            "bytes_per_token": moved,
            "limit": moved / spread(seconds[format])["median"] / bandwidth,
            "ratio": spread([t / s for t, s in zip(theirs_taking, seconds[format], strict=True)]),
        }
    return result


def random_model(raw: dict[str, Any]) -> Any:
    """A bfloat16 model of a config with small random weights; what loading keeps in float32 is so here."""
    import torch

    from sparing.config import parse_config
    from sparing.models.loading import build

    model = build(parse_config(raw)).to_empty(device="cpu").bfloat16().eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.normal_(1.0 if tensor.ndim == 1 else 0.0, 0.02, generator=generator)
    return model


def fill(memory: Any, tokens: int) -> None:
    """Bring a memory to `tokens` tokens, its entries and states drawn at random."""
    import torch

    from sparing.config.memory import AttentionSpec

    before, more = memory.length, tokens - memory.length
    for group in memory.groups:
        spec = group.spec(group.layers[0])
        if isinstance(spec, AttentionSpec):
            group.stage(more, before, more)
            for i in group.layers:
                group.write(i, *torch.randn(2, more, spec.num_key_value_heads, spec.head_dim).bfloat16())
            group.commit(more, more, before)
        else:
            drawn = {i: {name: torch.randn_like(x) for name, x in group.state(i).items()} for i in group.layers}
            group.restore(tokens, drawn)
    memory.length = tokens


def growth() -> Iterator[dict[str, Any]]:
    """Parameters of both models, then bytes held and seconds a step at each context."""
    import torch

    from sparing import plan
    from sparing.models.batch import Row
    from sparing.planning.memory import hybrid_cache_bytes

    torch.manual_seed(0)
    models = {"hybrid": random_model(HYBRID), "attention": random_model(ATTENTION)}
    memories = {name: model.memory() for name, model in models.items()}
    yield {name: sum(p.numel() for p in model.parameters()) for name, model in models.items()}
    with torch.inference_mode():
        for context in CONTEXTS:
            for name in models:
                fill(memories[name], context)
            token = torch.tensor([7])

            def step(name: str, token: Any = token) -> None:
                models[name].head(models[name].run([Row(token, memories[name], wanted=1)]))
                memories[name].rollback()

            calls = {name: lambda name=name: step(name) for name in models}
            interleave(calls, WARM)
            seconds = interleave(calls, STEPS)
            expected = hybrid_cache_bytes(PATTERN, context, 2, 64, 32, 64, 128, 8, 4)
            held = {name: memory.nbytes for name, memory in memories.items()}
            raw = {**HYBRID, "dtype": "bfloat16"}
            assert held["hybrid"] == expected["total"] == plan(raw, context=context).memory_bytes
            yield {
                "context": context,
                "bytes": held,
                "of_hybrid": expected,
                "step_seconds": {name: spread(values) for name, values in seconds.items()},
                "step_ratio": spread([a / h for h, a in zip(seconds["hybrid"], seconds["attention"], strict=True)]),
            }


def roll_back(drafts: int = 4, accepted: int = 2) -> dict[str, Any]:
    """One layer of Nemotron 3 Super: keep `accepted` tokens by replay, or by a copy of the state after each draft."""
    import torch

    from sparing.config.memory import RecurrentSpec
    from sparing.kernels import MambaWeights
    from sparing.memory.group import Share
    from sparing.memory.recurrent import RecurrentGroup

    spec = RecurrentSpec(128, 64, 128, 8, 4)
    g = torch.Generator().manual_seed(0)
    memory = RecurrentGroup(spec, [0], torch.bfloat16, torch.device("cpu"))
    xbc, dt = torch.randn(drafts, spec.conv_size, generator=g).bfloat16(), 0.1 * torch.rand(drafts, 128, generator=g)
    conv = torch.randn(spec.conv_size, 1, 4, generator=g)
    weights = MambaWeights(conv.bfloat16(), None, -torch.ones(128), torch.ones(128))
    states: list[Any] = []

    def scan(one: Any, first: int, last: int) -> None:
        n = last - first
        one.stage(n, 0, n)
        one.together([one], [Share(n, n, True, n)]).scan(0, xbc[first:last], dt[first:last], weights)

    def replay() -> None:
        scan(memory, 0, drafts)
        memory.commit(accepted, drafts, 0)

    def snapshots() -> None:
        states.clear()
        one = memory.fork()
        for t in range(drafts):
            scan(one, t, t + 1)
            one.commit(1, 1, 0)
            states.append(one.fork())

    with torch.inference_mode():
        interleave({"replay": replay, "snapshots": snapshots}, WARM)
        seconds = interleave({"replay": replay, "snapshots": snapshots}, STEPS)
        scan(memory, 0, drafts)
    return {
        "drafts": drafts,
        "accepted": accepted,
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratio": spread([s / r for r, s in zip(seconds["replay"], seconds["snapshots"], strict=True)]),
        "bytes": staged_bytes(memory, storage_bytes(tensor for one in states for tensor in one.state(0).values())),
    }


def roll_back_all(drafts: int = 4) -> dict[str, Any]:
    """All Mamba layers of the model: what they hold between a forward over the drafts and its commit."""
    import torch

    from sparing.memory.recurrent import RecurrentGroup
    from sparing.models.batch import Row

    model = random_model(HYBRID)
    memory = model.memory()
    group = next(group for group in memory.groups if isinstance(group, RecurrentGroup))
    with torch.inference_mode():
        model.run([Row(torch.arange(drafts), memory)])
    return {"drafts": drafts, "layers": len(group.layers), "bytes": staged_bytes(group, drafts * group.nbytes)}


def staged_bytes(group: Any, snapshots: int) -> dict[str, Any]:
    """Of the storages that staged tokens hold: their rows and steps, and what the convolution made of the rows.

    snapshots: bytes that copies of the states would take instead.
    """
    _, staged = group.mark()
    rows, convolved = storage_bytes([*staged.windows, staged.dt]), storage_bytes([staged.mixed])
    return {
        "rows": rows,
        "convolved": convolved,
        "snapshots": snapshots,
        "ratio_to_rows": snapshots / rows,
        "ratio_to_both": snapshots / (rows + convolved),
    }


def storage_bytes(tensors: Iterable[Any]) -> int:
    """Of all storages that tensors lie in, each counted once."""
    storages = [tensor.untyped_storage() for tensor in tensors]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def line(result: dict[str, Any]) -> str:
    text = f"{result['dtype']:10}{result['threads']} threads"
    for phase in ("prefill", "decode"):
        row = result[phase]
        text += (
            f" | {phase} {row['sparing']['median']:6.1f} tok/s, {row['experts']} {row['transformers']['median']:6.1f}:"
            f" {row['ratio']['median']:.2f}x ({row['ratio']['min']:.2f}-{row['ratio']['max']:.2f})"
        )
    for format, row in result["packed"].items():
        text += f" | {format} {row['tokens_per_second']['median']:6.1f} tok/s: {row['ratio']['median']:.2f}x"
    return f"{text} | {result['decode']['limit']:.0%} of {result['read_bytes_per_second'] / 1e9:.0f} GB/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", choices=("speed", "memory", "replay", "all"), default="all")
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--one", action="store_true", help="one configuration in this process, printed as JSON")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(speed(arguments.dtypes[0], arguments.threads[0])))
        return
    if arguments.part in ("speed", "all"):
        rows = []
        for dtype in arguments.dtypes:
            for threads in arguments.threads:
                options = ["speed", "--one", "--dtypes", dtype, "--threads", str(threads)]
                rows.append(child_json(__file__, options, threads))
                print(line(rows[-1]), flush=True)
                write_result("hybrid", {"config": HYBRID, "prompt": PROMPT, "steps": STEPS, "rows": rows})
    if arguments.part in ("replay", "all"):
        result = {"layer_of_super": roll_back(), "config": HYBRID, "model": roll_back_all()}
        print(result["layer_of_super"], result["model"], sep="\n", flush=True)
        write_result("hybrid_replay", result)
    if arguments.part in ("memory", "all"):
        result = {"attention": ATTENTION, "growth": []}
        for row in growth():
            print(row, flush=True)
            if "context" in row:
                result["growth"].append(row)
                write_result("hybrid_memory", result)
            else:
                result["parameters"] = row


if __name__ == "__main__":
    main()
