"""The output of one row: ids, text, and when to stop."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence

from sparing.decoding.stops import Stop, Symbol, written_out
from sparing.decoding.tokenizer import TextStream, Tokenizer

__all__ = ["Transcript"]


class Transcript:
    """Collects new ids until an end id, a stop string or the limit.

    Text that may be the start of a stop string is held back until it is known not to be; the stop string itself is
    never part of the text. Special tokens are not part of the text either, but stop strings are found in them.
    after: ids of a text that this one continues.
    marks: the special tokens within the text of the last push, each as (offset in that text, its own text).
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        eos_ids: Collection[int],
        stop: Sequence[str | int],
        max_new_tokens: int,
        after: Sequence[int] = (),
    ):
        self.ids: list[int] = []
        self.reason: str | None = None
        self.marks: list[tuple[int, str]] = []
        self._eos = frozenset(eos_ids)
        self._stop_ids = frozenset(s for s in stop if isinstance(s, int))
        self._limit = max_new_tokens
        self._tokenizer = tokenizer
        self._stream = None if tokenizer is None else TextStream(tokenizer, after=after)
        self._waiting: list[Symbol] = []  # what may be the start of a stop string
        self._first = 0  # the place of the first of them
        strings = [s for s in stop if isinstance(s, str)]
        if strings and tokenizer is None:
            raise ValueError(f"stop={strings[0]!r} is a string, but the model has no tokenizer: use token ids")
        if "" in strings:
            raise ValueError("stop holds an empty string, which would end every answer at once")
        self._stops = [Stop(text, marked=marked) for text in strings for marked in (False, True)]

    @property
    def remaining(self) -> int:
        """How many more ids it takes at most."""
        return self._limit - len(self.ids)

    def push(self, ids: Sequence[int]) -> tuple[list[int], str]:
        """Take ids in order until one of them ends the row; returns (ids taken, text that became final)."""
        taken: list[int] = []
        final: list[Symbol] = []
        for token in ids:
            if self.reason is not None:
                break
            taken.append(token)
            self.ids.append(token)
            final += self._take(token)
            if self.reason is None and len(self.ids) >= self._limit:
                self.reason = "length"
                final += self._rest()
        return taken, self._text(final)

    def _take(self, token: int) -> list[Symbol]:
        """What becomes final with a token."""
        ends = token in self._eos or token in self._stop_ids
        if self._stream is None or self._tokenizer is None:
            if ends:
                self.reason = "eos" if token in self._eos else "stop"
            return []
        is_text = not ends and token not in self._tokenizer.special_ids
        before = self._first + len(self._waiting)
        written = self._stream.push([token]) if is_text else written_out(self._tokenizer.id_to_token(token) or "")
        found = self._match(written)
        if found is not None:
            self.reason = "eos" if token in self._eos and found >= before else "stop"
            self._stream = None
            return self._waiting[: found - self._first]
        if ends:
            self.reason = "eos" if token in self._eos else "stop"
            del self._waiting[before - self._first :]
            return self._rest()
        begun = [place for stop in self._stops if (place := stop.begun) is not None]
        return self._release(min(begun, default=self._first + len(self._waiting)))

    def _match(self, symbols: Iterable[Symbol]) -> int | None:
        """Look for stop strings in what is new; the place where the first of them begins."""
        starts = []
        for symbol in symbols:
            place = self._first + len(self._waiting)
            self._waiting.append(symbol)
            starts += [at for stop in self._stops if (at := stop.push(symbol, place)) is not None]
        return min(starts, default=None)

    def _release(self, place: int) -> list[Symbol]:
        final = self._waiting[: place - self._first]
        self._waiting, self._first = self._waiting[place - self._first :], place
        return final

    def _rest(self) -> list[Symbol]:
        rest = self._waiting if self._stream is None else [*self._waiting, *self._stream.flush()]
        self._waiting, self._stream = [], None
        return rest

    def _text(self, symbols: list[Symbol]) -> str:
        text, self.marks = [], []
        for symbol in symbols:
            if isinstance(symbol, str):
                text.append(symbol)
            elif symbol.whole is not None:
                self.marks.append((len(text), symbol.whole))
        return "".join(text)
