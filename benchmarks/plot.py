"""Figures of docs/, drawn from benchmarks/results and from the logs of the bundled models.

python benchmarks/plot.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

ROOT = Path(__file__).resolve().parents[1]
RESULTS, FIGURES, ASSETS = ROOT / "benchmarks/results", ROOT / "docs/figures", ROOT / "src/sparing/assets"


def label(axes: Axes, text: str, point: tuple[float, float], *, left: bool = False) -> None:
    """Write `text` to the right of a point, or to the left where its neighbour's label stands on the right."""
    place, side = (-6, "right") if left else (6, "left")
    axes.annotate(text, point, xytext=(place, 0), textcoords="offset points", ha=side, va="center", fontsize=9)


def samplers() -> None:
    """Speed against quality of the tale sampler's settings."""
    result = json.loads((RESULTS / "tales.json").read_text())
    points = result["samplers"] | {"left to right, temperature 0.8": result["autoregressive"]}
    figure, axes = plt.subplots(figsize=(7, 4.2), layout="constrained")
    for name, row in points.items():
        point = (row["tokens_per_forward"], 100 * row["real_words"])
        axes.plot(*point, "o")
        label(axes, name, point, left=name in ("bound 0.5", "cooler, bound 0.5", "cooler, bound 2"))
    axes.set(xlabel="tokens per forward pass", ylabel="words that occur in the corpus, %", xlim=(0, 2.4))
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


def bits_beside_bfloat16(row: dict[str, Any]) -> float:
    """Bits a coordinate, where entries that are not codes count as bfloat16: they were measured in float32.

    Positions of entries (32 bits for the 2 * 64 coordinates of one) are held beside either.
    """
    bits = row["bits_per_coordinate"]
    if not row["kv"].startswith("triattention") or "turboquant" in row["kv"]:
        return bits
    positions = bits * 0.25 / (32 + 0.25)
    return (bits - positions) / 2 + positions


def memory_quality() -> None:
    """What a number kept for each coordinate costs in predictions, for every policy on the same text."""
    rows = json.loads((RESULTS / "memory_quality.json").read_text())["divergence"]
    figure, axes = plt.subplots(figsize=(8, 5), layout="constrained")
    kinds = {
        "codes": [name for name in rows if rows[name]["kv"].startswith("turboquant") and "," not in name],
        "with the sketch (prod)": [name for name in rows if "prod" in name],
        "entries forgotten": [name for name in rows if rows[name]["kv"].startswith("triattention")],
    }
    for kind, names in kinds.items():
        points = [(bits_beside_bfloat16(rows[name]), rows[name]["kl"]) for name in names]
        axes.plot(*zip(*points, strict=True), "o", label=kind)
        for name, point in zip(names, points, strict=True):
            label(axes, name.removesuffix(", prod"), point, left=name in ("2.5 bits", "3.5 bits", "K4 V3"))
    axes.set(xscale="log", yscale="log", xlabel="bits a coordinate, everything counted (dense in bfloat16: 16)")
    axes.set(ylabel="KL to the dense memory, nats per token")
    axes.set_xticks([1, 2, 4, 8, 16], ["1", "2", "4", "8", "16"])
    axes.set_xlim(0.7, 16)
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


def million_tokens() -> None:
    """DeepSeek-V4: bytes held as the released models' context grows, and the time of a step of a small one."""
    held = json.loads((RESULTS / "million_tokens.json").read_text())
    rows = json.loads((RESULTS / "deepseek_v4.json").read_text())["rows"][0]["contexts"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.8), layout="constrained")
    for name, row in held["million"].items():
        points = [(int(tokens), n) for tokens, n in row["bytes"].items()]
        left.plot(*zip(*points, strict=True), "-", label=name)
    points = [(row["context"], row["bytes"]["held"]) for row in held["small"]["contexts"]]
    left.plot(*zip(*points, strict=True), "o", color="grey", label="small model, counted")
    for name, label in {"transformers": "transformers", "dense": "sparing", "released": "sparing, as released"}.items():
        times = [
            (row["context"], 1e3 * row["step_seconds"][name]["median"]) for row in rows if name in row["step_seconds"]
        ]
        right.plot(*zip(*times, strict=True), "o-", label=label)
    left.set(title="memory", xlabel="tokens", ylabel="bytes")
    right.set(title="a step of the small model", xlabel="tokens", ylabel="milliseconds")
    for axes in (left, right):
        axes.set(xscale="log", yscale="log")
        axes.legend()
        axes.grid(alpha=0.3, which="both")
    figure.savefig(FIGURES / "million_tokens.png", dpi=130)


if __name__ == "__main__":
    FIGURES.mkdir(parents=True, exist_ok=True)
    for draw in (samplers, sudoku, training, memory_quality, nvfp4_training, million_tokens):
        draw()
