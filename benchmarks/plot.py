"""Figures of docs/, drawn from benchmarks/results and from the logs of the bundled models.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES, ASSETS = ROOT / "benchmarks/results", ROOT / "docs/figures", ROOT / "src/sparing/assets"


def samplers() -> None:
    """Speed against quality of the tale sampler's settings."""
    result = json.loads((RESULTS / "tales.json").read_text())
    points = result["samplers"] | {"left to right, temperature 0.8": result["autoregressive"]}
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, row in points.items():
        axes.plot(row["tokens_per_forward"], 100 * row["real_words"], "o")
        axes.annotate(
            name, (row["tokens_per_forward"], 100 * row["real_words"]), xytext=(6, -3), textcoords="offset points"
        )
    axes.set(xlabel="tokens per forward pass", ylabel="words that occur in the corpus, %")
    axes.margins(x=0.25)
    axes.grid(alpha=0.3)
    figure.savefig(FIGURES / "tales_samplers.png", dpi=130)


def sudoku() -> None:
    """Solved share by number of givens, both decoders of the same weights."""
    rows = json.loads((RESULTS / "sudoku.json").read_text())["rows"]
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for decoder, label in (("block_diffusion", "all cells at once"), ("autoregressive", "left to right")):
        chosen = [row for row in rows if row["size"] == 9 and row["decoder"] == decoder]
        points = [(row["givens"], 100 * row["solved"]) for row in chosen]
        axes.plot(*zip(*points, strict=True), "o-", label=label)
    axes.set(xlabel="cells given, of 81", ylabel="solved, %", ylim=(-3, 103))
    axes.legend()
    axes.grid(alpha=0.3)
    figure.savefig(FIGURES / "sudoku.png", dpi=130)


def training() -> None:
    """Validation losses of the bundled models over their runs."""
    figure, panels = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for axes, name in zip(panels, ("sudoku", "tales"), strict=True):
        records = [json.loads(line) for line in (ASSETS / name / "log.jsonl").read_text().splitlines()]
        for key, label in (("validation_diffusion", "diffusion"), ("validation_autoregressive", "next token")):
            axes.plot(*zip(*[(r["step"], r[key]) for r in records if key in r], strict=True), label=label)
        axes.set(title=name, xlabel="step", ylabel="nats per token, held out", yscale="log")
        axes.legend()
        axes.grid(alpha=0.3, which="both")
    figure.savefig(FIGURES / "training.png", dpi=130)


def memory_quality() -> None:
    """What a number kept for each coordinate costs in predictions, for every policy on the same text."""
    rows = json.loads((RESULTS / "memory_quality.json").read_text())["divergence"]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    kinds = {
        "codes": [name for name in rows if rows[name]["kv"].startswith("turboquant") and "," not in name],
        "with the sketch (prod)": [name for name in rows if "prod" in name],
        "entries forgotten": [name for name in rows if rows[name]["kv"].startswith("triattention")],
    }
    for label, names in kinds.items():
        points = [(rows[name]["bits_per_coordinate"], rows[name]["kl"]) for name in names]
        axes.plot(*zip(*points, strict=True), "o", label=label)
        for name, point in zip(names, points, strict=True):
            axes.annotate(name.removesuffix(", prod"), point, xytext=(5, 3), textcoords="offset points", fontsize=8)
    axes.set(xscale="log", yscale="log", xlabel="real bits for each coordinate, everything counted (dense: 32)")
    axes.set(ylabel="KL to the dense memory, nats per token")
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.margins(x=0.15)
    axes.legend()
    axes.grid(alpha=0.3, which="both")
    figure.savefig(FIGURES / "memory_quality.png", dpi=130)


def nvfp4_training() -> None:
    """Losses of the hybrid trained in bfloat16 and in NVFP4, and how far apart they are."""
    seeds = json.loads((RESULTS / "nvfp4_training.json").read_text())["seeds"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for seed, pair in seeds.items():
        held_out = {}
        for (name, run), colour in zip(pair["runs"].items(), ("C0", "C1"), strict=True):
            logs = {
                key: {record["step"]: record[key] for record in run["log"] if key in record}
                for key in ("next_token", "validation_next_token")
            }
            held_out[name] = logs["validation_next_token"]
            if seed == next(iter(seeds)):
                left.plot(*zip(*logs["next_token"].items(), strict=True), colour, alpha=0.4, lw=1)
                left.plot(*zip(*held_out[name].items(), strict=True), colour, marker=".", label=name)
        gaps = [(step, 100 * (held_out["nvfp4"][step] / loss - 1)) for step, loss in held_out["bfloat16"].items()]
        right.plot(*zip(*gaps, strict=True), marker=".", label=f"seed {seed}")
    left.set(title="next token, held out (pale: training text)", xlabel="step", ylabel="nats per token", yscale="log")
    left.set_yticks([3.5, 4, 5, 6], ["3.5", "4", "5", "6"])
    left.minorticks_off()
    left.legend()
    right.legend()
    right.axhline(0, color="grey", lw=0.8)
    right.set(title="NVFP4 above bfloat16, held out", xlabel="step", ylabel="%")
    for axes in (left, right):
        axes.grid(alpha=0.3)
    figure.savefig(FIGURES / "nvfp4_training.png", dpi=130)


if __name__ == "__main__":
    FIGURES.mkdir(parents=True, exist_ok=True)
    for draw in (samplers, sudoku, training, memory_quality, nvfp4_training):
        draw()
