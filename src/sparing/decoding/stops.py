"""What ends an answer before the model does: texts and ids, looked for while the answer arrives."""

from __future__ import annotations

import operator
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

__all__ = ["Mark", "Stop", "Symbol", "stop_entries", "written_out"]


class Mark(NamedTuple):
    """One character of a special token's own text, which is not shown. whole: that text, where it is the last one."""

    character: str
    whole: str | None


Symbol = str | Mark


def written_out(text: str) -> list[Symbol]:
    """A special token as symbols; one without a text of its own as a character that is in no text."""
    text = text or "\ud800"
    return [Mark(character, text if at == len(text) - 1 else None) for at, character in enumerate(text)]


def stop_entries(stop: Any) -> list[str | int]:
    """`stop=` as a list of texts and ids. Raises ValueError for an entry that is neither, and could never match."""
    if stop is None:
        return []
    one = isinstance(stop, str | bytes | Mapping) or getattr(stop, "ndim", None) == 0 or not isinstance(stop, Iterable)
    return [_entry(value) for value in ([stop] if one else stop)]


def _entry(value: Any) -> str | int:
    if value == "" and isinstance(value, str):
        raise ValueError("stop holds an empty string, which would end every answer at once")
    if isinstance(value, str):
        return value
    try:
        if isinstance(value, bool) or "bool" in str(getattr(value, "dtype", "")):
            raise TypeError
        token = operator.index(value)
    except TypeError:
        raise ValueError(f"stop holds {value!r}, a {type(value).__name__}: use texts and token ids") from None
    if token < 0:
        raise ValueError(f"stop holds {token}: token ids begin at 0")
    return token


class Stop:
    """Looks for a text: in what is shown, or, if `marked`, in that and the special tokens written out.

    A machine of Knuth, Morris and Pratt: each symbol is looked at once.
    """

    def __init__(self, text: str, *, marked: bool) -> None:
        self._text, self._marked = text, marked
        self._shorter = [0] * len(text)  # the longest proper beginning that is also an end, per length
        for at in range(1, len(text)):
            self._shorter[at] = self._longer(self._shorter[at - 1], text[at])
        self._matched = 0
        self._places: deque[int] = deque(maxlen=len(text))

    def push(self, symbol: Symbol, place: int) -> int | None:
        """Takes the symbol at a place; the place where a match begins that it completes."""
        if isinstance(symbol, Mark) and not self._marked:
            return None
        self._places.append(place)
        self._matched = self._longer(self._matched, symbol if isinstance(symbol, str) else symbol.character)
        return self._places[0] if self._matched == len(self._text) else None

    @property
    def begun(self) -> int | None:
        """The place where what may become a match begins."""
        return self._places[-self._matched] if self._matched else None

    def _longer(self, matched: int, character: str) -> int:
        while matched and (matched == len(self._text) or self._text[matched] != character):
            matched = self._shorter[matched - 1]
        return matched + (self._text[matched] == character)
