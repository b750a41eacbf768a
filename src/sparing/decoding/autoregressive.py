"""Left to right, one token a step."""

from __future__ import annotations

from collections.abc import Iterator

from sparing.decoding.events import Commit, Event
from sparing.decoding.faults import refuse
from sparing.decoding.outputs import Outputs, Pending
from sparing.decoding.row import ActiveRow
from sparing.decoding.sampling import Sampling
from sparing.decoding.stepper import Stepper
from sparing.models.base import LanguageModel

__all__ = ["AutoregressiveStepper"]


class AutoregressiveStepper(Stepper):
    """Gives a Commit a step, then the row's Done.

    logprobs: report each token's log-probability under the unprocessed logits.
    Raises ValueError where logits are not finite or leave no token to choose; the step is then not in the memory.
    """

    def __init__(self, model: LanguageModel, row: ActiveRow, sampling: Sampling, *, logprobs: bool = False) -> None:
        super().__init__(row)
        self.model, self.logprobs = model, logprobs
        self._reading = Pending(sampling=sampling, generator=row.generator)
        self._history = [*row.context, *row.pending.tolist()] if sampling.of_history else None

    def wants(self) -> Pending:
        if self._history is not None:
            self._reading.seen = (self.row.seen(self._history),)
        return self._reading

    def take(self, outputs: Outputs) -> Iterator[Event]:
        row = self.row
        if outputs.unusable:
            row.memory.rollback()
            raise refuse(self.model, row.row, row.pending, row.memory, outputs.logits[0], outputs.scores[0])
        token = int(outputs.chosen)
        row.keep(following=outputs.chosen)
        if self._history is not None:
            self._history.append(token)
        logprobs = [float(outputs.logits[0].log_softmax(-1)[token])] if self.logprobs else None
        ids, text = row.transcript.push([token])
        yield Commit(row.row, ids, text, logprobs, row.transcript.marks)
        if row.transcript.reason is not None or row.memory.length >= self.model.config.max_position_embeddings:
            self.finished = True
            yield row.done()
