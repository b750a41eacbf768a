"""The one loop: in each step all rows share a pass, whatever decodes them, and long prompts are read in pieces.

A stepper says what its row runs next and takes what came out. The engine packs what all of them want into one pass, so
rows that decode do not wait for a prompt that is read beside them; rows enter and leave between steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sparing.decoding.canvas import Denoiser, Denoising, predict
from sparing.decoding.events import Event
from sparing.decoding.row import ActiveRow
from sparing.decoding.rules import Seen
from sparing.decoding.sampling import Sampling, unusable
from sparing.kernels.vocabulary import VocabularyResult
from sparing.models.batch import Row
from sparing.models.diffusion_gemma import CanvasRow

__all__ = ["PIECE", "Engine", "Failed", "Outputs", "Reader", "Reading", "Stepper", "Team", "read", "run"]

PIECE = 1024  # tokens of a text that a pass reads at most: bounds activations
PIECE_BESIDE = 256  # of a prompt, while other rows wait for the pass with their next tokens
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
    scores: those as processed; unusable: at which of the outputs no token can be chosen; canvas: what one becomes.
    """

    states: Tensor = NOTHING
    logits: Tensor = NOTHING
    scores: Tensor = NOTHING
    unusable: Sequence[int] = ()
    canvas: VocabularyResult | None = None


class Model(Denoiser, Protocol):
    """What the engine runs: a `LanguageModel`, or what stands for one."""

    def run(self, rows: Sequence[Row]) -> Tensor: ...

    def head(self, hidden: Tensor) -> Tensor: ...


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

    def wants(self) -> Reading | Denoising:
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

    def __init__(self, row: ActiveRow, reading: Reading) -> None:
        super().__init__(row)
        self.reading = reading
        self.logits = NOTHING

    def wants(self) -> Reading:
        return self.reading

    def take(self, outputs: Outputs) -> Iterator[Event]:
        self.row.keep(len(self.row.pending))
        self.logits, self.finished = outputs.logits, True
        return iter(())


@dataclass(frozen=True)
class Failed:
    """A row that ended with an error, and whose memory is at what its last event said. The other rows go on."""

    row: int
    error: Exception


@dataclass
class _Share:
    """One row's share of a pass. is_piece: more of the same text follows; outputs: once the pass has run."""

    stepper: Stepper
    want: Reading | Denoising
    row: Row
    is_piece: bool
    outputs: Outputs = field(default_factory=Outputs)


class Engine:
    """Rows that decode together with one model, in the order in which they were added."""

    def __init__(self, model: Model) -> None:
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
                share.row.memory.rollback()

    def _shares(self) -> tuple[list[_Share], list[Failed]]:
        """What the next pass consists of, and the rows that could not say what they want."""
        shares, failures = [], []
        teams: dict[Team, list[Stepper]] = {}
        for stepper in self._rows:
            if stepper.team is not None:
                teams.setdefault(stepper.team, []).append(stepper)
        for team, steppers in teams.items():
            try:
                team.prepare(steppers, alone=len(steppers) == len(self._rows))
            except Exception as error:
                failures += [self._fail(stepper, error) for stepper in steppers]
        is_busy = any(not stepper.row.is_prompt for stepper in self._rows)
        for stepper in self.steppers:
            try:
                shares.append(_share(stepper, is_busy=is_busy))
            except Exception as error:
                failures.append(self._fail(stepper, error))
        return shares, failures

    def _pass(self, shares: Sequence[_Share]) -> None:
        """Run all rows at once, canvases after texts, and give each its outputs."""
        texts = [(share, share.want) for share in shares if isinstance(share.want, Reading)]
        canvases = [(share, share.want) for share in shares if isinstance(share.want, Denoising)]
        ordered = [share for share, _ in (*texts, *canvases)]
        try:
            hidden = self.model.run([share.row for share in ordered])
            for share, _ in canvases:
                share.row.memory.rollback()
            parts = hidden.split_with_sizes([share.row.num_wanted for share in ordered])
            for share, states in zip(ordered, parts, strict=True):
                share.outputs.states = states
            _choose_from(self.model, [pair for pair in texts if pair[1].outputs and not pair[0].is_piece])
            found = predict(self.model, [want for _, want in canvases], parts[len(texts) :])
            for (share, _), prediction in zip(canvases, found, strict=True):
                share.outputs.canvas = prediction
        except BaseException:
            for share in shares:
                share.row.memory.rollback()
            raise

    def _take(self, share: _Share) -> Iterator[Event | Failed]:
        """Let a row decide; its events."""
        stepper, outputs = share.stepper, share.outputs
        if stepper not in self._rows:  # cancelled since the pass
            return
        before = self._rows[stepper]
        try:
            if share.is_piece:
                stepper.row.keep(len(share.row.tokens))
                if isinstance(share.want, Reading) and share.want.states:
                    before.append(outputs.states)
                return
            if before:
                outputs.states = torch.cat([*before, outputs.states])
                before.clear()
            for event in stepper.take(outputs):
                yield event
                if stepper not in self._rows:  # cancelled by who took the event
                    return
        except Exception as error:
            yield self._fail(stepper, error)
        if stepper.finished:
            self.cancel(stepper)

    def _fail(self, stepper: Stepper, error: Exception) -> Failed:
        self.cancel(stepper)
        return Failed(stepper.row.row, error)


def run(model: Model, steppers: Iterable[Stepper]) -> Iterator[Event]:
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


def read(model: Model, rows: Iterable[ActiveRow], *, outputs: int = 0, later: int = 0) -> list[Tensor]:
    """Bring the pending ids of rows into their memories; the logits of each row's last ids, float32 [outputs, V].

    later: as of `Reading`.
    """
    readers = [Reader(row, Reading(outputs, later=later)) for row in rows]
    for _ in run(model, readers):
        pass
    return [reader.logits for reader in readers]


def _share(stepper: Stepper, *, is_busy: bool) -> _Share:
    """What a row runs next: a canvas, all that is pending, or a piece of it. is_busy: other rows wait for the pass."""
    want, row = stepper.wants(), stepper.row
    tokens, memory = row.pending, row.memory
    if isinstance(want, Denoising):
        return _Share(stepper, want, CanvasRow(want.ids, memory, soft=want.soft), is_piece=False)
    if want.drafts is not None:  # they are no given text, and stay together
        tokens = torch.cat([tokens, want.drafts.to(tokens.device)])
        wanted = None if want.states else want.outputs
        return _Share(stepper, want, Row(tokens, memory, wanted=wanted, text_end=memory.length), is_piece=False)
    end, size = memory.length + len(tokens) + want.later, PIECE
    if is_busy and row.is_prompt and len(tokens) > PIECE_BESIDE and not memory.depends_on_cuts:
        size = PIECE_BESIDE
    is_piece = len(tokens) > size
    wanted = None if want.states else 0 if is_piece else want.outputs
    return _Share(stepper, want, Row(tokens[:size], memory, wanted=wanted, text_end=end), is_piece)


def _choose_from(model: Model, asked: Sequence[tuple[_Share, Reading]]) -> None:
    """Logits of all outputs in one product with the head, processed at once for all rows of the same settings."""
    if not asked:
        return
    states = [share.outputs.states[-want.outputs :] for share, want in asked]
    logits = model.head(states[0] if len(states) == 1 else torch.cat(states))
    groups: list[list[tuple[_Share, Reading]]] = []
    for pair, part in zip(asked, logits.split_with_sizes([len(part) for part in states]), strict=True):
        pair[0].outputs.logits = part
        settings = pair[1].sampling
        group = next((g for g in groups if g[0][1].sampling is settings or g[0][1].sampling == settings), None)
        if group is None:
            groups.append(group := [])
        group.append(pair)
    for group in groups:
        _process(group, logits if len(groups) == 1 else torch.cat([share.outputs.logits for share, _ in group]))


def _process(group: Sequence[tuple[_Share, Reading]], logits: Tensor) -> None:
    """Scores of rows with the same settings, and where no token can be chosen. logits: [outputs of all, V]."""
    if (sampling := group[0][1].sampling) is None:
        return
    scores = sampling.process(logits, [seen for _, want in group for seen in want.seen])
    bad = {*unusable(logits), *(unusable(scores) if scores is not logits else ())}
    start = 0
    for share, want in group:
        end = start + want.outputs
        share.outputs.scores = scores[start:end]
        share.outputs.unusable = sorted(at - start for at in bad if start <= at < end)
        start = end
