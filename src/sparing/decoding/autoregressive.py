"""Left to right, one token a step, over rows of different lengths that leave when they are done."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparing.decoding.events import Commit, Done, Event
from sparing.decoding.faults import refuse
from sparing.decoding.rules import Seen
from sparing.decoding.sampling import Sampling, unusable
from sparing.decoding.transcript import Transcript
from sparing.memory.sequence import Memory
from sparing.models.base import LanguageModel
from sparing.models.batch import Row

__all__ = ["ActiveRow", "autoregressive", "encode", "keep", "stage"]

PREFILL_CHUNK = 1024  # tokens a row adds per pass: bounds activations on long prompts


@dataclass
class ActiveRow:
    """One row while it is being decoded.

    pending: ids that the memory does not hold yet, int64 [n]; is_prompt: whether they were given; context: the ids that
    the memory held before them, where known.
    """

    row: int
    pending: Tensor
    memory: Memory
    transcript: Transcript
    generator: torch.Generator
    forwards: int = 0
    started: float = field(default_factory=time.perf_counter)
    prompt_tokens: int = 0
    is_prompt: bool = True
    context: Sequence[int] = ()

    def __post_init__(self) -> None:
        self.prompt_tokens = len(self.pending)
        self._unnamed = self.memory.length - len(self.context)
        self._evictions = len(self.memory.evictions)  # those of an earlier turn

    def seen(self, ids: Sequence[int]) -> Seen:
        """What stands before the next token. ids: context, prompt and all output."""
        new = len(self.transcript.ids)
        return Seen(ids, new, self._unnamed, self.transcript.remaining + new)

    def done(self, **more: int) -> Done:
        """The row's last event. Reason "length" stands also for the end of the context. more: of its stats."""
        stats: dict[str, Any] = {
            "prompt_tokens": self.prompt_tokens,
            "new_tokens": len(self.transcript.ids),
            "forwards": self.forwards,
            "seconds": time.perf_counter() - self.started,
            "memory_bytes": self.memory.nbytes,
        }
        if self.memory.pruner is not None:
            stats["evictions"] = self.memory.evictions[self._evictions :]
            stats["peak_entries"] = self.memory.pruner.peak
        return Done(self.row, self.transcript.reason or "length", stats | more)


def encode(model: LanguageModel, sequences: Sequence[ActiveRow], wanted: int | None) -> Tensor:
    """`stage`, and keep everything in the memories."""
    hidden = stage(model, sequences, wanted)
    keep(sequences)
    return hidden


def stage(
    model: LanguageModel, sequences: Sequence[ActiveRow], wanted: int | None, chunks: list[list[Tensor]] | None = None
) -> Tensor:
    """Run over pending ids; final-normed hidden states [rows * wanted, H] of each row's last ids.

    Long prompts go in chunks, whose outputs nobody reads and which the memories keep; the last chunk is only staged:
    `keep` or roll back. wanted: 0 or 1; None: those of the whole last chunk, while `chunks`, a list per row, takes
    those of the chunks before it.
    """
    ends = [s.memory.length + len(s.pending) for s in sequences]
    while any(len(s.pending) > PREFILL_CHUNK for s in sequences):
        long = [i for i, s in enumerate(sequences) if len(s.pending) > PREFILL_CHUNK]
        rows = [
            Row(sequences[i].pending[:PREFILL_CHUNK], sequences[i].memory, wanted=wanted and 0, text_end=ends[i])
            for i in long
        ]
        hidden = model.run(rows)
        for place, i in enumerate(long):
            s = sequences[i]
            if chunks is not None:
                chunks[i].append(hidden[place * PREFILL_CHUNK : (place + 1) * PREFILL_CHUNK])
            s.memory.commit(PREFILL_CHUNK, prompt=s.is_prompt)
            s.pending = s.pending[PREFILL_CHUNK:]
            s.forwards += 1
    return model.run([Row(s.pending, s.memory, wanted=wanted) for s in sequences])


def keep(sequences: Sequence[ActiveRow]) -> None:
    """Commit what `stage` left staged."""
    for s in sequences:
        s.memory.commit(len(s.pending), prompt=s.is_prompt)
        s.pending, s.is_prompt = s.pending[:0], False
        s.forwards += 1


@torch.inference_mode()
def autoregressive(
    model: LanguageModel, sequences: Sequence[ActiveRow], sampling: Sampling, *, logprobs: bool = False
) -> Iterator[Event]:
    """Yield a Commit per row and step, then the row's Done.

    logprobs: report each token's log-probability under the unprocessed logits.
    Raises ValueError where logits are not finite or leave no token to choose; the step is then in no memory.
    """
    active = list(sequences)
    history = {s.row: [*s.context, *s.pending.tolist()] for s in active} if sampling.of_history else {}
    limit = model.config.max_position_embeddings
    while active:
        logits, chosen = _step(model, active, sampling, history)
        scores = logits.log_softmax(-1).gather(-1, chosen[:, None])[:, 0].tolist() if logprobs else None
        remaining = []
        for i, (s, token) in enumerate(zip(active, chosen.tolist(), strict=True)):
            ids, text = s.transcript.push([token])
            yield Commit(s.row, ids, text, None if scores is None else [scores[i]], s.transcript.marks)
            if s.transcript.reason is not None or s.memory.length >= limit:
                yield s.done()
                continue
            s.pending = chosen[i : i + 1]
            if history:
                history[s.row].append(token)
            remaining.append(s)
        active = remaining


def _step(
    model: LanguageModel, active: Sequence[ActiveRow], sampling: Sampling, history: Mapping[int, list[int]]
) -> tuple[Tensor, Tensor]:
    """(logits [rows, V], one id per row). If anything raises, what the step staged is forgotten."""
    try:
        logits = model.head(stage(model, active, wanted=1))
        z = sampling.process(logits, [s.seen(history[s.row]) for s in active] if history else [])
        bad = unusable(logits) or (unusable(z) if z is not logits else [])
        chosen = sampling.choose(z, [s.generator for s in active]) if not bad else None
    except BaseException:
        _roll_back(active)
        raise
    if chosen is None:
        _roll_back(active)
        s = active[bad[0]]
        raise refuse(model, s.row, s.pending, s.memory, logits[bad[0]], z[bad[0]])
    keep(active)
    return logits, chosen


def _roll_back(sequences: Sequence[ActiveRow]) -> None:
    for s in sequences:
        s.memory.rollback()
