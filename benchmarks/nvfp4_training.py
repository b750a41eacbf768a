"""What training in NVFP4 costs a small hybrid, against the same run in bfloat16: same seed, same data, same steps.

    sparing train recipes/hybrid --out runs/hybrid_bfloat16 --seed 0 --threads 1
    sparing train recipes/hybrid --out runs/hybrid_nvfp4 --seed 0 --threads 1 --set products=nvfp4
    python benchmarks/nvfp4_training.py runs/hybrid_bfloat16 runs/hybrid_nvfp4

Writes both logs, and the losses of the final averaged weights on more held-out text than the logs', each in the
arithmetic they were trained in, in float32, and the bfloat16 run's also with NVFP4 products. Pairs of other seeds that
were measured before keep their place beside this one; `relative_gap` is over all of them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch

from harness import RESULTS, machine, spread, write_result
from sparing.training.data import TextData
from sparing.training.exporting import recipe_of
from sparing.training.masters import use_bfloat16, use_dense
from sparing.training.nvfp4 import use_nvfp4
from sparing.training.recipes.hybrid import is_dense
from sparing.training.run import new_state, validate

BATCHES = 32  # of held-out sequences


def measure(out: Path) -> dict[str, Any]:
    """One run: its command, log, and final losses by the products they are computed with."""
    recipe, seed = recipe_of(out)
    state = new_state(recipe, seed)
    state.load(out)
    model, data, products = state.average, recipe.data(recipe, seed), recipe.options["products"]
    assert isinstance(data, TextData)
    batches = [data.held_out_batch(i) for i in range(BATCHES)]
    held_out = {products: validate(recipe, model, batches, seed)}
    use_dense(model)
    held_out["float32"] = validate(recipe, model, batches, seed)
    if products != "nvfp4":
        use_nvfp4(model, dense=is_dense, dtype=torch.bfloat16)
        use_bfloat16(model)
        held_out["nvfp4"] = validate(recipe, model, batches, seed)
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    arithmetic = "" if products == "bfloat16" else f" --set products={products}"
    return {
        "seed": seed,
        "command": f"sparing train recipes/hybrid --out runs/hybrid_{products} --seed {seed} --threads 1{arithmetic}",
        "parameters": sum(p.numel() for p in model.parameters()),
        "steps": state.step,
        "tokens_per_step": recipe.batch_size * recipe.options["length"],
        "held_out": held_out,
        "log": records,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bfloat16", type=Path, help="folder of the run in bfloat16")
    parser.add_argument("nvfp4", type=Path, help="folder of the run in NVFP4")
    arguments = parser.parse_args()
    runs = {name: measure(getattr(arguments, name)) for name in ("bfloat16", "nvfp4")}
    if runs["bfloat16"]["seed"] != runs["nvfp4"]["seed"]:
        parser.error(f"the runs have seeds {runs['bfloat16']['seed']} and {runs['nvfp4']['seed']}: use one for both")
    ours, theirs = runs["nvfp4"]["held_out"], runs["bfloat16"]["held_out"]
    gaps = {
        "own products": _gaps(ours["nvfp4"], theirs["bfloat16"]),
        "float32 products": _gaps(ours["float32"], theirs["float32"]),
        "bfloat16 run with NVFP4 products": _gaps(theirs["nvfp4"], theirs["bfloat16"]),
    }
    print(json.dumps(gaps, indent=1))
    path = RESULTS / "nvfp4_training.json"
    seeds = json.loads(path.read_text())["seeds"] if path.exists() else {}
    seeds[str(runs["nvfp4"]["seed"])] = {"machine": machine(), "relative_gap": gaps, "runs": runs}
    seeds = dict(sorted(seeds.items()))
    every = [pair["relative_gap"] for pair in seeds.values()]
    total = {kind: {loss: spread([g[kind][loss] for g in every]) for loss in gaps[kind]} for kind in gaps}
    write_result("nvfp4_training", {"relative_gap": total, "seeds": seeds})


def _gaps(ours: dict[str, float], theirs: dict[str, float]) -> dict[str, float]:
    """How much higher each loss is, as a share."""
    return {name.removeprefix("validation_"): ours[name] / theirs[name] - 1 for name in theirs}


if __name__ == "__main__":
    main()
