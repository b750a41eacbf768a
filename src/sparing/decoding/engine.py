"""The one loop: in each step all rows share a pass, whatever decodes them, and long prompts are read in pieces.

A stepper says what its row runs next and takes what came out. The engine packs what all of them want into one pass, so
rows that decode do not wait for a prompt that is read beside them; rows enter and leave between steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparing.decoding.events import Event
from sparing.decoding.row import PIECE, ActiveRow
from sparing.decoding.rules import Seen
from sparing.decoding.sampling import Sampling, unusable
from sparing.models.batch import Row

__all__ = ["Engine", "Failed", "Outputs", "Reading", "Stepper", "run"]

NOTHING = torch.empty(0)


@dataclass
class Reading:
    """What a row runs next: its pending ids, from left to right, cut into pieces if they are many.

    outputs: how many of the last positions' logits are read; sampling: how they are processed, after what stands before
    each of them (`seen`, where the settings look at it); states: whether the hidden states of all positions are wanted;
    drafts: int64 [m] ids tried after the pending ones, all in one pass; later: how many ids of the same text follow in
    other passes.
    """

    outputs: int = 1
    sampling: Sampling | None = None
    seen: Sequence[Seen] = ()
    states: bool = False
    drafts: Tensor | None = None
    later: int = 0


@dataclass
class Outputs:
    """What came out of a pass for one row.

    states: final-normed hidden states [outputs, H], or of all that was read [n, H]; logits: float32 [outputs, V];
    scores: those as processed; unusable: at which of the outputs no token can be chosen.
    """

    states: Tensor = NOTHING
    logits: Tensor = NOTHING
    scores: Tensor = NOTHING
    unusable: Sequence[int] = ()


class Stepper:
    """Decodes one row, a pass at a time. finished: nothing more is wanted."""

    def __init__(self, row: ActiveRow) -> None:
        self.row = row
        self.finished = False

    @staticmethod
    def prepare(steppers: Sequence[Any]) -> None:
        """What all rows of a kind do together before a pass, such as drafting."""

    def wants(self) -> Reading:
        """What the row runs next."""
        raise TypeError(f"{type(self).__name__} does not define wants")

    def take(self, outputs: Outputs) -> Iterator[Event]:
        """Decide, commit, and say what was decided: whatever an event says is in the memory when the event is given.

        If it raises, the row ends.
        """
        raise TypeError(f"{type(self).__name__} does not define take")

    def close(self) -> None:
        """The row leaves, finished or not."""


@dataclass(frozen=True)
class Failed:
    """A row that ended with an error, and whose memory is at what its last event said. The other rows go on."""

    row: int
    error: Exception


@dataclass
class _Share:
    """One row's share of a pass. is_piece: more of the same text follows; outputs: once the pass has run."""

    stepper: Stepper
    want: Reading
    row: Row
    is_piece: bool
    outputs: Outputs = field(default_factory=Outputs)


class Engine:
    """Rows that decode together with one model, in the order in which they were added."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._rows: dict[Stepper, list[Tensor]] = {}  # with the hidden states of pieces, where they are wanted

    @property
    def steppers(self) -> list[Stepper]:
        """Whose rows are not done."""
        return list(self._rows)

    def add(self, stepper: Stepper) -> None:
        """Let a row take part from the next step on."""
        self._rows[stepper] = []

    def cancel(self, stepper: Stepper) -> None:
        """Take a row out, between steps or between two events of one; its memory is at what its last event said."""
        if self._rows.pop(stepper, None) is not None:
            stepper.row.memory.rollback()
            stepper.close()

    def close(self) -> None:
        """Take all rows out."""
        for stepper in self.steppers:
            self.cancel(stepper)

    @torch.inference_mode()
    def step(self) -> Iterator[Event | Failed]:
        """One pass of all rows: their events, row by row.

        A row's memory changes when its events are taken, so that both agree where nobody asks for more of them. An
        error in what a row decides ends that row. If the pass itself raises, all rows and memories are as before it.
        """
        shares, failures = self._shares()
        yield from failures
        if not shares:
            return
        self._pass(shares)
        taken = 0
        try:
            for share in shares:
                yield from self._take(share)
                taken += 1
        finally:
            for share in shares[taken:]:
                share.stepper.row.memory.rollback()

    def _shares(self) -> tuple[list[_Share], list[Failed]]:
        """What the next pass consists of, and the rows that could not say what they want."""
        shares, failures = [], []
        kinds: dict[type[Stepper], list[Stepper]] = {}
        for stepper in self._rows:
            kinds.setdefault(type(stepper), []).append(stepper)
        for kind, steppers in kinds.items():
            try:
                kind.prepare(steppers)
            except Exception as error:
                failures += [self._fail(stepper, error) for stepper in steppers]
        for stepper in self.steppers:
            try:
                shares.append(_share(stepper))
            except Exception as error:
                failures.append(self._fail(stepper, error))
        return shares, failures

    def _pass(self, shares: Sequence[_Share]) -> None:
        """Run all rows at once and give each its outputs."""
        try:
            hidden = self.model.run([share.row for share in shares])
            parts = hidden.split_with_sizes([share.row.num_wanted for share in shares])
            for share, states in zip(shares, parts, strict=True):
                share.outputs.states = states
            self._read([share for share in shares if share.want.outputs and not share.is_piece])
        except BaseException:
            for share in shares:
                share.stepper.row.memory.rollback()
            raise

    def _read(self, shares: Sequence[_Share]) -> None:
        """Logits of all outputs in one product with the head, processed at once for all rows of the same settings."""
        if not shares:
            return
        states = [share.outputs.states[-share.want.outputs :] for share in shares]
        logits = self.model.head(states[0] if len(states) == 1 else torch.cat(states))
        for share, part in zip(shares, logits.split_with_sizes([len(part) for part in states]), strict=True):
            share.outputs.logits = part
        groups: list[list[_Share]] = []
        for share in shares:
            settings = share.want.sampling
            alike = (g for g in groups if g[0].want.sampling is settings or g[0].want.sampling == settings)
            group = next(alike, None)
            if group is None:
                groups.append(group := [])
            group.append(share)
        for group in groups:
            if (sampling := group[0].want.sampling) is not None:
                whole = logits if len(groups) == 1 else torch.cat([share.outputs.logits for share in group])
                _process(group, sampling, whole)

    def _take(self, share: _Share) -> Iterator[Event | Failed]:
        """Let a row decide; its events."""
        stepper, outputs = share.stepper, share.outputs
        if stepper not in self._rows:  # cancelled since the pass
            return
        before = self._rows[stepper]
        try:
            if share.is_piece:
                stepper.row.keep(len(share.row.tokens))
                if share.want.states:
                    before.append(outputs.states)
                return
            if before:
                outputs.states = torch.cat([*before, outputs.states])
                before.clear()
            yield from stepper.take(outputs)
        except Exception as error:
            yield self._fail(stepper, error)
        if stepper.finished:
            self.cancel(stepper)

    def _fail(self, stepper: Stepper, error: Exception) -> Failed:
        self.cancel(stepper)
        return Failed(stepper.row.row, error)


def run(model: Any, steppers: Iterable[Stepper]) -> Iterator[Event]:
    """Events of rows until all are done, or of as many as are asked for.

    The first error of a row is raised once the others are done. That of a pass is raised at once.
    """
    engine, failed = Engine(model), list[Failed]()
    try:
        for stepper in steppers:
            engine.add(stepper)
        while engine.steppers:
            for event in engine.step():
                if isinstance(event, Failed):
                    failed.append(event)
                else:
                    yield event
    finally:
        engine.close()
    if failed:
        raise failed[0].error


def _share(stepper: Stepper) -> _Share:
    """What a row runs next: all that is pending, or a piece of it that ends at a multiple of `PIECE` from its start."""
    want, row = stepper.wants(), stepper.row
    tokens, end = row.pending, row.memory.length + len(row.pending) + want.later
    is_piece = want.drafts is None and len(tokens) > PIECE
    if want.drafts is not None:
        tokens, end = torch.cat([tokens, want.drafts.to(tokens.device)]), row.memory.length  # drafts are no given text
    elif is_piece:
        tokens = tokens[:PIECE]
    wanted = None if want.states else 0 if is_piece else want.outputs
    return _Share(stepper, want, Row(tokens, row.memory, wanted=wanted, text_end=end), is_piece)


def _process(group: Sequence[_Share], sampling: Sampling, logits: Tensor) -> None:
    """Scores of rows with the same settings, and where no token can be chosen. logits: [outputs of all, V]."""
    scores = sampling.process(logits, [seen for share in group for seen in share.want.seen])
    bad = {*unusable(logits), *(unusable(scores) if scores is not logits else ())}
    start = 0
    for share in group:
        n = share.want.outputs
        share.outputs.scores = scores[start : start + n]
        share.outputs.unusable = sorted(at - start for at in bad if start <= at < start + n)
        start += n
