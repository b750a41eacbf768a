"""Running a checkpoint here and in transformers, and naming the first layer that differs."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.text import table

if TYPE_CHECKING:
    from torch import Tensor

    from sparing.models.base import LanguageModel

__all__ = ["Comparison", "Stage", "against_transformers", "random_ids"]

RANDOM_TOKENS = 32
PASSES = ("denoising ", "denoising again ")
PREDICTION = f"{PASSES[0]}logits"
Stages = dict[str, "Tensor"]  # name -> [tokens, size] float32, in order of execution


@dataclass(frozen=True)
class Stage:
    """One point of the computation.

    max_error: largest absolute difference, at `position` of the sequence; relative_error: the largest over all
    positions, each measured against the size of the largest number there (at least 1).
    """

    name: str
    max_error: float
    relative_error: float
    position: int


@dataclass(frozen=True)
class Comparison:
    """All stages in order of execution. first: the first beyond the tolerance, None if all agree."""

    model: str
    tokens: int
    tolerance: float
    stages: tuple[Stage, ...]

    @property
    def first(self) -> Stage | None:
        return next((stage for stage in self.stages if not stage.relative_error <= self.tolerance), None)

    @property
    def agrees(self) -> bool:
        return self.first is None

    def to_dict(self) -> dict[str, Any]:
        """All fields, of types that JSON knows."""
        first = None if self.first is None else self.first.name
        return {**asdict(self), "stages": [asdict(s) for s in self.stages], "first": first, "agrees": self.agrees}

    def table(self) -> str:
        """The verdict in one line, then a line for each stage."""
        rows: list[tuple[object, ...]] = [("stage", "max error", "relative", "at position", "")]
        for stage in self.stages:
            mark = "" if stage.relative_error <= self.tolerance else "differs"
            figures = (f"{stage.max_error:.2e}", f"{stage.relative_error:.2e}", stage.position)
            rows.append((stage.name, *figures, mark))
        verdict = f"{self.model}: {len(self.stages)} stages agree with transformers over {self.tokens} tokens"
        if self.first is not None:
            verdict = (
                f"{self.model}: the first difference from transformers is in {self.first.name}, "
                f"{self.first.max_error:.3g} at position {self.first.position}"
            )
        return f"{verdict}\n\n{table(rows)}"


def against_transformers(
    source: str | Path, prompt: str | Sequence[int] | None = None, *, tolerance: float = 1e-4
) -> Comparison:
    """Run one sequence in float32 through this library and through transformers, from the same files.

    source: anything `load` takes. prompt: text, token ids, or None for 32 ids drawn with a fixed seed. tolerance: of
    a stage's relative error. Stages are the input of the stack, the output of each layer (of the last one after the
    final norm) and the logits; of a block-diffusion model the same for encoding the prompt, and again for denoising
    one canvas, first without and then with a previous prediction.
    Raises ValueError where transformers is not installed or does not know the model, and for bad token ids;
    CheckpointError for a checkpoint that cannot be loaded.
    """
    from sparing.checkpoint import open_checkpoint
    from sparing.models.loading import load

    checkpoint = open_checkpoint(source)
    model = load(source, dtype="float32", device="cpu")
    ids = model.check_tokens(_token_ids(model, prompt))
    canvas = None
    if model.config.canvas_length is not None:
        canvas = model.check_tokens(random_ids(model, model.config.canvas_length, seed=1))
    ours = _run_ours(model, ids, canvas)
    limit = getattr(model.config, "time_step_limit", None)
    del model
    reference = _load_theirs(checkpoint.path)
    for part in reference.modules():
        if hasattr(part, "time_step_limit"):  # of Nemotron-H, where transformers reads `time_step_min` instead
            part.time_step_limit = limit
    theirs = _run_theirs(reference, ids, canvas, ours.get(PREDICTION))
    if ours.keys() != theirs.keys():
        raise ValueError(f"{checkpoint.path}: transformers ran {len(theirs)} stages of this model, we ran {len(ours)}")
    stages = tuple(_compare(name, ours[name], theirs[name]) for name in ours)
    return Comparison(checkpoint.path.name, len(ids), tolerance, stages)


def _token_ids(model: LanguageModel, prompt: str | Sequence[int] | None) -> Sequence[int]:
    if prompt is None:
        return random_ids(model, min(RANDOM_TOKENS, model.config.max_position_embeddings), seed=0)
    if not isinstance(prompt, str):
        return prompt
    if model.tokenizer is None:
        raise ValueError("the checkpoint has no tokenizer: give token ids instead of text")
    return model.tokenizer.encode(prompt)


def random_ids(model: LanguageModel, length: int, seed: int) -> list[int]:
    """Ids that the model takes, drawn with a seed."""
    refused = set(model.config.refused_token_ids)
    return random.Random(seed).choices([i for i in range(model.config.vocab_size) if i not in refused], k=length)


def _run_ours(model: LanguageModel, ids: Tensor, canvas: Tensor | None) -> Stages:
    import torch

    from sparing.models.batch import RaggedBatch, Row
    from sparing.models.diffusion_gemma import DiffusionGemma

    with torch.inference_mode():
        memory = model.memory()
        trace: list[Tensor] = []
        normed = model.forward(RaggedBatch([Row(ids, memory)]), trace)
        memory.commit(len(ids))
        if canvas is None or not isinstance(model, DiffusionGemma):
            return {**_named([*trace[:-1], normed]), "logits": model.head(normed)}
        stages = _named([*trace[:-1], normed], "encoding ")
        soft = None
        for prefix in PASSES:
            trace = []
            batch = RaggedBatch([Row(canvas, memory, causal=False)])
            normed = model.denoise_hidden(batch, None if soft is None else model.soft_embedding(soft), trace)
            batch.rollback()
            soft = model.head(normed)
            stages |= {**_named([*trace[:-1], normed], prefix), f"{prefix}logits": soft}
        return stages


def _run_theirs(model: Any, ids: Tensor, canvas: Tensor | None, prediction: Tensor | None) -> Stages:
    """prediction: the logits that both sides feed back into the second denoising pass."""
    import torch
    from transformers import DynamicCache

    with torch.inference_mode():
        if canvas is None:
            result = model(input_ids=ids[None], use_cache=False, output_hidden_states=True)
            return {**_named([h[0] for h in result.hidden_states]), "logits": result.logits[0].float()}
        cache = DynamicCache(config=model.config.get_text_config())  # which cuts windows, as `generate` does
        encoded = model.model.encoder(input_ids=ids[None], past_key_values=cache, output_hidden_states=True)
        stages = _named([h[0] for h in encoded.hidden_states], "encoding ")
        for prefix, soft in zip(PASSES, (None, prediction), strict=True):
            result = model(
                decoder_input_ids=canvas[None],
                past_key_values=cache,
                self_conditioning_logits=None if soft is None else soft[None],
                output_hidden_states=True,
            )
            logits = result.logits[0].float()
            stages |= {**_named([h[0] for h in result.hidden_states], prefix), f"{prefix}logits": logits}
        return stages


def _named(hidden: Sequence[Tensor], prefix: str = "") -> Stages:
    """hidden: L + 1 tensors [tokens, H], the last one after the final norm."""
    last = len(hidden) - 1
    names = ["input", *(f"layer {i}" for i in range(last - 1)), f"layer {last - 1} and final norm"]
    return {f"{prefix}{name}": states for name, states in zip(names, hidden, strict=True)}


def _load_theirs(path: Path) -> Any:
    """The same checkpoint in transformers: float32, plain attention, experts one by one."""
    try:
        import transformers
    except ImportError:
        raise ValueError("transformers is not installed: pip install transformers to compare with it") from None
    options: dict[str, Any] = {"dtype": "float32", "attn_implementation": "eager"}
    folder, model_class = path, transformers.AutoModelForCausalLM
    if path.is_file():
        folder, options["gguf_file"] = path.parent, path.name
    else:
        raw = json.loads((path / "config.json").read_text(encoding="utf-8"))
        model_class = getattr(transformers, (raw.get("architectures") or ["AutoModelForCausalLM"])[0], model_class)
        if "experts" in json.dumps(raw):
            options["experts_implementation"] = "eager"
    try:
        return model_class.from_pretrained(folder, **options).eval()
    except Exception as error:
        reason = (str(error).strip().splitlines() or [""])[0]
        raise ValueError(f"{path}: transformers cannot load it: {type(error).__name__}: {reason}") from error


def _compare(name: str, ours: Tensor, theirs: Tensor) -> Stage:
    if ours.shape != theirs.shape:
        raise ValueError(f"{name}: our shape is {list(ours.shape)}, that of transformers {list(theirs.shape)}")
    errors = (ours - theirs).abs().amax(-1)  # [tokens]
    relative = errors / theirs.abs().amax(-1).clamp(min=1.0)
    position = int(errors.argmax())
    return Stage(name, float(errors[position]), float(relative.max()), position)
