"""What a decoder is to the engine: a stepper, which says what its row runs next and takes what came out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from sparing.decoding.canvas import Denoising
from sparing.decoding.events import Event
from sparing.decoding.row import ActiveRow
from sparing.decoding.rules import Seen
from sparing.decoding.sampling import Sampling
from sparing.kernels.vocabulary import VocabularyResult

__all__ = ["Outputs", "Pending", "Reader", "Stepper", "Team"]

NOTHING = torch.empty(0)


@dataclass
class Pending:
    """What a row runs next: its pending ids, from left to right, cut into pieces if they are many.

    outputs: how many of the last positions' logits are read; sampling: how they are processed, after what stands before
    each of them (`seen`, where the settings look at it); generator: chooses the id that follows (None: the stepper
    does); states: whether the hidden states of all positions are wanted; drafts: int64 [m] ids tried after the pending
    ones, all in one pass; later: how many ids of the same text follow in other passes.
    """

    outputs: int = 1
    sampling: Sampling | None = None
    seen: Sequence[Seen] = ()
    generator: torch.Generator | None = None
    states: bool = False
    drafts: Tensor | None = None
    later: int = 0


class Outputs:
    """What came out of a pass for one row: views of what came out for all.

    unusable: at which of the outputs no token can be chosen; chosen: int64 [1], what `Pending.generator` drew after the
    last one; canvas: what one becomes.
    """

    def __init__(self, hidden: Tensor, positions: slice) -> None:
        self._hidden, self._positions = hidden, positions
        self._logits = self._scores = self.chosen = NOTHING
        self._at = slice(0)
        self.unusable: Sequence[int] = ()
        self.canvas: VocabularyResult | None = None

    def put_before(self, states: Sequence[Tensor]) -> None:
        """Hidden states of earlier pieces, to be handed over with those of the last."""
        self._hidden = torch.cat([*states, self.states])
        self._positions = slice(len(self._hidden))

    def set_logits(self, logits: Tensor, scores: Tensor, at: slice) -> None:
        """logits, scores: of several rows; at: which are of this one."""
        self._logits, self._scores, self._at = logits, scores, at

    @property
    def states(self) -> Tensor:
        """Final-normed hidden states: [outputs, H], or [n, H] of all that was read."""
        return self._hidden[self._positions]

    @property
    def logits(self) -> Tensor:
        """float32 [outputs, V]."""
        return self._logits[self._at]

    @property
    def scores(self) -> Tensor:
        """Logits as processed: float32 [outputs, V]."""
        return self._scores[self._at]


class Team(Protocol):
    """Rows that do something together before each pass, such as drafting."""

    def prepare(self, steppers: Sequence[Any], *, alone: bool) -> None:
        """steppers: of all its rows; alone: nobody else shares the pass. If it raises, these rows end."""
        ...


class Stepper:
    """Decodes one row, a pass at a time. finished: nothing more is wanted."""

    def __init__(self, row: ActiveRow, team: Team | None = None) -> None:
        self.row, self.team = row, team
        self.finished = False

    def wants(self) -> Pending | Denoising:
        """What the row runs next."""
        raise TypeError(f"{type(self).__name__} does not define wants")

    def take(self, outputs: Outputs) -> Iterator[Event]:
        """Decide, commit, and say what was decided: whatever an event says is in the memory when the event is given.

        If it raises, the row ends.
        """
        raise TypeError(f"{type(self).__name__} does not define take")

    def close(self) -> None:
        """The row leaves, finished or not."""


class Reader(Stepper):
    """Brings a row's pending ids into its memory and says nothing.

    reading: how; logits: float32 [outputs, V] of the last ids, once they are read.
    """

    def __init__(self, row: ActiveRow, reading: Pending) -> None:
        super().__init__(row)
        self.reading = reading
        self.logits = NOTHING

    def wants(self) -> Pending:
        return self.reading

    def take(self, outputs: Outputs) -> Iterator[Event]:
        self.row.keep()
        self.logits, self.finished = outputs.logits, True
        return iter(())
