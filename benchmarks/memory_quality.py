"""What memory policies cost in quality on the real weights of SmolLM2 135M, against the model with a dense memory.

    python benchmarks/memory_quality.py [divergence] [variants] [needle] [distortion]

Three measurements, each kept from the last run where it is not named: KL divergence and perplexity per token of tales,
plays and Python source against context (what people choose from in "divergence", settings for comparison in "variants",
on the same text); a fact to be found again at several depths; distortion of real keys and values against the paper's
bounds. Needs the extra [smollm2] and the corpus. A policy enters every table by one line below.
"""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from harness import RESULTS, write_result
from texts import GENRES, calibration, encode, passage

CONTEXT, CHUNK = 1024, 128
PASSAGES = 2  # of each genre
EDGES = (128, 256, 512, 1024)  # KL is averaged over positions between these
HAYSTACK, DEPTHS, NEEDLES = 640, (0.1, 0.3, 0.5, 0.7, 0.9), 2
CALIBRATION = 2048  # tokens

# Label -> policy and options. A needle is looked for under those whose label is in NEEDLE.
POLICIES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "8 bits": ("turboquant:8", {}),
    "4 bits": ("turboquant:4", {}),
    "K4 V3": ("turboquant:k4v3", {}),
    "K4 V2": ("turboquant:k4v2", {}),
    "K2 V4": ("turboquant:k2v4", {}),
    "3.5 bits": ("turboquant:3.5", {}),
    "3 bits": ("turboquant:3", {}),
    "2.5 bits": ("turboquant:2.5", {}),
    "2 bits": ("turboquant:2", {}),
    "half kept": (f"triattention:{CONTEXT // 2}", {}),
    "a quarter kept": (f"triattention:{CONTEXT // 4}", {}),
    "an eighth kept": (f"triattention:{CONTEXT // 8}", {}),
    "a quarter kept, 4 bits": (f"triattention:{CONTEXT // 4}+turboquant:4", {}),
    "a quarter kept, 3 bits": (f"triattention:{CONTEXT // 4}+turboquant:3", {}),
}
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "4 bits, prod": ("turboquant:4", {"variant": "prod"}),
    "3 bits, prod": ("turboquant:3", {"variant": "prod"}),
    "2 bits, prod": ("turboquant:2", {"variant": "prod"}),
    "3 bits, scale=norm": ("turboquant:3", {"scale": "norm"}),
    "3 bits, Haar": ("turboquant:3", {"rotation": "haar"}),
    "3 bits, not rotated": ("turboquant:3", {"rotation": "identity"}),
    "3 bits, window 128": ("turboquant:3", {"window": 128}),
    "3 bits, 4 sinks": ("turboquant:3", {"sink_tokens": 4}),
    "3 bits, edge layers exact": ("turboquant:3", {"skip_layers": (0, 1, -2, -1)}),
}
NEEDLE = (
    *("dense", "8 bits", "4 bits", "3 bits", "2 bits", "4 bits, prod", "3 bits, prod"),
    *("half kept", "a quarter kept", "a quarter kept, 4 bits"),
)


def make_memory(model: Any, label: str, statistics: Any) -> Any:
    """An empty memory; where entries are forgotten, all but the newest of the text may be."""
    kv, options = (POLICIES | VARIANTS)[label]
    if "triattention" in kv:
        size = int(kv.split("+")[0].split(":")[1])
        options = options | {
            "statistics": statistics,
            "protect_prompt": False,
            "protect_recent": size // 4,
            "interval": CHUNK,
        }
    return model.memory(kv, **options)


@dataclass
class Score:
    """Sums over the tokens of one policy."""

    nats: float = 0.0  # negative log-likelihood
    kl: dict[int, list[float]] = field(default_factory=lambda: {edge: [] for edge in EDGES})
    by_genre: dict[str, float] = field(default_factory=lambda: dict.fromkeys(GENRES, 0.0))
    agreed: int = 0
    tokens: int = 0
    nbytes: int = 0


def divergence(model: Any, statistics: Any, labels: Sequence[str]) -> dict[str, Any]:
    """KL to dense, perplexity, and agreement of the most likely token, over passages of CONTEXT tokens of text."""
    from sparing.inspection.memories import kl_divergence

    scores = {label: Score() for label in ("dense", *labels)}
    for genre, number in itertools.product(GENRES, range(PASSAGES)):
        ids = passage(model, genre, number, CONTEXT + 1)
        memories = {label: make_memory(model, label, statistics) for label in scores}
        for start in range(0, CONTEXT, CHUNK):
            chunk, following = ids[start : start + CHUNK], ids[start + 1 : start + CHUNK + 1]
            reference = None
            for label, memory in memories.items():
                logs = model.logits(chunk, memory, prompt=False).log_softmax(-1)
                reference = logs if reference is None else reference
                score = scores[label]
                edge = next(edge for edge in EDGES if start < edge)
                kl = kl_divergence(reference, logs).tolist()
                score.kl[edge] += kl
                score.by_genre[genre] += sum(kl) / (PASSAGES * CONTEXT)
                score.nats -= logs.gather(-1, following[:, None]).sum().item()
                score.agreed += int((logs.argmax(-1) == reference.argmax(-1)).sum())
                score.tokens += len(chunk)
        print(f"{genre} {number}", flush=True)
        for label, memory in memories.items():
            scores[label].nbytes = memory.nbytes
    coordinates = 2 * sum(s.num_key_value_heads * s.head_dim for s in model.config.memory_specs()) * CONTEXT
    return {
        label: {
            "kv": (POLICIES | VARIANTS)[label][0],
            "bits_per_coordinate": 8 * score.nbytes / coordinates,
            "bytes": score.nbytes,
            "perplexity": math.exp(score.nats / score.tokens),
            "kl": sum(map(sum, score.kl.values())) / score.tokens,
            "kl_by_context": {f"to {edge}": sum(values) / len(values) for edge, values in score.kl.items()},
            "kl_by_genre": score.by_genre,
            "same_choice": score.agreed / score.tokens,
        }
        for label, score in scores.items()
    }


def needle(model: Any, statistics: Any) -> dict[str, Any]:
    """A number hidden in a tale and asked for at its end: digits predicted right, and nats per digit of the answer."""
    import torch

    random_numbers = random.Random(0)
    found: dict[str, Any] = {label: {"right": 0, "digits": 0, "nats": 0.0, "by_depth": {}} for label in NEEDLE}
    for depth in DEPTHS:
        for trial in range(NEEDLES):
            number = str(random_numbers.randrange(10_000, 100_000))
            hay = passage(model, "tales", trial, HAYSTACK)
            fact = encode(model, f" The secret number is {number}. Remember that the secret number is {number}. ")
            question = encode(model, "\n\nWhat is the secret number? The secret number is")
            answer = encode(model, f" {number}")
            at = int(depth * HAYSTACK)
            ids = torch.cat([hay[:at], fact, hay[at:], question, answer])
            for label in NEEDLE:
                memory = make_memory(model, label, statistics)
                *earlier, last = ids[: -len(answer)].split(CHUNK)
                for chunk in earlier:
                    model.logits(chunk, memory, prompt=False)
                asked = model.logits(last, memory, prompt=False)
                logs = torch.cat([asked[-1:], model.logits(answer[:-1], memory, prompt=False)]).log_softmax(-1)
                row = found[label]
                row["right"] += int((logs.argmax(-1) == answer).sum())
                row["digits"] += len(answer)
                nats = -logs.gather(-1, answer[:, None]).mean().item()
                row["nats"] += nats / (len(DEPTHS) * NEEDLES)
                row["by_depth"][str(depth)] = row["by_depth"].get(str(depth), 0.0) + nats / NEEDLES
            print(f"needle at {depth}, {number}", flush=True)
    return found


def distortion(model: Any) -> dict[str, Any]:
    """Relative squared error of real keys and values, and d times that of inner products, beside the paper's bounds."""
    from sparing.memory.turboquant.codebook import lloyd_max_codebook
    from sparing.memory.turboquant.quantisers import MseQuantiser, ProdQuantiser, gaussian_sketch
    from sparing.memory.turboquant.rotation import make_rotation

    memory = model.memory()
    model.logits(passage(model, "tales", 0, 512), memory)
    rows: dict[str, Any] = {}
    d = model.config.head_dim
    for bits in (1, 2, 3, 4):
        lower, upper = 4.0**-bits, math.sqrt(3) * math.pi / 2 * 4.0**-bits
        row: dict[str, Any] = {"lower_bound": lower, "upper_bound": upper}
        row["prod_upper_bound"] = math.sqrt(3) * math.pi**2 * 4.0**-bits
        for i, role in enumerate(("keys", "values")):
            plain, sketched = [], []
            for layer, held in enumerate(memory.own):
                x = held.read()[i].transpose(0, 1).float()  # [n, heads, d]
                rotation = make_rotation("rht", d, layer, i)
                for quantiser, errors in (
                    (MseQuantiser(rotation, bits, "norm"), plain),
                    (ProdQuantiser(rotation, gaussian_sketch(d, layer, i), bits), sketched),
                ):
                    decoded = quantiser.assemble(
                        [
                            scale[..., None] * centroids[codes.int()]
                            for (codes, scale), centroids in zip(quantiser.encode(x), quantiser.centroids, strict=True)
                        ]
                    )
                    errors.append(((x - decoded).square().sum(-1) / x.square().sum(-1)).mean().item())
            # For a random unit y, d <y, x - decoded>^2 is on average the squared error itself.
            row[role] = {"mean": sum(plain) / len(plain), "least": min(plain), "most": max(plain)}
            row[f"{role}_prod"] = {"mean": sum(sketched) / len(sketched), "least": min(sketched), "most": max(sketched)}
        row["predicted"] = d * lloyd_max_codebook(d, bits)[2]
        rows[str(bits)] = row
    return rows


def main() -> None:
    import sparing

    parts = ("divergence", "needle", "distortion")
    wanted = sys.argv[1:] or [*parts, "variants"]
    model = sparing.load("smollm2", dtype="float32", device="cpu")
    path = RESULTS / "memory_quality.json"
    result = json.loads(path.read_text()) if path.exists() else {}
    result = {name: result[name] for name in parts if name in result}
    if "distortion" in wanted:
        result["distortion"] = distortion(model)
    statistics = None if wanted == ["distortion"] else sparing.calibrate(model, calibration(model, CALIBRATION))
    for part, labels in (("divergence", [*POLICIES][1:]), ("variants", [*VARIANTS])):
        if part in wanted:
            rows = result.get("divergence", {}) | divergence(model, statistics, labels)
            result["divergence"] = {label: rows[label] for label in (*POLICIES, *VARIANTS) if label in rows}
    if "needle" in wanted:
        result["needle"] = needle(model, statistics)
    passages = len(GENRES) * PASSAGES
    facts = {"model": "SmolLM2 135M", "context": CONTEXT, "passages": passages, "haystack": HAYSTACK}
    write_result("memory_quality", {**facts, **result})


if __name__ == "__main__":
    main()
