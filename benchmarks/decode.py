"""Prefill and greedy decoding at batch 1, against transformers, on the same random weights of about 200 M parameters.

    python benchmarks/decode.py [--models gemma4] [--dtypes float32] [--threads 1]

Every configuration runs in a process of its own, both sides in turn step by step. transformers is taken with the
attention implementation that is fastest for it, apart for prefill and for decoding. `limit` is the share of the
memory's read bandwidth that decoding reaches (a sum over 256 MiB, measured in the same process; a step reads all
weights but the rows of the embedding table it does not need).
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable
from functools import partial
from typing import Any

from harness import child_json, interleave, read_bandwidth, spread, write_result

PROMPT, STEPS, WARM, PREFILLS = 256, 24, 2, 4


def gemma4() -> Any:
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    config = Gemma4TextConfig(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        global_head_dim=256,  # pyright: ignore[reportCallIssue]  (read from keyword arguments)
        sliding_window=512,
        hidden_size_per_layer_input=0,
        vocab_size_per_layer_input=8,
        final_logit_softcapping=30.0,
        max_position_embeddings=32768,
    )
    return Gemma4ForCausalLM(config)


def llama() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=32768,
        hidden_size=1024,
        intermediate_size=4096,
        num_hidden_layers=12,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=128,
        max_position_embeddings=32768,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config)


MODELS = {"gemma4": gemma4, "llama": llama}


class Ours:
    """One greedy row of the engine."""

    def __init__(self, model: Any):
        self.model = model

    def start(self, prompt: Any, memory: Any = None) -> None:
        """Read a prompt. memory: what it goes on from; None: nothing."""
        import torch

        from sparing.decoding.autoregressive import AutoregressiveStepper
        from sparing.decoding.engine import Engine
        from sparing.decoding.row import ActiveRow
        from sparing.decoding.sampling import Sampling
        from sparing.decoding.transcript import Transcript

        transcript = Transcript(None, (), (), self.model.config.max_position_embeddings)
        row = ActiveRow(0, prompt, memory or self.model.memory(), transcript, torch.Generator())
        self.engine = Engine(self.model)
        self.engine.add(AutoregressiveStepper(self.model, row, Sampling()))
        self.step()

    def step(self) -> None:
        for _ in self.engine.step():
            pass


class Theirs:
    """transformers without `generate`, whose own overhead is not its model's. prepare: sets the way it computes."""

    def __init__(self, model: Any, prepare: Callable[[], None]):
        self.model, self.prepare = model, prepare

    def start(self, prompt: Any, cache: Any = None) -> None:
        self.cache, self.token = cache, prompt[None]
        self.step()

    def step(self) -> None:
        self.prepare()
        out = self.model(input_ids=self.token, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        self.cache, self.token = out.past_key_values, out.logits[:, -1:].argmax(-1)


def measure(name: str, dtype: str, threads: int) -> dict[str, Any]:
    """One configuration, in this process."""
    import torch
    import transformers

    import sparing

    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        theirs = MODELS[name]().to(getattr(torch, dtype)).eval()
        theirs.save_pretrained(folder)
        ours = sparing.load(folder, dtype=dtype, device="cpu")
    sides: dict[str, Any] = {"sparing": Ours(ours)}
    for way in ("eager", "sdpa"):
        sides[way] = Theirs(theirs, partial(theirs.set_attn_implementation, way))
    prompt = torch.randint(8, 30000, (PROMPT,), generator=torch.Generator().manual_seed(1))
    weights = sum(parameter.nbytes for parameter in ours.parameters())
    with torch.inference_mode():
        interleave({key: lambda side=side: side.start(prompt) for key, side in sides.items()}, 1)
        prefill = interleave({key: lambda side=side: side.start(prompt) for key, side in sides.items()}, PREFILLS)
        steps = {key: side.step for key, side in sides.items()}
        interleave(steps, WARM)
        decode = interleave(steps, STEPS)
    bandwidth = read_bandwidth(threads)
    result = {
        "model": name,
        "dtype": dtype,
        "threads": threads,
        "parameters": sum(parameter.numel() for parameter in ours.parameters()),
        "weight_bytes": weights,
        "read_bytes_per_second": bandwidth,
        "prefill": compare(prefill, PROMPT),
        "decode": compare(decode, 1),
    }
    result["decode"]["limit"] = weights / spread(decode["sparing"])["median"] / bandwidth
    return result


def compare(seconds: dict[str, list[float]], tokens: int, choice: str = "attention") -> dict[str, Any]:
    """Tokens a second of both sides, and how many times theirs ours is, as the median over the rounds.

    Theirs is the fastest of the sides that are not "sparing"; choice: the key under which its name is kept.
    """
    best = min((name for name in seconds if name != "sparing"), key=lambda name: spread(seconds[name])["median"])
    return {
        "sparing": spread([tokens / s for s in seconds["sparing"]]),
        "transformers": spread([tokens / s for s in seconds[best]]),
        choice: best,
        "ratio": spread([theirs / ours for ours, theirs in zip(seconds["sparing"], seconds[best], strict=True)]),
    }


def line(result: dict[str, Any]) -> str:
    text = f"{result['model']:8}{result['dtype']:10}{result['threads']} threads"
    for phase in ("prefill", "decode"):
        row = result[phase]
        ours, theirs = row["sparing"]["median"], row["transformers"]["median"]
        text += (
            f" | {phase} {ours:6.1f} tok/s, {row['attention']} {theirs:6.1f}:"
            f" {row['ratio']['median']:.2f}x ({row['ratio']['min']:.2f}-{row['ratio']['max']:.2f})"
        )
    return f"{text} | {result['decode']['limit']:.0%} of {result['read_bytes_per_second'] / 1e9:.0f} GB/s"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--one", action="store_true", help="one configuration in this process, printed as JSON")
    arguments = parser.parse_args()
    chosen = [(m, d, t) for m in arguments.models for d in arguments.dtypes for t in arguments.threads]
    if arguments.one:
        print(json.dumps(measure(*chosen[0])))
        return
    rows = []
    for model, dtype, threads in chosen:
        options = ["--one", "--models", model, "--dtypes", dtype, "--threads", str(threads)]
        rows.append(child_json(__file__, options, threads))
        print(line(rows[-1]), flush=True)
        write_result("decode", {"prompt": PROMPT, "steps": STEPS, "rows": rows})


if __name__ == "__main__":
    main()
