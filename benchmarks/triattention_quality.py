"""What forgetting costs SmolLM2-135M: teacher-forced loss with half, a quarter and an eighth of its entries.

    python benchmarks/triattention_quality.py [--texts 3]

Statistics come from fairy tales; the texts are others of them, and Shakespeare's plays, 1,024 tokens each. The first 32
tokens are a protected prompt; the rest is read 32 tokens at a time, after each of which a round is due: the same rounds
as one token after another. Every way of choosing keeps equally many entries. Losses are over the tokens read after the
first round, in nats above the full memory; +- is the standard error over texts of the difference to trig + norm.
"""

from __future__ import annotations

import argparse
import functools
from typing import Any

from harness import write_result

LENGTH, PROMPT, CHUNK = 1024, 32, 32
CALIBRATION = 10_000  # tokens
SHARES = (0.5, 0.25, 0.125)
AT_ALL_SHARES = ("trig + norm", "norm only", "random", "window")  # the others at the first two


def main() -> None:
    import torch
    from torch.nn import functional as F

    import sparing
    from sparing.kernels.trigonometric import triattention_keep
    from sparing.memory import triattention
    from sparing.memory.batch import Row
    from sparing.training.data import corpus_file

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--texts", type=int, default=3, help="of each corpus")
    arguments = parser.parse_args()
    model = sparing.load("smollm2", dtype="float32")
    assert model.tokenizer is not None
    tales = model.tokenizer.encode(corpus_file("fairy_tales.txt").read_text(encoding="ascii")[:1_500_000])
    plays = model.tokenizer.encode(corpus_file("shakespeare.txt").read_text(encoding="ascii"))
    statistics = sparing.calibrate(model, tales[:CALIBRATION], length=2048)
    texts = {
        f"{name} {i}": torch.tensor(corpus[start : start + LENGTH])
        for name, corpus, first in (("tales", tales, 100_000), ("plays", plays, 0))
        for i in range(arguments.texts)
        for start in [first + i * 30_000]
    }

    generator = torch.Generator().manual_seed(0)

    def at_random(k_rot: Any, *rest: Any, keep: int, **options: Any) -> torch.Tensor:
        """As many entries, drawn evenly from those that may be forgotten."""
        n = next(iter(k_rot)).shape[1]
        return torch.randperm(n, generator=generator)[:keep].sort().values

    linear = [1 + round(i * 65535 / 16) for i in range(17)]
    near = list(range(1, 18))
    full = {"mode": "per_head"}
    ways: dict[str, tuple[dict[str, Any], Any]] = {
        "trig + norm": (full, triattention_keep),
        "norm only": (full | {"trig": False}, triattention_keep),
        "random": (full, at_random),
        "window": ({}, None),
        "17 linear offsets to 65536": (full, functools.partial(triattention_keep, offsets=linear)),
        "offsets 1 to 17": (full, functools.partial(triattention_keep, offsets=near)),
        "trig + unweighted norm": (full | {"norm_weighting": False}, triattention_keep),
        "trig + norm, global": ({"mode": "global"}, triattention_keep),
        "trig + norm, per layer and head": ({"mode": "per_layer_per_head"}, triattention_keep),
        "trig + norm, last 32 protected": (full | {"protect_recent": 32}, triattention_keep),
        "norm only, last 32 protected": (full | {"trig": False, "protect_recent": 32}, triattention_keep),
        "random, last 32 protected": (full | {"protect_recent": 32}, at_random_but_recent(at_random)),
    }

    ids = torch.stack(list(texts.values()))  # [texts, LENGTH]

    @torch.inference_mode()
    def losses(kv: str, **options: Any) -> torch.Tensor:
        """Nats of every token but the first of all texts, read side by side: [texts, LENGTH - 1]."""
        memories = [model.memory(kv, **options) for _ in texts]
        parts = []
        for start in range(0, LENGTH, CHUNK):
            hidden = model.run(
                [Row(chunk, m) for chunk, m in zip(ids[:, start : start + CHUNK], memories, strict=True)]
            )
            target = ids[:, start + 1 : start + CHUNK + 1]
            for row, states, memory in zip(target, hidden.split(CHUNK), memories, strict=True):
                parts.append(F.cross_entropy(model.head(states[: len(row)]), row, reduction="none"))
                memory.commit(CHUNK, prompt=start < PROMPT)
        if kv != "dense":
            budget = int(kv.split(":")[1])
            assert all(len(memory.evictions) == (LENGTH - budget) // CHUNK for memory in memories)
        chunks = [torch.stack(parts[i : i + len(texts)]) for i in range(0, len(parts), len(texts))]
        return torch.cat(chunks, 1)

    dense = losses("dense")
    rows = []
    for share in SHARES:
        budget, reference = int(share * LENGTH), None
        for way, (options, choose) in ways.items():
            if share == SHARES[-1] and way not in AT_ALL_SHARES:
                continue
            if choose is None:  # as many of the last entries, and the prompt
                options = {"protect_recent": budget - PROMPT - 1}
            triattention.triattention_keep = choose or triattention_keep
            found = losses(f"triattention:{budget}", statistics=statistics, interval=CHUNK, **options)
            excess = (found - dense)[:, budget:].mean(1)  # per text
            reference = excess if reference is None else reference
            worse = excess - reference
            rows.append(
                {
                    "share": share,
                    "budget": budget,
                    "way": way,
                    "nats_above_full": excess.mean().item(),
                    "tales": excess[: arguments.texts].mean().item(),
                    "plays": excess[arguments.texts :].mean().item(),
                    "above_trig_norm": worse.mean().item(),
                    "standard_error": (worse.std() / len(worse) ** 0.5).item(),
                    "texts_worse": int((worse > 0).sum()),
                }
            )
            print(rows[-1], flush=True)
    write_result(
        "triattention_quality",
        {
            "model": "SmolLM2-135M-Instruct",
            "dtype": "float32",
            "length": LENGTH,
            "prompt": PROMPT,
            "interval": CHUNK,
            "texts": len(texts),
            "calibration_tokens": statistics.tokens,
            "concentrated_heads": (statistics.concentration() > 0.95).float().mean().item(),
            "full_nats": dense.mean().item(),
            "rows": rows,
        },
    )


def at_random_but_recent(at_random: Any) -> Any:
    """Random among all but the last `protect_recent`, which stay."""
    import torch

    def choose(k_rot: Any, *rest: Any, keep: int, protect_recent: int, **options: Any) -> torch.Tensor:
        keys = next(iter(k_rot))
        n = keys.shape[1] - protect_recent
        chosen = at_random([keys[:, :n]], keep=keep - protect_recent)
        return torch.cat([chosen, torch.arange(n, n + protect_recent)])

    return choose


if __name__ == "__main__":
    main()
