"""What the engine asks of who decodes a row: what runs next, and what becomes of what came out."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

from sparing.decoding.canvas import Denoising
from sparing.decoding.events import Event
from sparing.decoding.outputs import NOTHING, Outputs, Pending
from sparing.decoding.row import ActiveRow

__all__ = ["Reader", "Stepper", "Team"]


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
