"""Speculative decoding against plain decoding: by look-up, where it helps and where not, and by a trained head.

    python benchmarks/speculative.py [--models smollm2 tales] [--prompts copy code] [--threads 2] [--repetitions 3]

Same weights, same prompts, all decoders in turn within one process. SmolLM2-135M-Instruct answers greedily, so all
decoders give the same tokens; the bundled fairy-tale model samples at temperature 0.8, where they give other tokens of
the same distribution, so seconds a token are compared. The bundled hybrid, which has a drafting head (MTP), continues
the held-out ends of the books of its corpus both ways. `tokens a round` counts the drafts that became output and the
target's own token; `pass` is the time of a pass of the target over 1 to 8 tokens, relative to one, and `draft` that of
one draft of the head. Every prompt runs in a process of its own; prompts that are not asked for keep the result they
had.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from typing import Any

from harness import RESULTS, child_json, interleave, spread, write_result

TEXT = (
    "The old miller lived in a small house beside the river. Every morning he opened the wooden gate, let the water run"
    " over the great wheel, and listened to the stones grinding the corn. In the evening he swept the floor, counted"
    " the sacks of flour, and sat down by the fire with his daughter. One winter the river froze, the wheel stood"
    " still, and no corn could be ground. The people of the village came with shovels and axes, broke the ice, and"
    " before the week was over there was bread again."
)
CODE = """def average(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)


def variance(values):
    mean = average(values)
    total = 0
    for value in values:
        total += (value - mean) ** 2
    return total / len(values)
"""
SMOLLM2 = {
    "copy": f"Correct the spelling mistakes in this text and repeat the rest unchanged:\n\n{TEXT}",
    "code": f"Rewrite this code with the variable `total` renamed to `result`. Change nothing else.\n\n{CODE}",
    "summary": f"Summarize this text in three sentences:\n\n{TEXT}",
    "story": "Write a short story about a lighthouse keeper who finds a letter in a bottle.",
}
TALES = {
    "king": "Once upon a time there was a king who had",
    "fox": "A fox once met a wolf",
}
HYBRID = {"greedy": None, "sampled": None}  # of `held_out_prompts`
PROMPTS = {"smollm2": SMOLLM2, "tales": TALES, "hybrid": HYBRID}
SAMPLED = {"temperature": 0.8, "seed": 1}
LIMIT = 64
PLAIN: dict[str, dict[str, Any]] = {"plain": {"decoder": "autoregressive"}}
LOOK_UP = PLAIN | {
    "default": {"draft": "ngram"},
    "up to 6": {"draft": "ngram", "draft_tokens": 6},
}
HEAD = PLAIN | {
    "look-up": {"draft": "ngram"},
    "default": {"draft": "mtp"},
    "always 1": {"draft": "mtp", "draft_tokens": 1, "adaptive": False},
    "always 3": {"draft": "mtp", "draft_tokens": 3, "adaptive": False},
}
SIDES = {"smollm2": LOOK_UP, "tales": LOOK_UP, "hybrid": HEAD}


def held_out_prompts() -> list[str]:
    """The first words of a held-out paragraph of each book: about 120 characters."""
    from sparing.training.data import corpus_file, split_books

    prompts = []
    for book in split_books(corpus_file("fairy_tales.txt").read_text(encoding="ascii"))[1]:
        long = next(paragraph for paragraph in book.split("\n\n")[1:] if len(paragraph) > 240)
        prompts.append(long[:120].rsplit(" ", 1)[0])
    return prompts


class Side:
    """One decoder on some prompts, one after the other; keeps what its last run gave."""

    def __init__(self, model: Any, prompts: list[Any], options: dict[str, Any]):
        self.model, self.prompts, self.options = model, prompts, options

    def __call__(self) -> None:
        import sparing

        self.ids: list[int] = []
        self.stats: dict[str, int] = {}
        for prompt in self.prompts:
            for event in sparing.generate(self.model, prompt, max_new_tokens=LIMIT, **self.options):
                if isinstance(event, sparing.Commit):
                    self.ids += event.ids
                elif isinstance(event, sparing.Done):
                    for name in {"rounds", "proposed", "accepted"} & event.stats.keys():
                        self.stats[name] = self.stats.get(name, 0) + event.stats[name]


def measure(name: str, kind: str, threads: int, repetitions: int) -> dict[str, Any]:
    """One model on one prompt, in this process."""
    import torch

    import sparing

    torch.set_num_threads(threads)
    model = sparing.load(name, dtype="float32", device="cpu")
    greedy = name == "smollm2" or kind == "greedy"
    sampling = {"temperature": 0.0} if greedy else SAMPLED
    text = PROMPTS[name][kind]
    prompts = held_out_prompts() if text is None else [[{"role": "user", "content": text}] if greedy else text]
    sides = {side: Side(model, prompts, sampling | options) for side, options in SIDES[name].items()}
    relative = passes(model)
    seconds = interleave(sides, repetitions)
    rows = {side: row(run, seconds[side], sides["plain"], seconds["plain"]) for side, run in sides.items()}
    same = {"same output": all(run.ids == sides["plain"].ids for run in sides.values())} if greedy else {}
    about = {"model": name, "prompt": kind, "prompts": len(prompts), "threads": threads, "sampling": sampling}
    return {**about, **relative, **rows, **same}


def row(side: Side, seconds: list[float], plain: Side, plain_seconds: list[float]) -> dict[str, Any]:
    tokens, base = len(side.ids), len(plain.ids)
    stats = side.stats
    found: dict[str, Any] = {"tokens": tokens, "tokens a second": spread([tokens / s for s in seconds])}
    if "rounds" in stats:
        found["tokens a round"] = (tokens - len(side.prompts)) / stats["rounds"]
        found["drafts a round"] = stats["proposed"] / stats["rounds"]
        found["accepted"] = stats["accepted"] / max(1, stats["proposed"])
        ratios = [(p / base) / (s / tokens) for s, p in zip(seconds, plain_seconds, strict=True)]
        found["times plain"] = spread(ratios)
    return found


def passes(model: Any) -> dict[str, Any]:
    """Seconds of a pass over 1, 2, ... tokens after 256 others, and of one draft of its head, relative to one."""
    import torch

    from sparing.models.batch import Row
    from sparing.models.loading import load_drafting_head
    from sparing.models.nemotron3 import Nemotron3

    memory = model.memory()
    tokens = torch.randint(100, 1000, (256,), generator=torch.Generator().manual_seed(0))
    model.logits(tokens, memory)

    def run(width: int) -> None:
        model.head(model.run([Row(tokens[:width], memory)]))
        memory.rollback()

    widths = (1, 2, 3, 4, 6, 8)
    calls: dict[str, Callable[[], None]] = {str(width): lambda width=width: run(width) for width in widths}
    if isinstance(model, Nemotron3):
        head: Any = load_drafting_head(model)
        entries = head.memory()
        states = torch.zeros(256, model.config.hidden_size, dtype=model.dtype)
        head.run([Row(tokens, entries)], states)
        entries.commit(256)

        def draft() -> None:
            head.run([Row(tokens[:1], entries)], states[:1])
            entries.rollback()

        calls["draft"] = draft
    seconds = interleave(calls, 8)
    medians = {name: spread(values)["median"] for name, values in seconds.items()}
    relative = {name: median / medians["1"] for name, median in medians.items()}
    cost = {"draft": relative.pop("draft")} if "draft" in relative else {}
    return {"pass": {int(width): value for width, value in relative.items()}, **cost}


def line(result: dict[str, Any]) -> str:
    text = f"{result['model']:8}{result['prompt']:9}plain {result['plain']['tokens a second']['median']:5.1f} tok/s"
    for side in list(SIDES[result["model"]])[1:]:
        found, ratio = result[side], result[side]["times plain"]
        text += (
            f" | {side}: {found['tokens a round']:.2f} a round, {found['accepted']:.0%} of"
            f" {found['drafts a round']:.2f} accepted, {ratio['median']:.2f}x ({ratio['min']:.2f}-{ratio['max']:.2f})"
        )
    return text + ("" if result.get("same output", True) else " | OTHER OUTPUT")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=list(PROMPTS), choices=list(PROMPTS))
    parser.add_argument("--prompts", nargs="+", help="of these models (default: all)")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--one", action="store_true", help="one prompt in this process, printed as JSON")
    arguments = parser.parse_args()
    chosen = [(m, p) for m in arguments.models for p in arguments.prompts or PROMPTS[m]]
    if arguments.one:
        print(json.dumps(measure(*chosen[0], arguments.threads, arguments.repetitions)))
        return
    path = RESULTS / "speculative.json"
    known = json.loads(path.read_text())["results"] if path.exists() else []
    results = {(result["model"], result["prompt"]): result for result in known}
    for model, prompt in chosen:
        options = ["--models", model, "--prompts", prompt, "--repetitions", str(arguments.repetitions)]
        threads = arguments.threads
        results[model, prompt] = child_json(__file__, ["--one", *options, "--threads", str(threads)], threads)
        print(line(results[model, prompt]), flush=True)
        write_result("speculative", {"limit": LIMIT, "results": list(results.values())})


if __name__ == "__main__":
    main()
