"""How well a model predicts a text, and how far memory policies and packed weights move its predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparing.inspection.memories import kl_divergence
from sparing.text import readable_bytes, table

if TYPE_CHECKING:
    from sparing.models.base import LanguageModel

__all__ = ["Perplexity", "Prediction", "perplexity"]

CHUNK = 128  # tokens that are predicted in one pass
PASSAGE = 1024  # tokens


@dataclass(frozen=True)
class Prediction:
    """How one model with one memory policy predicted.

    weights, kv: its formats; nats: of a token, the mean; kl: from the first side's predictions, in nats a token, the
    mean; nats_error, kl_error: standard errors of these means, as if tokens were independent; same_first: share of
    tokens whose most likely follower is the first side's; memory_bytes: held at the end of a passage.
    """

    weights: str
    kv: str
    nats: float
    nats_error: float
    kl: float
    kl_error: float
    same_first: float
    memory_bytes: int

    @property
    def perplexity(self) -> float:
        return math.exp(self.nats)

    @property
    def perplexity_error(self) -> float:
        return self.perplexity * self.nats_error


@dataclass(frozen=True)
class Perplexity:
    """The predictions in the order of the sides; the first is what the others are held against."""

    tokens: int
    passages: int
    context: int
    predictions: tuple[Prediction, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields and perplexities, of types that JSON knows."""
        found = asdict(self)
        for p, fields in zip(self.predictions, found["predictions"], strict=True):
            fields |= {"perplexity": p.perplexity, "perplexity_error": p.perplexity_error}
        return found

    def table(self) -> str:
        """The numbers as aligned plain text."""
        rows: list[Sequence[object]] = [["weights", "kv", "perplexity", "KL, nats a token", "same first", "memory"]]
        for i, p in enumerate(self.predictions):
            apart = (f"{p.kl:.5f} ± {p.kl_error:.5f}", f"{p.same_first:.1%}") if i else ("", "")
            of_side = (p.weights, p.kv, f"{p.perplexity:.4f} ± {p.perplexity_error:.4f}")
            rows.append([*of_side, *apart, readable_bytes(p.memory_bytes)])
        passages = "1 passage" if self.passages == 1 else f"{self.passages} passages"
        return f"{self.tokens} tokens in {passages} of at most {self.context}\n\n{table(rows)}"


@dataclass
class Sums:
    """Of one side: the sums and sums of squares that mean and standard error are made of."""

    nats: list[float] = field(default_factory=lambda: [0.0, 0.0])
    kl: list[float] = field(default_factory=lambda: [0.0, 0.0])
    same: int = 0
    memory_bytes: int = 0

    def add(self, logs: Tensor, reference: Tensor, following: Tensor) -> None:
        """logs, reference: log-probabilities, float32 [T, V], of this side and of the first; following: int64 [T]."""
        for sums, values in (
            (self.nats, -logs.gather(-1, following[:, None])[:, 0]),
            (self.kl, torch.zeros(len(logs)) if logs is reference else kl_divergence(reference, logs)),
        ):
            wide = values.double()
            sums[0] += wide.sum().item()
            sums[1] += (wide * wide).sum().item()
        self.same += int((logs.argmax(-1) == reference.argmax(-1)).sum())


def perplexity(
    models: Sequence[LanguageModel],
    ids: Sequence[int],
    policies: Sequence[str] = ("dense",),
    *,
    context: int | None = None,
    **options: Any,
) -> Perplexity:
    """Read a text with every model under every memory policy, and compare what they predict token by token.

    models: of one tokenizer, such as one in several formats of weights. ids: the text, without what a prompt begins
    with, which each passage gets. It is cut into passages of `context` tokens, each read from an empty memory; all
    tokens but the first of a passage are predicted, or all if the tokenizer puts one before a text. options: of the
    policies. The first model under the first policy is what the others are held against.
    Raises ValueError for a text of less than two tokens, a context that the model does not have, vocabularies of
    different sizes, and as `LanguageModel.memory` does.
    """
    most = min(model.config.max_position_embeddings for model in models)
    context = min(PASSAGE, most) if context is None else context
    if not 2 <= context <= most:
        raise ValueError(f"context is {context}, expected 2 to {most}, what the model takes")
    if len({model.config.vocab_size for model in models}) > 1:
        raise ValueError("the models have vocabularies of different sizes: predictions cannot be compared")
    if len(ids) < 2:
        raise ValueError(f"the text has {len(ids)} tokens: two at least are needed to predict one from another")
    start = [] if models[0].tokenizer is None else models[0].tokenizer.encode("")
    size = context - len(start)
    if size < 2:
        raise ValueError(f"context is {context}, of which a text's beginning takes {len(start)}: give more")
    sides = [(model, kv, model.memory_plan(kv, **options)) for model in models for kv in policies]
    sums = [Sums() for _ in sides]
    passages = [[*start, *ids[at : at + size]] for at in range(0, len(ids), size)]
    passages = [passage for passage in passages if len(passage) > max(len(start), 1)]  # that predict a token
    for passage in passages:
        memories = [plan.memory() for _, _, plan in sides]
        for low in range(0, len(passage) - 1, CHUNK):
            high = min(low + CHUNK, len(passage) - 1)
            asked, following = slice(max(0, len(start) - 1 - low), None), torch.tensor(passage[low + 1 : high + 1])
            reference = None
            for (model, _, _), memory, of_side in zip(sides, memories, sums, strict=True):
                logits = model.logits(passage[low:high], memory, prompt=False)
                logs = logits[asked].cpu().log_softmax(-1)
                reference = logs if reference is None else reference
                of_side.add(logs, reference, following[asked])
        for memory, of_side in zip(memories, sums, strict=True):
            of_side.memory_bytes = max(of_side.memory_bytes, memory.nbytes)
    tokens = sum(len(passage) - max(len(start), 1) for passage in passages)
    predictions = [
        Prediction(
            model.weights,
            kv,
            *_mean(of_side.nats, tokens),
            *_mean(of_side.kl, tokens),
            of_side.same / tokens,
            of_side.memory_bytes,
        )
        for (model, kv, _), of_side in zip(sides, sums, strict=True)
    ]
    return Perplexity(tokens, len(passages), context, tuple(predictions))


def _mean(sums: Sequence[float], n: int) -> tuple[float, float]:
    """Mean and its standard error, of the sum and the sum of squares of n values."""
    mean = sums[0] / n
    return mean, math.sqrt(max(0.0, sums[1] / n - mean * mean) / max(1, n - 1))
