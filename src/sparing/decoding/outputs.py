"""What a pass of the engine gives a row of text: the logits it reads, as processed, and the id chosen after them.

Rows of the same settings are processed and chosen from together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from sparing.decoding.rules import Seen
from sparing.decoding.sampling import Sampling, unusable
from sparing.kernels.vocabulary import VocabularyResult

__all__ = ["NOTHING", "Asked", "Head", "Outputs", "Pending", "read_logits"]

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


Asked = tuple[Pending, Outputs]


class Head(Protocol):
    """What reading logits needs of a model."""

    def head(self, hidden: Tensor) -> Tensor: ...


def read_logits(model: Head, hidden: Tensor, asked: Sequence[Asked], *, is_all: bool) -> None:
    """Logits in one product with the head, processed and chosen from at once for all rows of the same settings.

    hidden: [n, H] of the whole pass; is_all: it holds nothing but the outputs that are asked for.
    """
    groups: list[list[Asked]] = []
    for pair in asked:
        settings = pair[0].sampling
        group = next((g for g in groups if g[0][0].sampling is settings or g[0][0].sampling == settings), None)
        if group is None:
            groups.append(group := [])
        group.append(pair)
    if len(groups) > 1 or not is_all:
        hidden = torch.cat([outputs.states[-want.outputs :] for group in groups for want, outputs in group])
    logits, scored = model.head(hidden), []
    sizes = [sum(want.outputs for want, _ in group) for group in groups]
    parts = logits.split_with_sizes(sizes) if len(groups) > 1 else [logits]
    for group, part in zip(groups, parts, strict=True):
        scored.append(_score(group, part))
    for group, scores in zip(groups, scored, strict=True):
        _choose(group, scores)


def _score(group: Sequence[Asked], logits: Tensor) -> Tensor:
    """Process the logits of rows with the same settings, float32 [outputs of all, V]; returned are the scores."""
    sampling, scores, bad, end = group[0][0].sampling, logits, set[int](), 0
    if sampling is not None:
        scores = sampling.process(logits, [seen for want, _ in group for seen in want.seen])
        bad = {*unusable(logits), *(unusable(scores) if scores is not logits else ())}
    for want, outputs in group:
        start, end = end, end + want.outputs
        outputs.set_logits(logits, scores, slice(start, end))
        if bad:
            outputs.unusable = sorted(at - start for at in bad if start <= at < end)
    return scores


def _choose(group: Sequence[Asked], scores: Tensor) -> None:
    """Draw what follows each row that asks for it. scores: those of the whole group."""
    sampling = group[0][0].sampling
    drawing = [(want.generator, outputs) for want, outputs in group if want.generator is not None]
    if sampling is None or not drawing:
        return
    if len(drawing) < len(group) or any(want.outputs > 1 for want, _ in group):
        scores = torch.cat([outputs.scores[-1:] for _, outputs in drawing])
    chosen = sampling.choose(scores, [generator for generator, _ in drawing])
    for (_, outputs), one in zip(drawing, chosen.split(1) if len(drawing) > 1 else [chosen], strict=True):
        outputs.chosen = one
