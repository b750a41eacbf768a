"""What memory policies do to one text: a prompt continued under each, and how far their predictions are apart."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparing.config.policy import policy_options
from sparing.decoding.engine import read
from sparing.decoding.events import Commit, Done
from sparing.decoding.generate import Prompt, generate, prompt_ids
from sparing.decoding.row import unspoken
from sparing.memory.plan import MemoryPlan
from sparing.memory.sequence import Memory
from sparing.text import readable_bytes, table

if TYPE_CHECKING:
    from sparing.models.base import LanguageModel

__all__ = ["MemoryComparison", "PolicyResult", "compare_memories", "kl_divergence"]


def kl_divergence(reference: Tensor, logs: Tensor) -> Tensor:
    """KL(reference || other) in nats, float32 [...]. reference, logs: log-probabilities, float32 [..., V]."""
    return (reference.exp() * (reference - logs)).sum(-1)


@dataclass(frozen=True)
class PolicyResult:
    """What one policy made of the prompt.

    ids, text: its own output; kl: from the first policy, nats a token, see `compare_memories`; same_tokens: places at
    which the outputs of both agree; memory_bytes: held at the end; ratio: of these bytes to the first policy's;
    entries: kept per key head of a growing layer at the end, None where nothing is forgotten; tokens_per_second: after
    the first token, None for a single one.
    """

    kv: str
    ids: list[int]
    text: str
    reason: str
    kl: float
    same_tokens: int
    memory_bytes: int
    ratio: float
    entries: int | None
    tokens_per_second: float | None


@dataclass(frozen=True)
class MemoryComparison:
    """The results in the order of the policies; the first is what the others are held against."""

    prompt_tokens: int
    seed: int
    temperature: float
    results: tuple[PolicyResult, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields, of types that JSON knows."""
        return asdict(self)

    def table(self) -> str:
        """The numbers as aligned plain text."""
        evicts = any(result.entries is not None for result in self.results)
        header = ["kv", "same tokens", "KL, nats a token", "memory", "of the first", "tokens/s"]
        rows: list[Sequence[object]] = [header + ["entries kept"] * evicts]
        for r in self.results:
            speed = None if r.tokens_per_second is None else f"{r.tokens_per_second:.1f}"
            row = [r.kv, f"{r.same_tokens} of {len(r.ids)}", f"{r.kl:.5f}", readable_bytes(r.memory_bytes)]
            rows.append([*row, f"{r.ratio:.1%}", speed, *([r.entries] if evicts else [])])
        return table(rows)


def compare_memories(
    model: LanguageModel,
    prompt: Prompt,
    policies: Sequence[tuple[str, dict[str, Any]]],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    seed: int = 0,
) -> MemoryComparison:
    """Continue one prompt under several memory policies, left to right, from the same seed.

    policies: (kv, options of it), at least two. The KL divergence is teacher-forced: after the prompt all policies are
    fed the text of the first one, token by token as a decoder feeds them, and their predictions for each place of it
    are compared; the mean over those places is reported. So it says how far a policy is from the first on equal terms,
    where the outputs themselves part for good at the first token that differs. A block-diffusion model is also decoded
    left to right, since only then is there one prediction for each place.
    Raises ValueError for fewer than two policies, one that is unknown or that the model refuses, and a bad prompt.
    """
    if len(policies) < 2:
        raise ValueError(f"{len(policies)} memory policies: there must be at least two to compare")
    ids = prompt_ids(model, prompt)
    plans = [_plan(model, kv, options, len(ids)) for kv, options in policies]
    prepared = [plan.memory() for plan in plans]
    outputs = [_continue(model, ids, memory, max_new_tokens, temperature, seed) for memory in prepared]
    first = outputs[0]
    kl = _divergence(model, ids, first[0], [plan.memory() for plan in plans])
    results = []
    for (kv, _), memory, (found, text, reason, speed), nats in zip(policies, prepared, outputs, kl, strict=True):
        same = sum(a == b for a, b in zip(found, first[0], strict=False))
        ratio = memory.nbytes / prepared[0].nbytes
        results.append(PolicyResult(kv, found, text, reason, nats, same, memory.nbytes, ratio, memory.held, speed))
    return MemoryComparison(len(ids), seed, temperature, tuple(results))


def _plan(model: LanguageModel, kv: str, options: dict[str, Any], prompt_tokens: int) -> MemoryPlan:
    """Raises ValueError, with the policy's name, where the model or the prompt does not suit it."""
    try:
        plan = model.memory_plan(kv, **{name: options[name] for name in policy_options(kv) if name in options})
        plan.memory().check_prompt(prompt_tokens)
    except ValueError as error:
        message = str(error)
        raise ValueError(message if kv in message else f"kv={kv!r}: {message}") from error
    return plan


def _continue(
    model: LanguageModel, ids: list[int], memory: Memory, max_new_tokens: int, temperature: float, seed: int
) -> tuple[list[int], str, str, float | None]:
    """(ids, text, reason of the end, tokens a second after the first)."""
    found: list[int] = []
    text, reason, times = "", "", []
    options = {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
    for event in generate(model, ids, decoder="autoregressive", memory=memory, **options):
        if isinstance(event, Commit):
            times.append(time.perf_counter())
            found += event.ids
            text += event.text
        elif isinstance(event, Done):
            reason = event.reason
    speed = (len(found) - 1) / (times[-1] - times[0]) if len(found) > 1 else None
    return found, text, reason, speed


@torch.inference_mode()
def _divergence(model: LanguageModel, prompt: list[int], text: list[int], memories: Sequence[Memory]) -> list[float]:
    """Mean KL from the first memory's predictions for each token of a text after a prompt. A pass serves all memories.

    memories: empty.
    """
    rows = [unspoken(model.check_tokens(prompt), memory) for memory in memories]
    total = torch.zeros(len(rows), dtype=torch.float64)
    for token in text:
        logs = torch.cat(read(model, rows, outputs=1)).log_softmax(-1)  # [policies, V]
        total += kl_divergence(logs[:1], logs).double().cpu()
        for row in rows:
            row.pending = torch.tensor([token], device=model.device)
    return (total / len(text)).tolist()
