"""Who guesses the next tokens: look-up, a smaller model, and drafters made for one model (Gemma 4's, Nemotron 3's)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.decoding.drafting import Drafter, DraftRow, Proposal, Reads, chain, weight_bytes
from sparing.decoding.engine import PIECE, read
from sparing.decoding.row import ActiveRow
from sparing.decoding.sampling import Sampling
from sparing.memory.sequence import Memory
from sparing.models.base import LanguageModel
from sparing.models.batch import Row
from sparing.models.gemma4 import Gemma4
from sparing.models.gemma4_drafter import Gemma4Drafter
from sparing.models.loading import load_drafting_head

__all__ = ["GemmaDrafter", "MTPDrafter", "ModelDrafter", "NGramDrafter", "make_drafter"]


class NGramDrafter:
    """Proposes what followed the last time the row's newest tokens stood in it. No model, hardly any time.

    Source: prompt look-up decoding (Saxena 2023), here with the longest of several lengths and an index.
    """

    reads: Reads = "nothing"
    cost = 0.0
    sizes = (4, 3, 2)  # tokens that must match, the longest first

    def open(self, sequence: ActiveRow) -> dict[tuple[int, ...], int]:
        """n-gram -> where in the row's history its latest successor is; under (): how much has been entered."""
        return {(): 0}

    def nbytes(self, state: dict[tuple[int, ...], int]) -> int:
        return 0  # ids alone

    def propose(self, rows: Sequence[DraftRow], counts: Sequence[int], sampling: Sampling) -> list[Proposal]:
        found = [self._look_up(row.history, row.state, count) for row, count in zip(rows, counts, strict=True)]
        return [Proposal(torch.tensor(ids, dtype=torch.int64)) for ids in found]

    def _look_up(self, history: list[int], index: dict[tuple[int, ...], int], count: int) -> list[int]:
        for successor in range(max(index[()], 1), len(history)):
            for size in self.sizes:
                if successor >= size:
                    index[tuple(history[successor - size : successor])] = successor
        index[()] = len(history)
        found = (index.get(tuple(history[-size:])) for size in self.sizes if len(history) > size)
        at = next((place for place in found if place is not None), None)
        if at is None or count == 0:
            return []
        drafts: list[int] = []
        for place in range(at - len(history), at - len(history) + count):  # from the end
            drafts.append(history[place] if place < 0 else drafts[place])  # a row that repeats itself: its own drafts
        return drafts


class ModelDrafter:
    """A smaller model with a memory of its own. What it drafts is staged there and never committed."""

    reads: Reads = "nothing"

    def __init__(self, model: LanguageModel, target: LanguageModel):
        self.model, self.vocab_size = model, target.config.vocab_size
        self.cost = weight_bytes(model) / weight_bytes(target)
        if model.tokenizer is not None and target.tokenizer is not None:
            ours, theirs = model.tokenizer.backend.get_vocab(), target.tokenizer.backend.get_vocab()
            if ours != theirs:
                token = next(iter(sorted(dict(ours.items() ^ theirs.items()), key=lambda t: (len(t), t))))
                raise ValueError(
                    f"the drafter's tokenizer is another than the model's ({len(ours)} and {len(theirs)} tokens;"
                    f" {token!r} is {ours.get(token)} and {theirs.get(token)}): use a drafter of the same family"
                )
        elif model.config.vocab_size != self.vocab_size:
            raise ValueError(
                f"the drafter's vocabulary has {model.config.vocab_size} entries, the model's {self.vocab_size}:"
                " use a drafter of the same family"
            )

    def open(self, sequence: ActiveRow) -> ActiveRow:
        """The row as the drafter sees it."""
        memory = self.model.memory()
        return ActiveRow(sequence.row, sequence.pending, memory, sequence.transcript, sequence.generator)

    def nbytes(self, state: ActiveRow) -> int:
        return state.memory.nbytes

    def propose(self, rows: Sequence[DraftRow], counts: Sequence[int], sampling: Sampling) -> list[Proposal]:
        limit = self.model.config.max_position_embeddings
        counts = [min(n, max(0, limit - len(row.history) + 1)) for row, n in zip(rows, counts, strict=True)]

        def predict(going: Sequence[int], drafts: Sequence[Sequence[Tensor]]) -> Tensor:
            states: list[ActiveRow] = [rows[i].state for i in going]
            if not drafts[going[0]]:  # first what became certain since the last proposal
                for i, state in zip(going, states, strict=True):
                    known = torch.tensor(rows[i].history[state.memory.length :], device=self.model.device)
                    state.pending = known.clamp(max=self.model.config.vocab_size - 1)
                return self._fit(torch.cat(read(self.model, states, outputs=1)))
            tokens = [torch.cat(list(drafts[i])) for i in going]
            hidden = self.model.run(
                [Row(t, s.memory, 1, text_end=s.memory.length) for t, s in zip(tokens, states, strict=True)]
            )
            for state in states:
                state.memory.rollback()
            return self._fit(self.model.head(hidden))

        return chain(rows, counts, sampling, predict)

    def _fit(self, logits: Tensor) -> Tensor:
        """To the target's vocabulary: tables of one family differ in how far they are padded."""
        missing = max(0, self.vocab_size - logits.shape[-1])
        return F.pad(logits[..., : self.vocab_size], (0, missing), value=float("-inf"))


class GemmaDrafter:
    """A Gemma 4 drafter: it reads the target's own entries, and the state the target left at the newest of them."""

    reads: Reads = "last"

    def __init__(self, drafter: Gemma4Drafter, target: LanguageModel):
        if not isinstance(target, Gemma4):
            raise ValueError(f"the drafter reads the memory of a Gemma 4 model, this is a {target.config.model_type}")
        self.drafter, self.target = drafter, target
        self.sources = drafter.sources(target.config)
        self.cost = weight_bytes(drafter) / weight_bytes(target)

    def open(self, sequence: ActiveRow) -> None:
        """No state, but the target must not forget what the drafter sees and its own queries do not."""
        for source, window in zip(self.sources, self.drafter.windows, strict=True):
            if window is not None:
                sequence.memory.hold_at_least(source, window)

    def nbytes(self, state: None) -> int:
        return 0

    def propose(self, rows: Sequence[DraftRow], counts: Sequence[int], sampling: Sampling) -> list[Proposal]:
        # Row -> state for its next draft, [1, H].
        handed = {i: row.hidden for i, row in enumerate(rows) if row.hidden is not None}

        def predict(going: Sequence[int], drafts: Sequence[Sequence[Tensor]]) -> Tensor:
            newest = torch.cat([drafts[i][-1] if drafts[i] else rows[i].sequence.pending for i in going])
            hidden = torch.cat([handed[i] for i in going])
            memories = [rows[i].sequence.memory for i in going]
            embedded = self.target.model.embed_tokens(newest)
            logits, states = self.drafter.draft(newest, embedded, hidden, memories, self.sources)
            handed.update(zip(going, states.split(1), strict=True))
            return logits

        return chain(rows, counts, sampling, predict)


class MTPDrafter:
    """The target's own head for several tokens: entries of what is certain, made anew from the target's true states."""

    reads: Reads = "all"

    def __init__(self, target: LanguageModel):
        self.head = load_drafting_head(target)
        table = target.output_table()
        self.cost = (weight_bytes(self.head) + table.nbytes) / weight_bytes(target)

    def open(self, sequence: ActiveRow) -> Memory:
        """The head's memory. Entry i is of token i + 1, from where this run knows the target's states on."""
        return self.head.memory()

    def nbytes(self, state: Memory) -> int:
        return state.nbytes

    def propose(self, rows: Sequence[DraftRow], counts: Sequence[int], sampling: Sampling) -> list[Proposal]:
        chained: list[list[Tensor]] = [[] for _ in rows]  # [H] each, what stands in for the target's states

        def predict(going: Sequence[int], drafts: Sequence[Sequence[Tensor]]) -> Tensor:
            memories: list[Memory] = [rows[i].state for i in going]
            if drafts[going[0]]:
                tokens, hidden = [torch.cat(list(drafts[i])) for i in going], [torch.stack(chained[i]) for i in going]
                logits, states = self._run(tokens, hidden, memories)
                for memory in memories:
                    memory.rollback()
            else:
                logits, states = self._catch_up([rows[i] for i in going])
            for i, state in zip(going, states.unbind(), strict=True):
                chained[i].append(state)
            return logits

        return chain(rows, counts, sampling, predict)

    def _catch_up(self, rows: Sequence[DraftRow]) -> tuple[Tensor, Tensor]:
        """Commit entries of all that became certain since the last proposal."""
        hidden = [row.hidden for row in rows if row.hidden is not None]
        tokens = [
            torch.tensor(row.history[-len(states) :], device=states.device)
            for row, states in zip(rows, hidden, strict=True)
        ]
        memories = [row.state for row in rows]
        while any(len(ids) > PIECE for ids in tokens):
            for i, ids in enumerate(tokens):
                if len(ids) > PIECE:
                    self._run([ids[:PIECE]], [hidden[i][:PIECE]], [memories[i]])
                    memories[i].commit(PIECE)
                    tokens[i], hidden[i] = ids[PIECE:], hidden[i][PIECE:]
        outcome = self._run(tokens, hidden, memories)
        for row, memory, ids in zip(rows, memories, tokens, strict=True):
            memory.commit(len(ids))
            row.hidden = None
        return outcome

    def _run(
        self, tokens: Sequence[Tensor], hidden: Sequence[Tensor], memories: Sequence[Memory]
    ) -> tuple[Tensor, Tensor]:
        rows = [Row(ids, memory) for ids, memory in zip(tokens, memories, strict=True)]
        return self.head.run(rows, torch.cat(list(hidden)))


def make_drafter(model: LanguageModel, draft: object) -> Drafter:
    """The drafter for a target. draft: "ngram", "mtp", a smaller model of the same tokenizer, or a drafter made for it.

    Raises ValueError for anything else and for a drafter that does not fit the model.
    """
    if draft == "ngram":
        return NGramDrafter()
    if draft == "mtp":
        return MTPDrafter(model)
    if isinstance(draft, Gemma4Drafter):
        return GemmaDrafter(draft, model)
    if isinstance(draft, LanguageModel):
        return ModelDrafter(draft, model)
    raise ValueError(f"draft={draft!r} is no drafter, use 'ngram', 'mtp' or a model that sparing.load returned")
