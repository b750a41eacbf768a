"""Speculative decoding: guess several tokens, check them all in one pass, keep those that plain decoding would give.

A round: a drafter proposes up to m tokens after the newest one; the target runs over the newest token and the drafts
at once, staged, not committed; drafts are accepted from the left; the memory commits what became output. One token of
the target's own always follows the accepted ones, so a round never yields less than a plain step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from sparing.decoding.draft_length import Acceptance, DraftCost, best_length
from sparing.decoding.drafting import Drafter, DraftRow, Proposal, nothing
from sparing.decoding.events import Commit, Done, Draft, Event
from sparing.decoding.faults import refuse
from sparing.decoding.outputs import Outputs, Pending
from sparing.decoding.row import ActiveRow
from sparing.decoding.rules import Seen
from sparing.decoding.sampling import Sampling
from sparing.decoding.stepper import Stepper
from sparing.models.base import LanguageModel

__all__ = ["Speculation", "SpeculativeStepper", "verify_greedy", "verify_sample"]


def verify_greedy(drafts: Tensor, logits: Tensor) -> tuple[int, int]:
    """How many drafts the most likely tokens confirm, and the token that follows them.

    drafts: int [m]; logits: [m + 1, V], row j after the first j drafts. Returns (accepted, next id).
    Raises ValueError for other shapes. Source: Leviathan et al. 2023; the limit of `verify_sample` at temperature 0.
    """
    drafts = torch.as_tensor(drafts, device=logits.device)
    _check_shapes(drafts, logits=(logits, 1))
    best, guessed = logits.argmax(-1).tolist(), drafts.tolist()
    accepted = next((j for j, (a, b) in enumerate(zip(guessed, best, strict=False)) if a != b), len(guessed))
    return accepted, best[accepted]


def verify_sample(drafts: Tensor, q: Tensor | None, p: Tensor, u: Tensor) -> tuple[int, int]:
    """How many sampled drafts to keep, and the next token: together distributed exactly as samples from p.

    drafts: int [m]; q: [m, V] probabilities each was drawn from, None where it was certain; p: [m + 1, V] the target's
    probabilities after the first j drafts, processed as q was; u: [m + 1] uniform numbers in [0, 1).
    Draft d is accepted with probability min(1, p(d) / q(d)). After the first rejection the next token comes from
    max(p - q, 0), normalised; after none, from the last row of p. Returns (accepted, next id).
    Raises ValueError for other shapes. Source: Leviathan et al. 2023, algorithm 1.
    """
    drafts, u = torch.as_tensor(drafts, device=p.device).long(), torch.as_tensor(u, device=p.device)
    _check_shapes(drafts, p=(p, 1), **({} if q is None else {"q": (q, 0)}))
    if u.shape != p.shape[:1]:
        raise ValueError(f"u has shape {list(u.shape)}: {len(drafts)} drafts take [{len(p)}] uniform numbers")
    likely = p[:-1].gather(-1, drafts[:, None])[:, 0]
    believed = 1.0 if q is None else q.gather(-1, drafts[:, None])[:, 0]
    # u < p / q, without dividing by a q that may be 0; the product counts up to the first rejection.
    accepted = int((u[:-1] * believed < likely).cumprod(0).sum())
    rest = p[accepted].double()
    if accepted < len(drafts):
        rest = rest.index_fill(0, drafts[accepted], 0.0) if q is None else (rest - q[accepted]).clamp_min(0.0)
        if not rest.any():  # p and q are equal apart from rounding
            rest = p[accepted].double()
    # A draw by the inverse of the cumulated weights, which need not sum to 1: u is scaled instead.
    upto = rest.cumsum(0)
    return accepted, int(torch.searchsorted(upto, u[-1:].double() * upto[-1], right=True).clamp(max=len(upto) - 1))


def _check_shapes(drafts: Tensor, **tables: tuple[Tensor, int]) -> None:
    """Raises ValueError unless drafts are [m] and each table [m + more, V]. tables: (tensor, more) by name."""
    if drafts.ndim != 1:
        raise ValueError(f"drafts have shape {list(drafts.shape)}: give a list of ids [m]")
    for name, (table, more) in tables.items():
        if table.ndim != 2 or len(table) != len(drafts) + more:
            rows = f"[{len(drafts) + more}, V]"
            raise ValueError(f"{name} has shape {list(table.shape)}: {len(drafts)} drafts take {rows}")


class Speculation:
    """What rows share that draft together: who drafts, how tokens are chosen, and what a draft was seen to cost.

    draft_tokens: most drafts a round; adaptive: fewer where more would not pay, by how many of the row's drafts were
    accepted and what a draft costs. The clock decides about cost only where it cannot change the output: greedy, in
    float32, and over memories that do not depend on how tokens are cut into commits. logprobs: report each token's
    log-probability under the unprocessed logits.
    """

    def __init__(
        self,
        model: LanguageModel,
        drafter: Drafter,
        sampling: Sampling,
        *,
        draft_tokens: int = 3,
        adaptive: bool = True,
        logprobs: bool = False,
    ) -> None:
        self.model, self.drafter, self.sampling = model, drafter, sampling
        self.draft_tokens, self.adaptive, self.logprobs = draft_tokens, adaptive, logprobs
        is_same = sampling.temperature == 0 and model.dtype == torch.float32  # output, whatever is drafted
        self.cost = DraftCost(drafter.cost, by_clock=is_same)
        self._timed: tuple[float, float] | None = None  # drafts a row, and when the round began

    def prepare(self, steppers: Sequence[SpeculativeStepper], *, alone: bool) -> None:
        """Draft for all rows without a draft, which those have that have not read their prompts, or whose pass failed.

        alone: nobody else shares the pass.
        """
        rows, began = [stepper for stepper in steppers if stepper.draft is None], time.perf_counter()
        if not rows:
            return
        counts = [stepper.count() for stepper in rows]
        drafts = self.drafter.propose([stepper.known for stepper in rows], counts, self.sampling)
        for stepper, draft in zip(rows, drafts, strict=True):
            stepper.draft = draft
        # In its first round a drafter reads the prompt, and a prompt beside a round takes time of its own.
        is_typical = alone and len(rows) == len(steppers) and all(stepper.rounds for stepper in rows)
        self._timed = (sum(len(draft.ids) for draft in drafts) / len(drafts), began) if is_typical else None

    def observe(self) -> None:
        """The pass of a round is over."""
        if self._timed is not None:
            drafts, began = self._timed
            self.cost.observe(drafts, time.perf_counter() - began)
            self._timed = None


class SpeculativeStepper(Stepper):
    """Gives per round a Draft, where something was drafted, and a Commit; then the row's Done.

    Raises ValueError where logits are not finite or leave no token to choose, once what came before is output.
    """

    def __init__(self, team: Speculation, row: ActiveRow) -> None:
        super().__init__(row, team)
        self.speculation, self.model = team, team.model
        self.known = DraftRow(row, [*row.context, *row.pending.tolist()], team.drafter.open(row))
        self.draft: Proposal | None = nothing()  # none where the prompt is read, None: to be made
        self.acceptance = Acceptance()
        self.rounds = self.proposed = self.accepted = 0
        team.cost.by_clock &= not row.memory.depends_on_cuts

    def count(self) -> int:
        """How many drafts to make: at most those that could still become output."""
        row, context = self.row, self.model.config.max_position_embeddings
        most = min(self.speculation.draft_tokens, row.transcript.remaining - 1, context - row.memory.length - 1)
        return (
            best_length(self.acceptance.rate, self.speculation.cost.per_draft, most)
            if self.speculation.adaptive
            else most
        )

    def wants(self) -> Pending:
        sampling, draft = self.speculation.sampling, self.draft
        assert draft is not None
        seen = self._seen(draft.ids.tolist()) if sampling.of_history else ()
        if self.row.is_prompt:
            return Pending(sampling=sampling, seen=seen, states=self.speculation.drafter.reads == "all")
        return Pending(len(draft.ids) + 1, sampling, seen, drafts=draft.ids)

    def _seen(self, drafts: list[int]) -> list[Seen]:
        """What stands before each of the m + 1 positions."""
        return [self.known.seen(drafts[:j]) for j in range(len(drafts) + 1)]

    def take(self, outputs: Outputs) -> Iterator[Event]:
        """Accepted drafts and the next token become output, up to an end among them.

        The memory then holds all output but its last token, as after plain decoding.
        """
        self.speculation.observe()
        row, draft, self.draft = self.row, self.draft, None
        assert draft is not None
        accepted, token = self._verdict(draft, outputs)
        ids, text = row.transcript.push([*draft.ids[:accepted].tolist(), token])
        if row.is_prompt:
            row.keep()
            self.known.hand_over(outputs.states, self.speculation.drafter.reads)
        else:
            if len(draft.ids):
                yield self._tried(draft.ids.tolist(), outputs.logits, min(accepted, len(ids)))
            # The round staged the pending token and m drafts. Of the len(ids) new ids the last is not in the memory (it
            # is pending next), but the pending one of before is: as many entries as ids.
            row.commit(len(ids))
            self.rounds += 1
            self.proposed += len(draft.ids)
            self.accepted += min(accepted, len(ids))
            self.acceptance.observe(len(draft.ids), accepted)
            self.known.hand_over(outputs.states[: len(ids)], self.speculation.drafter.reads)
        self.known.history += ids
        row.pending = torch.tensor(ids[-1:], device=outputs.logits.device)
        logprobs = None
        if self.speculation.logprobs:
            logprobs = outputs.logits[: len(ids)].log_softmax(-1)[range(len(ids)), ids].tolist()
        yield Commit(row.row, ids, text, logprobs, row.transcript.marks)
        if row.transcript.reason is not None or row.memory.length >= self.model.config.max_position_embeddings:
            self.finished = True
            yield self._done()

    def _tried(self, ids: list[int], logits: Tensor, used: int) -> Draft:
        """The event of a round's m drafts. logits: [m + 1, V], unprocessed; used: how many became output."""
        entropy = torch.special.entr(logits[:-1].softmax(-1)).sum(-1)
        return Draft(self.row.row, ids, [j < used for j in range(len(ids))], self.rounds + 1, entropy.tolist())

    def _done(self) -> Done:
        held = self.row.memory.nbytes + self.speculation.drafter.nbytes(self.known.state)
        return self.row.done(memory_bytes=held, rounds=self.rounds, proposed=self.proposed, accepted=self.accepted)

    def _verdict(self, draft: Proposal, outputs: Outputs) -> tuple[int, int]:
        """(accepted, next id). outputs: of the newest token and the drafts."""
        row, scores = self.row, outputs.scores
        accepted, token = _verify(draft, scores, self.speculation.sampling, row.generator)
        # Logits after a draft that is rejected choose nothing; what comes before a fault becomes output first.
        failed = next((j for j in outputs.unusable if j <= accepted), None)
        if failed is None:
            return accepted, token
        if failed > 0:
            return failed - 1, int(draft.ids[failed - 1])
        row.memory.rollback()
        raise refuse(self.model, row.row, row.pending, row.memory, outputs.logits[0], scores[0])


def _verify(draft: Proposal, scores: Tensor, sampling: Sampling, generator: torch.Generator) -> tuple[int, int]:
    """(accepted, next id) of one row. scores: [m + 1, V], processed."""
    if sampling.temperature == 0:
        return verify_greedy(draft.ids, scores)
    u = torch.rand(len(scores), generator=generator, dtype=torch.float64)
    return verify_sample(draft.ids, draft.probabilities, scores.softmax(-1), u)
