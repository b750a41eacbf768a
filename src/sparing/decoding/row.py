"""One row of decoding: what it has read and said, and how it draws."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparing.decoding.events import Done
from sparing.decoding.rules import Seen
from sparing.decoding.transcript import Transcript
from sparing.memory.sequence import Memory

__all__ = ["ActiveRow", "unspoken"]


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
        self._held = self.memory.length  # as this row left it
        self._unnamed = self._held - len(self.context)
        self._evictions = len(self.memory.evictions)  # those of an earlier turn

    def seen(self, ids: Sequence[int]) -> Seen:
        """What stands before the next token. ids: context, prompt and all output."""
        new = len(self.transcript.ids)
        return Seen(ids, new, self._unnamed, self.transcript.remaining + new)

    def check_memory(self) -> None:
        """Raises ValueError if anybody else has changed the memory since this row did."""
        memory = self.memory
        if memory.length != self._held or memory.staged:
            raise ValueError(
                f"row {self.row}: its memory was changed by somebody else (length {memory.length}, left at"
                f" {self._held}; {memory.staged} staged): give each row a memory of its own, such as a fork"
            )

    def keep(self, following: Tensor | None = None) -> None:
        """Commit the pending ids, which a pass has staged. following: those that are pending next, int64 [n]."""
        self.commit(len(self.pending))
        self.pending = self.pending[:0] if following is None else following
        self.is_prompt = False

    def keep_piece(self, n: int) -> None:
        """Commit the first n of the pending ids, where more of the same text follow."""
        self.commit(n)
        self.pending = self.pending[n:]

    def commit(self, n: int) -> None:
        """Keep the first n tokens that a pass has staged."""
        self.memory.commit(n, prompt=self.is_prompt)
        self._held = self.memory.length
        self.forwards += 1

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


def unspoken(ids: Tensor, memory: Memory) -> ActiveRow:
    """A row that is read and says nothing. ids: int64 [n]."""
    return ActiveRow(0, ids, memory, Transcript(None, (), (), 1), torch.Generator())
