"""The one loop: in each step all rows share a pass, whatever decodes them, and long prompts are read in pieces.

A stepper says what its row runs next and takes what came out. The engine packs what all of them want into one pass, so
rows that decode do not wait for a prompt that is read beside them; rows enter and leave between steps.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparing.decoding.canvas import Denoiser, Denoising, predict
from sparing.decoding.events import Event
from sparing.decoding.outputs import Head, Outputs, Pending, read_logits
from sparing.decoding.row import ActiveRow
from sparing.decoding.stepper import Reader, Stepper, Team
from sparing.memory.sequence import Memory
from sparing.models.batch import Row
from sparing.models.diffusion_gemma import CanvasRow

__all__ = ["PIECE", "Engine", "Failed", "read", "run"]

PIECE = 1024  # tokens of a text that a pass reads at most: bounds activations
PIECE_BESIDE = 256  # of a prompt, while other rows wait for the pass with their next tokens


class Model(Denoiser, Head, Protocol):
    """What the engine runs: a `LanguageModel`, or what stands for one."""

    def run(self, rows: Sequence[Row]) -> Tensor: ...

    def check_memory(self, memory: Memory) -> None: ...


@dataclass(frozen=True)
class Failed:
    """A row that ended with an error, and whose memory is at what its last event said. The other rows go on."""

    row: int
    error: Exception


@dataclass
class _Share:
    """One row's share of a pass. reads: positions whose hidden states are read; is_piece: more of the text follows."""

    stepper: Stepper
    want: Pending | Denoising
    row: Row
    reads: int
    is_piece: bool = False


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
        """Let a row take part from the next step on.

        Raises ValueError, with nothing changed, for a memory that another row has, that is of another model, or in
        which tokens are staged.
        """
        memory = stepper.row.memory
        if any(memory is other.row.memory for other in self._rows):
            raise ValueError("the memory is in another row: give each row a memory of its own, such as a fork")
        stepper.row.check_memory()
        self.model.check_memory(memory)
        self._rows[stepper] = []

    def cancel(self, stepper: Stepper) -> None:
        """Take a row out, between steps or between two events of one; its memory is at what its last event said."""
        if stepper in self._rows:
            stepper.row.memory.rollback()
            self._leave(stepper)

    def close(self) -> None:
        """Take all rows out."""
        for stepper in self.steppers:
            self.cancel(stepper)

    @torch.inference_mode()
    def step(self) -> Iterator[Event | Failed]:
        """One pass of all rows: their events, row by row.

        A row's memory changes when its events are taken, so that both agree where nobody asks for more of them: then
        the row whose events were being given is out, and those after it are as before the pass. So are all if the pass
        raises; what remains of it are the random numbers drawn. An error in what a row decides ends that row.
        """
        shares, failures = self._shares()
        yield from failures
        if not shares:
            return
        outputs, taken = self._pass(shares), 0
        try:
            for share, found in zip(shares, outputs, strict=True):
                yield from self._take(share, found)
                taken += 1
        finally:
            for share in shares[taken:]:
                share.row.memory.rollback()
            for share in shares[taken : taken + 1]:
                self.cancel(share.stepper)

    def _shares(self) -> tuple[list[_Share], list[Failed]]:
        """What the next pass consists of, canvases after texts, and the rows that could not say what they want."""
        shares, failures = [], []
        teams: dict[Team, list[Stepper]] = {}
        for stepper in self._rows:
            if stepper.team is not None:
                teams.setdefault(stepper.team, []).append(stepper)
        for team, steppers in teams.items():
            try:
                team.prepare(steppers, alone=len(steppers) == len(self._rows))
            except Exception as error:
                failures += [self._left(stepper, error) for stepper in steppers]
        is_busy = any(not stepper.row.is_prompt for stepper in self._rows)
        for stepper in self.steppers:
            try:
                shares.append(_share(stepper, is_busy=is_busy))
            except Exception as error:
                failures.append(self._left(stepper, error))
        shares.sort(key=lambda share: isinstance(share.want, Denoising))
        return shares, failures

    def _pass(self, shares: Sequence[_Share]) -> list[Outputs]:
        """Run all rows at once; the outputs of each."""
        try:
            hidden, found, end = self.model.run([share.row for share in shares]), [], 0
            for share in shares:
                start, end = end, end + share.reads
                found.append(Outputs(hidden, slice(start, end)))
                if not share.row.causal:
                    share.row.memory.rollback()
            pairs = list(zip(shares, found, strict=True))
            _denoise(self.model, [(s.want, o) for s, o in pairs if isinstance(s.want, Denoising)])
            asked = [(s.want, o) for s, o in pairs if isinstance(s.want, Pending) and not s.is_piece and s.want.outputs]
            if asked:
                read_logits(self.model, hidden, asked, is_all=end == sum(want.outputs for want, _ in asked))
        except BaseException:
            for share in shares:
                share.row.memory.rollback()
            raise
        return found

    def _take(self, share: _Share, outputs: Outputs) -> Iterator[Event | Failed]:
        """Let a row decide; its events."""
        stepper = share.stepper
        if stepper not in self._rows:  # cancelled since the pass
            return
        before = self._rows[stepper]
        try:
            if share.is_piece:
                stepper.row.keep_piece(share.row.size)
                if isinstance(share.want, Pending) and share.want.states:
                    before.append(outputs.states)
                return
            if before:
                outputs.put_before(before)
                before.clear()
            for event in stepper.take(outputs):
                yield event
                if stepper not in self._rows:  # cancelled by who took the event
                    return
        except Exception as error:
            self.cancel(stepper)
            yield Failed(stepper.row.row, error)
        if stepper.finished:
            self.cancel(stepper)

    def _leave(self, stepper: Stepper) -> None:
        del self._rows[stepper]
        stepper.close()

    def _left(self, stepper: Stepper, error: Exception) -> Failed:
        """Of a row that has nothing staged; what is, somebody else's pass has."""
        self._leave(stepper)
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

    later: see `Pending`.
    """
    readers = [Reader(row, Pending(outputs, later=later)) for row in rows]
    for _ in run(model, readers):
        pass
    return [reader.logits for reader in readers]


def _share(stepper: Stepper, *, is_busy: bool) -> _Share:
    """What a row runs next: a canvas, all that is pending, or a piece of it. is_busy: other rows wait for the pass."""
    stepper.row.check_memory()
    want, row = stepper.wants(), stepper.row
    tokens, memory = row.pending, row.memory
    if isinstance(want, Denoising):
        return _Share(stepper, want, CanvasRow(want.ids, memory, soft=want.soft, reading=want.reading), len(want.ids))
    known = len(tokens) + (0 if want.drafts is None else len(want.drafts))
    if known < max(1, want.outputs):
        raise ValueError(f"row {row.row} wants {want.outputs} outputs, but {known} ids are pending: give it more")
    if want.drafts is not None:  # they are no given text, and stay together
        tokens = torch.cat([tokens, want.drafts.to(tokens.device)])
        return _Share(stepper, want, Row(tokens, memory, wanted=want.outputs, text_end=memory.length), want.outputs)
    n, size = len(tokens), PIECE
    end = memory.length + n + want.later
    if is_busy and row.is_prompt and n > PIECE_BESIDE and not memory.depends_on_cuts:
        size = PIECE_BESIDE
    is_piece = n > max(size, want.outputs)
    size = min(size, n - want.outputs) if is_piece else n  # all outputs come from the last piece
    reads = size if want.states else 0 if is_piece else want.outputs
    return _Share(stepper, want, Row(tokens[:size], memory, reads, text_end=end), reads, is_piece)


def _denoise(model: Model, asked: Sequence[tuple[Denoising, Outputs]]) -> None:
    """Give each canvas what it becomes."""
    if asked:
        found = predict(model, [want for want, _ in asked], [outputs.states for _, outputs in asked])
        for (_, outputs), canvas in zip(asked, found, strict=True):
            outputs.canvas = canvas
