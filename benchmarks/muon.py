"""Muon against torch's Muon and AdamW: time of a step, and with `--train DIR` the losses at equal tokens.

    python benchmarks/muon.py                                    # results/muon.json
    python benchmarks/muon.py --train runs/muon --minutes 9      # again and again: each call goes on with the runs
    python benchmarks/muon.py --train runs/muon --steps 1000     # ... until all are done: results/muon_training.json

torch.optim.Muon takes single matrices, multiplies in bfloat16 and has one set of coefficients; here it gets each matrix
of a stack by itself, and AdamW takes the rest, as with ours. All sides have one learning rate: both scales match the
step of AdamW (0.18 and torch's 0.2 of it).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.optim._muon import muon as torch_muon

from harness import interleave, spread, write_result
from sparing.config import parse_config
from sparing.models.loading import build
from sparing.training import RECIPES, run, train
from sparing.training.muon import Muon, independent_matrices
from sparing.training.optimizers import make_optimizer
from sparing.training.state import FILE, read_run

REPETITIONS = 5
SEEDS = (0, 1, 2)
# Float32 products: bfloat16 ones are emulated on most CPUs. Half the recipe's sequences, of half the length.
TRAINED = {"products": "float32", "batch_size": 4, "length": 128, "validate_every": 50}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 1024,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 1,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
}


class TorchMuon(Muon):
    """The same groups, their matrices moved by the function that torch.optim.Muon calls, with its settings."""

    def _step_matrices(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        lists: tuple[list[Tensor], ...] = ([], [], [])
        for p in parameters:
            assert p.grad is not None
            for views, tensor in zip(lists, (p, p.grad, self.state[p]["momentum"]), strict=True):
                views += independent_matrices(tensor, group["rows"])
        torch_muon(
            *lists,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=group["momentum"],
            nesterov=True,
            ns_coefficients=(3.4445, -4.7750, 2.0315),
            ns_steps=5,
            eps=1e-7,
            adjust_lr_fn="match_rms_adamw",
            has_complex=False,
        )


def ours(groups: list[dict[str, Any]], **settings: Any) -> Muon:
    return Muon([{**group, **settings} for group in groups], 0.0)


# What each side makes of the groups that our Muon has for a model.
SIDES: dict[str, Callable[[list[dict[str, Any]]], Muon]] = {
    "muon, 8 + 2 steps, float32": ours,
    "muon, 5 steps, float32": lambda groups: ours(groups, schedule="quintic5"),
    "muon, 5 steps, bfloat16": lambda groups: ours(groups, schedule="quintic5", dtype=torch.bfloat16),
    "torch.optim.Muon": lambda groups: TorchMuon(groups, 0.0),
}
TRAINING = ("adamw", "muon", "muon, 5 steps, float32", "torch.optim.Muon")


def make(name: str, model: Any, **numbers: Any) -> torch.optim.Optimizer:
    """As `make_optimizer`, of which it takes the place in training, for all sides."""
    if name not in SIDES:
        return make_optimizer(name, model, **numbers)
    return SIDES[name](make_optimizer("muon", model, **numbers).param_groups)


def step_times(raw: dict[str, Any]) -> dict[str, Any]:
    """Milliseconds of one step, gradients given."""
    model = build(parse_config(raw)).to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    for p in model.parameters():
        with torch.no_grad():
            p.normal_(generator=generator)
        p.grad = torch.randn(p.shape, generator=generator)
    steps = {name: make(name, model, betas=(0.9, 0.95), weight_decay=0.1).step for name in ("adamw", *SIDES)}
    for step in steps.values():
        step()
    seconds = interleave(steps, REPETITIONS)
    return {
        "parameters": sum(p.numel() for p in model.parameters()),
        "milliseconds": {name: spread([1e3 * each for each in found]) for name, found in seconds.items()},
    }


def go_on(folder: Path, steps: int, deadline: float) -> None:
    """Train every side with every seed, each from where it is, until the time is up."""
    run.make_optimizer = make
    for seed in SEEDS:
        for name in TRAINING:
            out = folder / f"{name.replace(' ', '_').replace(',', '')}_{seed}"
            minutes = (deadline - time.monotonic()) / 60
            if minutes <= 0:
                return
            is_begun = (out / FILE).exists()
            if not is_begun or read_run(out)["step"] < steps:
                settings = {} if is_begun else TRAINED | {"optimizer": name}
                train(
                    RECIPES["recipes/hybrid"],
                    out,
                    steps=steps,
                    minutes=minutes,
                    seed=seed,
                    set=settings,
                    resume=is_begun,
                    log=lambda record: None,
                )
                print(name, seed, "step", read_run(out)["step"], flush=True)


def curves(folder: Path, steps: int) -> list[dict[str, Any]]:
    """The held-out loss of the next token of all finished runs, and the seconds they took."""
    found = []
    for out in sorted(folder.iterdir()):
        about = read_run(out)
        if about["step"] == steps:
            records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
            validated = {r["step"]: r["validation_next_token"] for r in records if "validation_next_token" in r}
            name, seconds = about["settings"]["optimizer"], about["seconds"]
            found.append({"optimizer": name, "seed": about["seed"], "seconds": seconds, "held_out": validated})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--train", type=Path, help="folder of the runs")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--minutes", type=float, default=600.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.train is None:
        raws = {"llama, one layer": LLAMA, "recipes/hybrid": dict(RECIPES["recipes/hybrid"].config)}
        write_result("muon", {"threads": 1, "models": {name: step_times(raw) for name, raw in raws.items()}})
        return
    go_on(options.train, options.steps, time.monotonic() + 60 * options.minutes)
    runs = curves(options.train, options.steps)
    last = {
        name: spread([r["held_out"][options.steps] for r in runs if r["optimizer"] == name])
        for name in TRAINING
        if any(r["optimizer"] == name for r in runs)
    }
    tokens = TRAINED["batch_size"] * TRAINED["length"]
    about = {"recipe": "recipes/hybrid", "settings": TRAINED, "steps": options.steps, "tokens_per_step": tokens}
    write_result("muon_training", {**about, "held_out_at_the_end": last, "runs": runs})


if __name__ == "__main__":
    main()
