"""A small DeepSeek-V4 that Muon trains against a Llama of equal active parameters that AdamW trains, on equal tokens.

    python benchmarks/deepseek_v4_training.py runs/v4 --minutes 9   # again and again: each call goes on with the runs
    python benchmarks/deepseek_v4_training.py runs/v4               # ... until all are done, and measure

What is compared is the held-out loss of the next token, of averaged weights. The Llama is trained at three learning
rates, of which the best counts. Then, of the DeepSeek-V4: how many drafts of its own head greedy text accepts, and the
spectral norm of the product of all residual maps through depth, at the start and at the end of training; manifold-
constrained hyper-connections are to keep it at 1, where free ones let it grow or vanish.
Writes results/deepseek_v4_training.json.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import sparing
from harness import write_result
from sparing.config import parse_config
from sparing.models.base import LanguageModel
from sparing.models.deepseek_v4 import HyperConnection
from sparing.planning.parameters import active_parameters, count_parameters
from sparing.training import RECIPES, export, train
from sparing.training.block_diffusion import Examples
from sparing.training.next_token import NextTokenLosses, next_token_loss
from sparing.training.recipe import Recipe
from sparing.training.run import new_state
from sparing.training.state import FILE, read_run

SMALL_V4 = RECIPES["recipes/compressed"]
RATES = (2e-3, 4e-3, 8e-3)
PROMPTS = ("Once upon a time there was a king", "The wolf said", "There was a poor miller who", "In the forest")
TOKENS = 96  # of greedy text after each prompt
TEXTS = 4  # held-out ones through which maps are multiplied


def as_residuals(model: LanguageModel, options: Mapping[str, Any], generator: torch.Generator) -> None:
    """Let deep residuals start small."""
    with torch.no_grad():
        for _, role, _, tensor in model.parts():
            if role is not None and role.is_residual:
                tensor.mul_((2 * model.config.num_hidden_layers) ** -0.5)


def loss(recipe: Recipe, model: LanguageModel, examples: Examples, generator: torch.Generator) -> NextTokenLosses:
    return next_token_loss(model, None, examples)


LLAMA = replace(
    SMALL_V4,
    name="llama",
    config={
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": 1024,
        "hidden_size": 160,
        "intermediate_size": 448,
        "num_hidden_layers": 5,
        "num_attention_heads": 5,
        "num_key_value_heads": 5,
        "head_dim": 32,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "max_position_embeddings": 4096,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    },
    prepare=as_residuals,
    loss=loss,
    optimizer="adamw",
)
SIDES = {"deepseek_v4": SMALL_V4, **{f"llama_{rate:g}": replace(LLAMA, learning_rate=rate) for rate in RATES}}


def go_on(folder: Path, deadline: float) -> bool:
    """Train every side, each from where it is; whether all are done."""
    for name, recipe in SIDES.items():
        out = folder / name
        is_begun = (out / FILE).exists()
        if is_begun and read_run(out)["step"] >= recipe.steps:
            continue
        minutes = (deadline - time.monotonic()) / 60
        if minutes <= 0:
            return False
        train(recipe, out, minutes=minutes, resume=is_begun, log=lambda record: None)
        print(name, "step", read_run(out)["step"], flush=True)
    return all(read_run(folder / name)["step"] >= recipe.steps for name, recipe in SIDES.items())


def held_out(out: Path) -> dict[int, float]:
    records = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    return {r["step"]: r["validation_next_token"] for r in records if "validation_next_token" in r}


def parameters(recipe: Recipe) -> dict[str, int]:
    config = parse_config(recipe.config)
    counts = count_parameters(config.tensors())
    total, active = sum(counts.values()), active_parameters(config, counts)
    if recipe is not SMALL_V4:  # figures of DeepSeek leave out what is looked up: so here of both
        active -= counts["embedding"]
    return {"all": total, "active_without_embedding": active}


def residual_norms(model: LanguageModel, texts: Tensor) -> dict[str, float]:
    """The spectral norm of the product of all residual maps, of each token of texts int64 [rows, T]: over tokens."""
    maps: list[Tensor] = []
    hooks = [
        part.register_forward_hook(lambda _, __, output: maps.append(output[2]))
        for part in model.modules()
        if isinstance(part, HyperConnection)
    ]
    norms = []
    for text in texts:
        maps.clear()
        model.hidden_states(text)
        product = torch.eye(maps[0].shape[-1])
        for mix in maps:  # out[k] = sum_j mix[j, k] x[j]
            product = mix.float().mT @ product
        norms.append(torch.linalg.matrix_norm(product, 2))
    for hook in hooks:
        hook.remove()
    found = torch.cat(norms)
    return {"median": found.median().item(), "least": found.min().item(), "most": found.max().item()}


def drafted(model: LanguageModel, draft: str | None) -> tuple[list[str], dict[str, float]]:
    """Greedy texts, and tokens a pass."""
    texts, tokens, passes = [], 0, 0
    for prompt in PROMPTS:
        result = sparing.generate(model, prompt, max_new_tokens=TOKENS, temperature=0, draft=draft)
        text = ""
        for event in result:
            if isinstance(event, sparing.Commit):
                text, tokens = text + event.text, tokens + len(event.ids)
            elif isinstance(event, sparing.Done):
                passes += event.stats["forwards"]
        texts.append(text)
    return texts, {"tokens": tokens, "forwards": passes, "tokens_per_forward": tokens / passes}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="folder of the runs")
    parser.add_argument("--minutes", type=float, default=600.0)
    options = parser.parse_args()
    torch.set_num_threads(1)
    if not go_on(options.folder, time.monotonic() + 60 * options.minutes):
        return
    batches = SMALL_V4.data(SMALL_V4, 0).validation()
    texts = torch.cat([batch.ids for batch in batches])[:TEXTS]
    ours = sparing.load(export(options.folder / "deepseek_v4", options.folder / "model"))
    plain, without = drafted(ours, None)
    drafts = {"none": without}
    for draft in ("mtp", "ngram"):
        same, drafts[draft] = drafted(ours, draft)
        assert same == plain, f"drafts by {draft} change greedy text"
    tokens = SMALL_V4.batch_size * SMALL_V4.options["length"] * SMALL_V4.steps
    write_result(
        "deepseek_v4_training",
        {
            "corpus": SMALL_V4.options["corpus"],
            "tokens": tokens,
            "held_out": {name: held_out(options.folder / name) for name in SIDES},
            "minutes": {name: read_run(options.folder / name)["seconds"] / 60 for name in SIDES},
            "parameters": {"deepseek_v4": parameters(SMALL_V4), "llama": parameters(LLAMA)},
            "residual_norm": {
                "start": residual_norms(new_state(SMALL_V4, 0).model, texts),
                "end": residual_norms(ours, texts),
            },
            "drafts": drafts,
            "text": plain[0],
        },
    )


if __name__ == "__main__":
    main()
