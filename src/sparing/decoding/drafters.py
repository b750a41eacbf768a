"""Who guesses the next tokens: what a drafter offers, look-up and small models, and drafters made for one model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.decoding.autoregressive import ActiveRow, encode
from sparing.decoding.sampling import Sampling
from sparing.memory.attention import AttentionMemory
from sparing.memory.batch import Row
from sparing.models.base import LanguageModel
from sparing.models.gemma4 import Gemma4
from sparing.models.gemma4_drafter import Gemma4Drafter

__all__ = ["DraftRow", "Drafter", "ModelDrafter", "NGramDrafter", "Proposal", "make_drafter", "nothing"]

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


class Drafter(Protocol):
    """reads: which hidden states of the target it is handed, of the newest position or of all since its last proposal;
    cost: of one draft, in passes of the target over one token, as far as weights tell."""

    reads: Reads
    cost: float

    def open(self, sequence: ActiveRow) -> Any:
        """The drafter's own state of a new row."""
        ...

    def propose(self, rows: Sequence[DraftRow], counts: Sequence[int], sampling: Sampling) -> list[Proposal]:
        """At most counts[i] drafts of what follows rows[i].history; random ones draw from the row's generator.

        A row's drafts do not depend on the other rows.
        """
        ...


def nothing() -> Proposal:
    """No drafts."""
    return Proposal(torch.empty(0, dtype=torch.int64))


def make_drafter(model: LanguageModel, draft: Any) -> Drafter:
    """The drafter for a target. draft: "ngram", a smaller model of the same tokenizer, or the target's own drafter.

    Raises ValueError for anything else and for a drafter that does not fit the model.
    """
    if draft == "ngram":
        return NGramDrafter()
    if isinstance(draft, Gemma4Drafter):
        return GemmaDrafter(draft, model)
    if isinstance(draft, LanguageModel):
        return ModelDrafter(draft, model)
    raise ValueError(f"draft={draft!r} is no drafter, use 'ngram' or a model that sparing.load returned")


def weight_bytes(model: torch.nn.Module) -> int:
    """Bytes a pass over one token reads at most: all weights but tables that are only looked up."""
    return sum(p.nbytes for name, p in model.named_parameters() if "embed_tokens_per_layer" not in name)


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
        text = list(history)
        for place in range(at, at + count):  # may run into its own drafts: a row that repeats itself
            text.append(text[place])
        return text[len(history) :]


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

    def propose(self, rows: Sequence[DraftRow], counts: Sequence[int], sampling: Sampling) -> list[Proposal]:
        limit = self.model.config.max_position_embeddings
        counts = [min(n, max(0, limit - len(row.history) + 1)) for row, n in zip(rows, counts, strict=True)]

        def predict(going: Sequence[int], drafts: Sequence[Sequence[Tensor]]) -> Tensor:
            states: list[ActiveRow] = [rows[i].state for i in going]
            if not drafts[going[0]]:  # first what became certain since the last proposal
                for i, state in zip(going, states, strict=True):
                    known = torch.tensor(rows[i].history[state.memory.length :], device=self.model.device)
                    state.pending = known.clamp(max=self.model.config.vocab_size - 1)
                return self._fit(self.model.head(encode(self.model, states, wanted=1)))
            tokens = [torch.cat(list(drafts[i])) for i in going]
            hidden = self.model.run([Row(t, s.memory, wanted=1) for t, s in zip(tokens, states, strict=True)])
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
            layer = sequence.memory.layers[source]
            if window is not None and isinstance(layer, AttentionMemory):
                layer.hold_at_least(window)

    def propose(self, rows: Sequence[DraftRow], counts: Sequence[int], sampling: Sampling) -> list[Proposal]:
        # Row -> state for its next draft, [1, H].
        handed = {i: row.hidden for i, row in enumerate(rows) if row.hidden is not None}

        def predict(going: Sequence[int], drafts: Sequence[Sequence[Tensor]]) -> Tensor:
            newest = torch.cat([drafts[i][-1] if drafts[i] else rows[i].sequence.pending for i in going])
            hidden = torch.cat([handed[i] for i in going])
            memories = [rows[i].sequence.memory for i in going]
            embedded = self.target.model.embed(newest)
            logits, states = self.drafter.draft(newest, embedded, hidden, memories, self.sources)
            handed.update(zip(going, states.split(1), strict=True))
            return logits

        return chain(rows, counts, sampling, predict)


def chain(
    rows: Sequence[DraftRow],
    counts: Sequence[int],
    sampling: Sampling,
    predict: Callable[[Sequence[int], Sequence[Sequence[Tensor]]], Tensor],
) -> list[Proposal]:
    """Draft one token after the other, each chosen as the target would choose from the drafter's logits.

    predict(going, drafts): logits [len(going), V] after the history and drafts (int64 [1] each) of the rows `going`,
    which all have equally many drafts so far.
    """
    drafts: list[list[Tensor]] = [[] for _ in rows]
    beliefs: list[list[Tensor]] = [[] for _ in rows]
    for step in range(max(counts)):
        going = [i for i, count in enumerate(counts) if count > step]
        logits = predict(going, drafts)
        seen = [
            torch.cat([torch.tensor(rows[i].history, device=logits.device), *drafts[i]])
            for i in (going if sampling.repetition_penalty != 1.0 else ())
        ]
        z = sampling.process(logits, seen)
        chosen = sampling.choose(z, [rows[i].sequence.generator for i in going])
        for place, i in enumerate(going):
            drafts[i].append(chosen[place : place + 1])
            if sampling.temperature != 0:
                beliefs[i].append(z[place].softmax(-1))
    return [
        Proposal(torch.cat(ids), torch.stack(q) if q else None) if ids else nothing()
        for ids, q in zip(drafts, beliefs, strict=True)
    ]
