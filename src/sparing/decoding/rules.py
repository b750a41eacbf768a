"""What changes logits before a token is chosen from them, by the tokens that stand before it.

Order and formulas are those of transformers' logits processors (`_get_logits_processor`), presence and frequency
penalties those of vLLM and OpenAI: after the repetition penalty, over generated tokens alone.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sparing.config.generation import check_setting

__all__ = ["Rules", "Seen"]

# Those that look at nothing but the id, and so make sense for a place of a canvas, too.
OF_AN_ID = ("refused", "eos_ids", "suppress_tokens", "bad_words_ids", "sequence_bias")


@dataclass
class Seen:
    """What stands before the position whose logits are changed.

    ids: of the row as far as they are known, oldest first; new: how many of them, the last ones, were generated;
    before: how many tokens of the row precede the known ones; limit: most new tokens of the row.
    """

    ids: Sequence[int]
    new: int = 0
    before: int = 0
    limit: int | None = None

    @property
    def given(self) -> Sequence[int]:
        return self.ids[: len(self.ids) - self.new]

    @property
    def length(self) -> int:
        return self.before + len(self.ids)


@dataclass(frozen=True, kw_only=True)
class Rules:
    """Settings of `generation_config.json` and of `sparing.generate` that change logits; the defaults change nothing.

    repetition_penalty: divides positive and multiplies negative logits of tokens already there;
    encoder_repetition_penalty: the other way around, of those in the prompt; frequency_penalty, presence_penalty: taken
    off a token's logit for each time it was generated, and once if it was; no_repeat_ngram_size,
    encoder_no_repeat_ngram_size: no n tokens in a row stand in the text twice, or are those of the prompt again;
    sequence_bias: ((ids, bias), ...), added to the logit of the last id where the others precede it; bad_words_ids:
    sequences that are never completed; suppress_tokens, begin_suppress_tokens: ids that are never chosen, or never
    first; min_new_tokens, min_length: the least new tokens, and tokens in all, before an end; forced_bos_token_id,
    forced_eos_token_id: the only choice after a prompt of one token, and at the limit;
    exponential_decay_length_penalty: (start, factor), raises the logits of `eos_ids` ever more after `start` new ones.
    refused: ids that no text may hold; eos_ids: those that end it.
    Raises ValueError for values of another type or out of range.
    """

    repetition_penalty: float = 1.0
    encoder_repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    encoder_no_repeat_ngram_size: int = 0
    sequence_bias: Any = ()
    bad_words_ids: Any = ()
    suppress_tokens: Any = ()
    begin_suppress_tokens: Any = ()
    min_new_tokens: int = 0
    min_length: int = 0
    forced_bos_token_id: Any = ()
    forced_eos_token_id: Any = ()
    exponential_decay_length_penalty: Any = None
    refused: tuple[int, ...] = ()
    eos_ids: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        for name in Rules.__dataclass_fields__:
            value = getattr(self, name)
            if name not in ("refused", "eos_ids") and value is not None:
                object.__setattr__(self, name, check_setting(name, value))

    @cached_property
    def of_history(self) -> list[str]:
        """Names of the settings that are on and look at what stands before a position."""
        fields = Rules.__dataclass_fields__
        found = [n for n in fields if n not in OF_AN_ID and getattr(self, n) != fields[n].default]
        for name, sequences in (("bad_words_ids", self._words), ("sequence_bias", [s for s, _ in self.sequence_bias])):
            if any(len(sequence) > 1 for sequence in sequences):
                found.append(name)
        return found

    @cached_property
    def changes(self) -> bool:
        """Whether any logit may change."""
        return bool(self.refused or self.suppress_tokens or self._words or self.sequence_bias or self.of_history)

    @property
    def _words(self) -> list[tuple[int, ...]]:
        """Sequences that are never completed. The end of the text cannot be one of them."""
        return [word for word in self.bad_words_ids if len(word) > 1 or word[0] not in self.eos_ids]

    def check_ids(self, vocab_size: int) -> None:
        """Raises ValueError for ids beyond the vocabulary, except those that are only to be left out."""
        named = [("bad_words_ids", word) for word in self.bad_words_ids]
        named += [("sequence_bias", sequence) for sequence, _ in self.sequence_bias]
        named += [(name, getattr(self, name)) for name in ("forced_bos_token_id", "forced_eos_token_id")]
        for name, ids in named:
            if ids and max(ids) >= vocab_size:
                raise ValueError(f"{name} holds {max(ids)}: the vocabulary has {vocab_size} entries")

    def apply(self, logits: Tensor, seen: Sequence[Seen]) -> Tensor:
        """Changed logits. logits: float32 [rows, V], which stay as they are; seen: one per row, or none of them where
        `of_history` is empty."""
        logits = logits.clone()
        _add(logits, {ids[0]: bias for ids, bias in self.sequence_bias if len(ids) == 1})
        for row, known in zip(logits, seen, strict=False):
            self._by_history(row, known)
        _forbid(logits, [word[0] for word in self._words if len(word) == 1])
        for row, known in zip(logits, seen, strict=False):
            self._force(row, known)
        _forbid(logits, [*self.suppress_tokens, *self.refused])
        first = 1 if self.forced_bos_token_id else 0
        for row, known in zip(logits, seen, strict=False):
            if known.new == (first if known.length - known.new == 1 else 0):
                _forbid(row, self.begin_suppress_tokens)
        return logits

    def of_ids(self, vocab_size: int, device: torch.device) -> Tensor | None:
        """float32 [V] to add to any position's logits, by what looks at the id alone. None: nothing to add."""
        if not self.changes:
            return None
        return self.apply(torch.zeros(1, vocab_size, device=device), [])[0]

    def _by_history(self, row: Tensor, known: Seen) -> None:
        """Biases, penalties and n-grams, in place. row: [V]."""
        _add(row, _completed(((s, bias) for s, bias in self.sequence_bias if len(s) > 1), known.ids))
        if self.encoder_repetition_penalty != 1.0:
            _scale(row, set(known.given), 1.0 / self.encoder_repetition_penalty)
        if self.repetition_penalty != 1.0:
            _scale(row, set(known.ids), self.repetition_penalty)
        if self.frequency_penalty or self.presence_penalty:
            counts = Counter(known.ids[len(known.ids) - known.new :])
            _add(row, {i: -(n * self.frequency_penalty + self.presence_penalty) for i, n in counts.items()})
        for size, source in (
            (self.no_repeat_ngram_size, known.ids),
            (self.encoder_no_repeat_ngram_size, known.given),
        ):
            _forbid(row, _successors(known.ids, size, source) if size else ())
        words = ((word, 0.0) for word in self._words if len(word) > 1)
        _forbid(row, list(_completed(words, known.ids)))
        if known.length < self.min_length or known.new < self.min_new_tokens:
            _forbid(row, self.eos_ids)

    def _force(self, row: Tensor, known: Seen) -> None:
        """The only choice, and the pull towards the end, in place."""
        if self.forced_bos_token_id and known.length == 1:
            _only(row, self.forced_bos_token_id)
        if self.forced_eos_token_id and known.limit is not None and known.new == known.limit - 1:
            _only(row, self.forced_eos_token_id)
        if self.exponential_decay_length_penalty is not None and self.eos_ids:
            start, factor = self.exponential_decay_length_penalty
            if (beyond := known.new - start) > 0:
                try:
                    growth = min(factor**beyond, 1e30)
                except OverflowError:
                    growth = 1e30
                at = _index(row, self.eos_ids)
                pull = row[at].abs() * (growth - 1.0)
                row[at] += pull.masked_fill(~row[at].isfinite(), 0.0)


def _successors(ids: Sequence[int], size: int, source: Sequence[int]) -> list[int]:
    """What follows the last size - 1 ids wherever they stand in `source`."""
    if len(ids) < size - 1:
        return []
    suffix = list(ids[len(ids) - size + 1 :])
    last = len(source) - size + 1
    return [source[at + size - 1] for at in range(last) if source[at : at + size - 1] == suffix]


def _completed(sequences: Any, ids: Sequence[int]) -> dict[int, float]:
    """Last id -> sum of the values, of the (sequence, value) whose other ids are the newest ones."""
    found: dict[int, float] = {}
    for sequence, value in sequences:
        rest = list(sequence[:-1])
        if len(rest) <= len(ids) and list(ids[len(ids) - len(rest) :]) == rest:
            found[sequence[-1]] = found.get(sequence[-1], 0.0) + value
    return found


def _index(scores: Tensor, ids: Collection[int]) -> Tensor:
    """Those ids that there are logits of."""
    return torch.tensor([i for i in ids if i < scores.shape[-1]], dtype=torch.int64, device=scores.device)


def _change(scores: Tensor, ids: Collection[int], change: Callable[[Tensor], Tensor]) -> None:
    """scores: [V] or [rows, V], in place."""
    if ids:
        at = _index(scores, ids)
        scores[..., at] = change(scores[..., at])


def _add(scores: Tensor, biases: dict[int, float]) -> None:
    if biases:
        scores[..., list(biases)] += torch.tensor(list(biases.values()), device=scores.device)


def _forbid(scores: Tensor, ids: Collection[int]) -> None:
    _change(scores, ids, lambda values: torch.full_like(values, -math.inf))


def _scale(scores: Tensor, ids: Collection[int], penalty: float) -> None:
    _change(scores, ids, lambda values: torch.where(values < 0, values * penalty, values / penalty))


def _only(row: Tensor, ids: Collection[int]) -> None:
    row.fill_(-math.inf)
    _change(row, ids, torch.zeros_like)
