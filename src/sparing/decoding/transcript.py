"""The output of one row: ids, text, and when to stop."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from sparing.checkpoint.tokenizer import TextStream, Tokenizer

__all__ = ["Transcript"]


class Transcript:
    """Collects new ids until an end id, a stop string or the limit.

    Text that may be the start of a stop string is held back until it is known not to be; the stop string itself is
    never part of the text. after: ids of a text that this one continues.
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
        self._eos = frozenset(eos_ids)
        self._stop_ids = frozenset(s for s in stop if isinstance(s, int))
        self._stop_strings = [s for s in stop if isinstance(s, str)]
        if self._stop_strings and tokenizer is None:
            raise ValueError(
                f"stop={self._stop_strings[0]!r} is a string, but the model has no tokenizer: use token ids"
            )
        if "" in self._stop_strings:
            raise ValueError("stop holds an empty string, which would end every answer at once")
        self._limit = max_new_tokens
        self._stream = None if tokenizer is None else TextStream(tokenizer, after=after)
        self._held = ""

    @property
    def remaining(self) -> int:
        """How many more ids it takes at most."""
        return self._limit - len(self.ids)

    def push(self, ids: Sequence[int]) -> tuple[list[int], str]:
        """Take ids in order until one of them ends the row; returns (ids taken, text that became final)."""
        taken: list[int] = []
        text = ""
        for token in ids:
            if self.reason is not None:
                break
            taken.append(token)
            self.ids.append(token)
            if token in self._eos:
                self.reason = "eos"
            elif token in self._stop_ids:
                self.reason = "stop"
            else:
                text += self._extend(token)
            if self.reason is None and len(self.ids) >= self._limit:
                self.reason = "length"
        if self.reason is not None and self._stream is not None:
            text += self._finish()
        return taken, text

    def _extend(self, token: int) -> str:
        if self._stream is None:
            return ""
        self._held += self._stream.push([token])
        at = [i for s in self._stop_strings if (i := self._held.find(s)) >= 0]
        if at:
            self.reason = "stop"
            final, self._held = self._held[: min(at)], ""
            self._stream = None
            return final
        keep = max(
            (n for s in self._stop_strings for n in range(1, len(s)) if self._held.endswith(s[:n])),
            default=0,
        )
        cut = len(self._held) - keep
        final, self._held = self._held[:cut], self._held[cut:]
        return final

    def _finish(self) -> str:
        assert self._stream is not None
        text, self._held = self._held + self._stream.flush(), ""
        self._stream = None
        return text
