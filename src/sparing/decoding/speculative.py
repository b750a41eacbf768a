"""Speculative decoding: guess several tokens, check them all in one pass, keep those that plain decoding would give.

A round: a drafter proposes up to m tokens after the newest one; the target runs over the newest token and the drafts
at once, staged, not committed; drafts are accepted from the left; the memory commits what became output. One token of
the target's own always follows the accepted ones, so a round never yields less than a plain step.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sparing.decoding.draft_length import Acceptance, DraftCost, best_length
from sparing.decoding.drafting import Drafter, DraftRow, Proposal, Reads, nothing
from sparing.decoding.events import Commit, Done, Draft, Event
from sparing.decoding.faults import refuse
from sparing.decoding.row import ActiveRow, stage
from sparing.decoding.rules import Seen
from sparing.decoding.sampling import Sampling, unusable
from sparing.models.base import LanguageModel
from sparing.models.batch import Row

__all__ = ["speculative", "verify_greedy", "verify_sample"]


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


@dataclass
class SpeculatingRow(DraftRow):
    """A row with what was counted of it."""

    acceptance: Acceptance = field(default_factory=Acceptance)
    rounds: int = 0
    proposed: int = 0
    accepted: int = 0

    def most(self, draft_tokens: int, context: int) -> int:
        """How many drafts could still become output."""
        sequence = self.sequence
        return min(draft_tokens, sequence.transcript.remaining - 1, context - sequence.memory.length - 1)

    def done(self, drafter: Drafter) -> Done:
        held = self.sequence.memory.nbytes + drafter.nbytes(self.state)
        return self.sequence.done(memory_bytes=held, rounds=self.rounds, proposed=self.proposed, accepted=self.accepted)


@torch.inference_mode()
def speculative(
    model: LanguageModel,
    sequences: Sequence[ActiveRow],
    sampling: Sampling,
    drafter: Drafter,
    *,
    draft_tokens: int = 3,
    adaptive: bool = True,
    logprobs: bool = False,
) -> Iterator[Event]:
    """Yield per row and round a Draft, where something was drafted, and a Commit; then the row's Done.

    draft_tokens: most drafts a round; adaptive: fewer where more would not pay, by how many of the row's drafts were
    accepted and what a draft costs. The clock decides about cost only where it cannot change the output: greedy, in
    float32, and over memories that do not depend on how tokens are cut into commits. logprobs: as in `autoregressive`.
    """
    active = [SpeculatingRow(s, [*s.context, *s.pending.tolist()], drafter.open(s)) for s in sequences]
    is_same = sampling.temperature == 0 and model.dtype == torch.float32  # output, whatever is drafted
    cost = DraftCost(drafter.cost, by_clock=is_same and not any(row.sequence.memory.depends_on_cuts for row in active))
    context = model.config.max_position_embeddings
    drafts = [nothing() for _ in active]
    hidden = _prompts(model, active, drafter.reads)  # [rows, H]
    began = 0.0
    while True:
        sizes = [len(draft.ids) + 1 for draft in drafts]
        logits, verdicts = _judge(model, active, drafts, hidden, sampling)
        events: list[Event] = []
        remaining = []
        of_rows = logits.split_with_sizes(sizes), hidden.split_with_sizes(sizes)
        parts = zip(active, drafts, verdicts, *of_rows, strict=True)
        for row, draft, verdict, scores, states in parts:
            ids, row_events = _take(row, draft, verdict, scores, logprobs=logprobs)
            events += row_events
            if row.rounds:  # those of the prompt are handed over already
                row.hand_over(states[: len(ids)], drafter.reads)
            if row.sequence.transcript.reason is not None or row.sequence.memory.length >= context:
                events.append(row.done(drafter))
            else:
                remaining.append(row)
        if max(row.rounds for row in active) > 1:  # in the first round a drafter reads the prompt
            cost.observe((sum(sizes) - len(sizes)) / len(sizes), time.perf_counter() - began)
        yield from events
        if not (active := remaining):
            return
        began = time.perf_counter()
        counts = [row.most(draft_tokens, context) for row in active]
        if adaptive:
            counts = [
                best_length(row.acceptance.rate, cost.per_draft, n) for row, n in zip(active, counts, strict=True)
            ]
        drafts = drafter.propose(active, counts, sampling)
        hidden = model.run(
            [
                Row(
                    torch.cat([row.sequence.pending, draft.ids.to(hidden.device)]),
                    row.sequence.memory,
                    text_end=row.sequence.memory.length,  # what is drafted is no given text
                )
                for row, draft in zip(active, drafts, strict=True)
            ]
        )


def _prompts(model: LanguageModel, rows: Sequence[DraftRow], reads: Reads) -> Tensor:
    """Stage all prompts and hand their hidden states over; returns those of their last ids, [rows, H]."""
    sequences = [row.sequence for row in rows]
    if reads != "all":
        hidden = stage(model, sequences, wanted=1)
        for row, states in zip(rows, hidden.split(1), strict=True):
            row.hand_over(states, reads)
        return hidden
    chunks: list[list[Tensor]] = [[] for _ in rows]
    lengths = [len(s.pending) for s in sequences]
    hidden = stage(model, sequences, wanted=None, chunks=chunks)
    rest = [length - sum(map(len, before)) for length, before in zip(lengths, chunks, strict=True)]
    for row, before, states in zip(rows, chunks, hidden.split(rest), strict=True):
        row.hand_over(torch.cat([*before, states]), reads)
    return hidden[torch.tensor(rest).cumsum(0) - 1]


def _judge(
    model: LanguageModel,
    rows: Sequence[DraftRow],
    drafts: Sequence[Proposal],
    hidden: Tensor,
    sampling: Sampling,
) -> tuple[Tensor, list[tuple[int, int]]]:
    """(logits [sum of m + 1, V], (accepted, next id) of each row). If anything raises, all that is staged is forgotten.

    hidden: [sum of m + 1, H] of each row's newest token and drafts.
    """
    try:
        logits = model.head(hidden)
        z = sampling.process(logits, _seen(rows, drafts) if sampling.of_history else [])
        bad = {*unusable(logits), *(unusable(z) if z is not logits else ())}
        verdicts, fault, start = [], None, 0
        for row, draft in zip(rows, drafts, strict=True):
            scores = z[start : start + len(draft.ids) + 1]
            verdict = _verify(row, draft, scores, sampling)
            # Logits after a draft that is rejected choose nothing; what comes before a fault becomes output first.
            failed = next((j for j in range(verdict[0] + 1) if start + j in bad), None)
            if failed == 0:
                fault = fault or (row.sequence, start)
            verdicts.append((failed - 1, int(draft.ids[failed - 1])) if failed else verdict)
            start += len(scores)
    except BaseException:
        _roll_back(rows)
        raise
    if fault is not None:
        _roll_back(rows)
        s, at = fault
        raise refuse(model, s.row, s.pending, s.memory, logits[at], z[at])
    return logits, verdicts


def _roll_back(rows: Sequence[DraftRow]) -> None:
    for row in rows:
        row.sequence.memory.rollback()


def _verify(row: DraftRow, draft: Proposal, scores: Tensor, sampling: Sampling) -> tuple[int, int]:
    """(accepted, next id) of one row. scores: [m + 1, V], processed."""
    if sampling.temperature == 0:
        return verify_greedy(draft.ids, scores)
    u = torch.rand(len(scores), generator=row.sequence.generator, dtype=torch.float64)
    return verify_sample(draft.ids, draft.probabilities, scores.softmax(-1), u)


def _seen(rows: Sequence[DraftRow], drafts: Sequence[Proposal]) -> list[Seen]:
    """What stands before each of the m + 1 positions of each row."""
    found = []
    for row, draft in zip(rows, drafts, strict=True):
        ids = draft.ids.tolist()
        found += [row.seen(ids[:j]) for j in range(len(ids) + 1)]
    return found


def _take(
    row: SpeculatingRow, draft: Proposal, verdict: tuple[int, int], logits: Tensor, *, logprobs: bool
) -> tuple[list[int], list[Event]]:
    """Make the accepted drafts and the next token output, up to an end among them: (new output, events).

    logits: [m + 1, V], unprocessed. The memory then holds all output but its last token, as after plain decoding.
    """
    s, (accepted, token) = row.sequence, verdict
    ids, text = s.transcript.push([*draft.ids[:accepted].tolist(), token])
    row.history += ids
    events: list[Event] = []
    if s.is_prompt:
        s.keep(len(s.pending))
    else:
        # The round staged the pending token and m drafts. Of the len(ids) new ids the last is not in the memory (it is
        # pending next), but the pending one of before is: as many entries as ids.
        s.memory.commit(len(ids))
        s.forwards += 1
        used = min(accepted, len(ids))
        row.rounds, row.proposed, row.accepted = row.rounds + 1, row.proposed + len(draft.ids), row.accepted + used
        row.acceptance.observe(len(draft.ids), accepted)
        if len(draft.ids):
            kept = [j < used for j in range(len(draft.ids))]
            entropy = torch.special.entr(logits[:-1].softmax(-1)).sum(-1)
            events.append(Draft(s.row, draft.ids.tolist(), kept, row.rounds, entropy.tolist()))
    scores = None
    if logprobs:
        scores = logits[: len(ids)].log_softmax(-1)[range(len(ids)), ids].tolist()
    s.pending = torch.tensor(ids[-1:], device=logits.device)
    return ids, [*events, Commit(s.row, ids, text, scores, s.transcript.marks)]
