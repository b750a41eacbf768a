"""What few bits cost: how likely models find text with their matrices packed, in nats a token above the dense model.

    python benchmarks/weights_quality.py

The bundled fairy tales on their held-out ends, and SmolLM2-135M, whose file is already quantised to 4 bits (Q4_1), on
the same text: chunks of 256 tokens after what the tokenizer puts before a text, the first token of each not counted.
Nothing here is timed.
"""

from __future__ import annotations

import argparse
from typing import Any

import sparing
from harness import write_result
from sparing.config.formats import FORMATS
from sparing.training.data import corpus_file, split_books

CHUNK = 256


def nats(model: Any, ids: list[int]) -> float:
    """Mean cross-entropy of the next token."""
    import torch
    from torch.nn import functional as F

    begin = model.tokenizer.encode("")  # <bos>, if texts have one
    total, count = 0.0, 0
    for start in range(0, len(ids) - CHUNK + 1, CHUNK):
        chunk = torch.tensor(ids[start : start + CHUNK])
        logits = model.logits(torch.tensor([*begin, *chunk.tolist()]))[len(begin) :]
        total += F.cross_entropy(logits[:-1], chunk[1:], reduction="sum").item()
        count += CHUNK - 1
    return total / count


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--models", nargs="*", default=["tales", "smollm2"])
    arguments = parser.parse_args()
    text = "\n\n".join(split_books(corpus_file("fairy_tales.txt").read_text())[1])
    results = {}
    for name in arguments.models:
        found, ids = {}, []
        for weights in ("stored", *FORMATS):
            model = sparing.load(name, dtype="float32", weights=weights)
            assert model.tokenizer is not None
            ids = model.tokenizer.encode(text[: 8 * arguments.tokens], add_special_tokens=False)[: arguments.tokens]
            found[weights] = nats(model, ids)
            held = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
            print(f"{name:8} {weights:8} {found[weights]:.4f} nats a token, {held / 1e6:.1f} MB", flush=True)
        results[name] = {"tokens": len(ids), "nats": found, "loss": {w: n - found["stored"] for w, n in found.items()}}
    write_result("weights_quality", results)


if __name__ == "__main__":
    main()
