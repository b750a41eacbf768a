"""What a drafter offers the speculative decoder, and how one drafts token after token."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from sparing.config.roles import EXPERTS, LOOKUP
from sparing.decoding.row import ActiveRow
from sparing.decoding.rules import Seen
from sparing.decoding.sampling import Sampling, unusable
from sparing.models.base import LanguageModel
from sparing.models.drafting_head import DraftingHead

__all__ = ["DraftRow", "Drafter", "Proposal", "Reads", "chain", "nothing", "weight_bytes"]

Reads = Literal["nothing", "last", "all"]


@dataclass
class Proposal:
    """Drafts of one row.

    ids: int64 [m], on any device; probabilities: float32 [m, V] that they were drawn from, None: certain.
    """

    ids: Tensor
    probabilities: Tensor | None = None


@dataclass
class DraftRow:
    """What a drafter knows of a row.

    sequence: the row in the target; history: its ids as far as this run knows them, the last one not yet in the
    target's memory; hidden: the target's final-normed hidden states [k, H] that `Drafter.reads` asks for, up to the
    newest position in its memory; state: the drafter's own, as `Drafter.open` made it.
    """

    sequence: ActiveRow
    history: list[int]
    state: Any
    hidden: Tensor | None = None

    def seen(self, drafts: Sequence[int]) -> Seen:
        """What stands before the token that follows these drafts."""
        seen = self.sequence.seen(self.history)
        return replace(seen, ids=[*seen.ids, *drafts], new=seen.new + len(drafts)) if drafts else seen

    def hand_over(self, states: Tensor, reads: Reads) -> None:
        """states: [k, H] of the newest positions in the target's memory."""
        if reads == "last":
            self.hidden = states[-1:]
        elif reads == "all":
            self.hidden = states if self.hidden is None else torch.cat([self.hidden, states])


class Drafter(Protocol):
    """reads: which hidden states of the target it is handed, of the newest position or of all since its last proposal;
    cost: of one draft, in passes of the target over one token, as far as weights tell."""

    reads: Reads
    cost: float

    def open(self, sequence: ActiveRow) -> Any:
        """The drafter's own state of a new row."""
        ...

    def nbytes(self, state: Any) -> int:
        """Bytes of the memory that a row's state holds, beside the target's."""
        ...

    def propose(self, rows: Sequence[DraftRow], counts: Sequence[int], sampling: Sampling) -> list[Proposal]:
        """At most counts[i] drafts of what follows rows[i].history; random ones draw from the row's generator.

        A row's drafts do not depend on the other rows.
        """
        ...


def nothing() -> Proposal:
    """No drafts."""
    return Proposal(torch.empty(0, dtype=torch.int64))


def weight_bytes(model: LanguageModel | DraftingHead) -> float:
    """Bytes that a pass over one token reads at most: of the experts those that are chosen, no per-layer table."""
    total = 0.0
    for _, role, _, tensor in model.parts():
        share = model.config.top_k_experts / model.config.num_experts if role is EXPERTS else 1.0
        total += 0.0 if role is LOOKUP else share * tensor.nbytes
    return total


def chain(
    rows: Sequence[DraftRow],
    counts: Sequence[int],
    sampling: Sampling,
    predict: Callable[[Sequence[int], Sequence[Sequence[Tensor]]], Tensor],
) -> list[Proposal]:
    """Draft one token after the other, each chosen as the target would choose from the drafter's logits.

    predict(going, drafts): logits [len(going), V] after the history and drafts (int64 [1] each) of the rows `going`,
    which all have equally many drafts so far. A row drafts no further where no token can be chosen from its logits.
    """
    drafts: list[list[Tensor]] = [[] for _ in rows]
    beliefs: list[list[Tensor]] = [[] for _ in rows]
    going = [i for i, count in enumerate(counts) if count > 0]
    while going:
        # One pass drafts the j-th token of all rows that still want one; rows leave when they have theirs, or fail.
        logits = predict(going, drafts)
        z = sampling.process(logits, _seen(rows, drafts, going) if sampling.of_history else [])
        if failed := {*unusable(logits), *unusable(z)}:
            fine = [place for place in range(len(going)) if place not in failed]
            going, z = [going[place] for place in fine], z[fine]
        chosen = sampling.choose(z, [rows[i].sequence.generator for i in going])
        for place, i in enumerate(going):
            drafts[i].append(chosen[place : place + 1])
            if sampling.temperature != 0:
                beliefs[i].append(z[place].softmax(-1))
        going = [i for i in going if len(drafts[i]) < counts[i]]
    return [
        Proposal(torch.cat(ids), torch.stack(q) if q else None) if ids else nothing()
        for ids, q in zip(drafts, beliefs, strict=True)
    ]


def _seen(rows: Sequence[DraftRow], drafts: Sequence[Sequence[Tensor]], going: Sequence[int]) -> list[Seen]:
    """What stands before the next draft of each row in `going`."""
    return [rows[i].seen([int(draft) for draft in drafts[i]]) for i in going]
