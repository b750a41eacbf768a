"""What a chat template may spend: steps, characters and processor time, in proportion to the conversation.

Every operation that can be slow or can build something large is weighed before it runs. Two things make that more
than counting characters: lists and namespaces can name one another, so that a value of a hundred parts writes out to
2 ** 100 of them (in text, in a comparison, in a hash); and some of Python's text methods take quadratic time.
"""

import re
import time
from collections.abc import Callable, ItemsView, Iterator, KeysView, Mapping, ValuesView
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from jinja2.utils import Namespace

__all__ = ["GROWTH", "TooMuch", "allowance", "check_growth", "check_numbers", "length", "spend", "weight", "written"]

# For a conversation of a million tokens. Shorter ones have a share of it, see `allowance`.
MAX_SIZE = 4_000_000  # characters, or 16 to an element, of any one value
MAX_TOTAL = 200_000_000  # of all values together
MAX_STEPS = 1_000_000
MAX_SECONDS = 10.0  # of this thread's processor time
LEAST = 300_000  # characters that even the shortest conversation has a share for
ELEMENT = 16
MAX_BITS = 10_000  # of a whole number


class TooMuch(Exception):
    """The template runs or grows beyond anything a conversation needs."""


@dataclass
class _Allowance:
    size: int
    total: int
    steps: int
    seconds: float
    characters: int
    deadline: float


_current: ContextVar[_Allowance] = ContextVar("_current")


@contextmanager
def allowance(size: int) -> Iterator[None]:
    """A fresh allowance for one rendering. size: characters of what is rendered, and of the template."""
    share = min(1.0, (LEAST + 4 * size) / MAX_SIZE)
    total, seconds = int(MAX_TOTAL * share), MAX_SECONDS * share
    fresh = _Allowance(int(MAX_SIZE * share), total, MAX_STEPS, seconds, total, time.thread_time() + seconds)
    token = _current.set(fresh)
    try:
        yield
    finally:
        _current.reset(token)


def spend(size: int = 0) -> None:
    """One step, and a value of `size` characters. Raises TooMuch where that is more than is left.

    Outside of a rendering it raises LookupError: the compiler takes that for a constant it cannot fold.
    """
    left = _current.get()
    if size > left.size:
        raise TooMuch(f"it builds a value of more than {left.size} characters")
    left.steps -= 1
    left.characters -= size
    if left.characters < 0:
        raise TooMuch(f"it builds more than {left.total} characters in all")
    if left.steps < 0 or time.thread_time() > left.deadline:
        raise TooMuch(f"it takes more than {MAX_STEPS} steps or {left.seconds:.2g} seconds")


def contents(value: Any) -> list[Any] | None:
    """What a value consists of, None for one that has no parts."""
    if isinstance(value, str | int | float | None):
        return None
    if isinstance(value, Mapping):
        return [*value.keys(), *value.values()]
    if isinstance(value, list | tuple | set | frozenset | range | KeysView | ValuesView):
        return list(value)
    if isinstance(value, ItemsView):
        return [part for pair in value for part in pair]
    if isinstance(value, Namespace):
        return list(object.__getattribute__(value, "_Namespace__attrs").values())
    return None


def length(value: Any) -> int:
    """The size of a value without looking into it."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, int):
        return value.bit_length() // 3
    if isinstance(value, list | tuple | set | frozenset | range | KeysView | ValuesView):
        return ELEMENT * len(value)
    return 2 * ELEMENT * len(value) if isinstance(value, Mapping | ItemsView) else 1


def weight(value: Any) -> int:
    """The size of a value written out; it stops counting beyond what any one value may have."""
    return len(value) if isinstance(value, str) else written(value, _current.get().size)


def written(value: Any, most: int) -> int:
    """The size of a value written out, counted as far as `most`."""
    total, waiting = 0, [value]
    while waiting and total <= most:
        item = waiting.pop()
        total += length(item)
        if total <= most and (parts := contents(item)):
            total += ELEMENT
            waiting += parts
    return total


def check_numbers(*values: Any) -> None:
    """Whole numbers of thousands of digits are nobody's, and arithmetic on them is not charged for."""
    for value in values:
        if isinstance(value, int) and value.bit_length() > MAX_BITS:
            raise TooMuch(f"it makes a number of more than {MAX_BITS} bits")


def check_growth(name: str, values: list[Any]) -> None:
    """Refuses an operation before it builds too large a value, or runs too long on it.

    values: its arguments in their written order, the value it works on first.
    """
    check_numbers(*values)
    if name in SLOW:
        _current.get().characters -= SLOW[name](values)
    spend(GROWTH[name](values) if name in GROWTH else 0)


def _text(value: Any) -> str:
    return value if isinstance(value, str) else str(value)


def _whole(value: Any) -> int:
    return abs(value) if isinstance(value, int) else len(value) if isinstance(value, str) else 0


def _padded(values: list[Any]) -> int:
    return max(len(_text(values[0])), *map(_whole, values[1:2]), 0)


def _replaced(values: list[Any]) -> int:
    text, old, new = map(_text, values[:3])
    return len(text) + text.count(old) * len(new)


def _joined(values: list[Any]) -> int:
    between = length(values[1]) if len(values) > 1 else 0
    return weight(values[0]) + len(values[0]) * between


def _indented(values: list[Any]) -> int:
    text = _text(values[0])
    return len(text) + (1 + len(text.splitlines())) * _whole(values[1])


def _as_json(values: list[Any]) -> int:
    """tojson(value, ensure_ascii, indent, separators, sort_keys): every part may have a line of its own, far in."""
    value, _, indent, separators = values[:4]
    size = weight(value)
    if size > _current.get().size or (indent is None and not separators):
        return size
    parts, deepest, waiting = 0, 0, [(value, 1)]
    while waiting:
        item, depth = waiting.pop()
        deepest = max(deepest, depth)
        inside = contents(item) or ()
        parts += len(inside) + 1
        waiting += [(part, depth + 1) for part in inside]
    each = 0 if indent is None else (1 + deepest) * _whole(indent)
    return size + parts * (each + sum(map(length, separators or ())))


# The places of a format, with the width and precision that they state. `%s` and `{}` alike.
_PERCENT = re.compile(r"%(?:\([^()%]*\))?[-#0 +]*(\*|\d*)\.?(\*|\d*)")
_BRACES = re.compile(r"\{[^{}]*")


def _formatted(pattern: str, values: list[Any], places: list[str], named: bool) -> int:
    """What the places state as their width and precision, and what the values are. named: one may appear often."""
    digits = [found for place in places for found in re.findall(r"\d+", place)]
    if any(len(found) > 7 for found in digits) or any("*" in place for place in places):
        raise TooMuch("it formats a value to a width of many millions")
    weights = list(map(weight, values))
    total = max([0, *weights]) * len(places) if named else sum(weights)
    if re.search(r"\{[^{}]*\{", pattern):  # a number may be the width of another value
        total += len(places) * max([0, *(abs(value) for value in values if isinstance(value, int))])
    # Python takes as long for a place as for copying a hundred characters.
    return len(pattern) + sum(map(int, digits)) + 100 * len(places) + total


def _percent(values: list[Any]) -> int:
    pattern = _text(values[0])
    places = ["".join(found.groups("")) for found in _PERCENT.finditer(pattern)]
    return _formatted("", [pattern, *values[1:]], places, "%(" in pattern)


def _braced(values: list[Any]) -> int:
    pattern = values[0]
    return _formatted(pattern, values, _BRACES.findall(pattern), bool(re.search(r"\{[^{}:!]", pattern)))


def _copied(values: list[Any]) -> int:
    """Adding up texts or lists copies what there is at each step."""
    numbers = isinstance(values[0], list) and all(isinstance(item, int | float) for item in values[0])
    return 0 if numbers else len(values[0]) * weight(values[0]) // 32


def _searched(values: list[Any]) -> int:
    """All of the argument is looked at for each character of the text."""
    return len(_text(values[0])) * max([0, *(len(v) for v in values[1:] if isinstance(v, str))]) // 32


def _squared(values: list[Any]) -> int:
    """All of the text is looked at, or copied, for each of its parts."""
    return weight(values[0]) ** 2 // 128


# How large a value an operation makes that can make more than it is given. `filter` in front: the filter of that name.
GROWTH: dict[str, Callable[[list[Any]], int]] = {
    "%": _percent,
    "batch": lambda v: ELEMENT * _whole(v[1]),
    "center": _padded,
    "expandtabs": lambda v: len(v[0]) + v[0].count("\t") * (_whole(v[1]) if len(v) > 1 else 8),
    "filter format": _percent,
    "format": _braced,
    "format_map": _braced,
    "indent": _indented,
    "join": _joined,
    "ljust": _padded,
    "replace": _replaced,
    "rjust": _padded,
    "round": lambda v: _whole(v[1]),
    "slice": lambda v: ELEMENT * _whole(v[1]),
    "strftime_now": lambda v: 256 * len(v[0]),  # as far as C's own goes
    "tojson": _as_json,
    "translate": lambda v: len(v[0]) * (1 + weight(v[1])),
    "wordwrap": lambda v: len(_text(v[0])) * (1 + len(v[3] or "\n")),
    "zfill": _padded,
}

# How long an operation takes that can take longer than in proportion, as the number of characters copied meanwhile.
SLOW: dict[str, Callable[[list[Any]], int]] = {
    **dict.fromkeys(("lstrip", "rstrip", "strip", "trim"), _searched),
    **dict.fromkeys(("rfind", "rindex", "rpartition", "rsplit"), _searched),
    **dict.fromkeys(("pprint", "striptags", "urlize", "wordwrap"), _squared),
    "sum": _copied,
}
