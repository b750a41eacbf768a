"""The box in which somebody else's chat template runs.

Jinja2's sandbox keeps a template away from Python's internals. It does not keep it from running for ever or from
building a value that fills the machine, so on top of it every loop turn, call and filter spends from an allowance of
steps, characters and seconds, and an operation is refused before it builds something larger than a conversation.
Filters and globals are those of transformers' `apply_chat_template`, for which templates are written.
"""

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, wraps
from inspect import signature
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

__all__ = ["RejectedByTemplate", "TooMuch", "allowance", "sandbox"]

MAX_SIZE = 4_000_000  # characters, or 16 to an element, of any one value: a conversation of a million tokens
MAX_TOTAL = 200_000_000  # of all values together
MAX_STEPS = 1_000_000
MAX_SECONDS = 10.0
ELEMENT = 16

# filters that look at the elements of a list without writing them out
LIGHT = frozenset(
    {
        *("attr", "batch", "count", "d", "default", "dictsort", "first", "groupby", "items", "last", "length", "list"),
        *("map", "max", "min", "random", "reject", "rejectattr", "reverse", "safe", "select", "selectattr", "slice"),
        *("sort", "unique"),
    }
)


class RejectedByTemplate(TemplateError):
    """The template called raise_exception: it was given messages it is not made for."""


class TooMuch(Exception):
    """The template runs or grows beyond anything a conversation needs."""


@dataclass
class _Allowance:
    steps: int = field(default_factory=lambda: MAX_STEPS)
    characters: int = MAX_TOTAL
    deadline: float = field(default_factory=lambda: time.monotonic() + MAX_SECONDS)


_current: ContextVar[_Allowance | None] = ContextVar("_current", default=None)


@contextmanager
def allowance() -> Iterator[Callable[[int], None]]:
    """A fresh allowance for one rendering; gives the function that spends characters of it."""
    token = _current.set(_Allowance())
    try:
        yield _spend
    finally:
        _current.reset(token)


def _spend(size: int = 0) -> None:
    """One step, and a value of `size` characters. Raises TooMuch where that is more than is left."""
    if size > MAX_SIZE:
        raise TooMuch(f"it builds a value of more than {MAX_SIZE} characters")
    left = _current.get()
    if left is None:  # a constant that the compiler folds
        return
    left.steps -= 1
    left.characters -= size
    if left.characters < 0:
        raise TooMuch(f"it builds more than {MAX_TOTAL} characters in all")
    if left.steps < 0 or time.monotonic() > left.deadline:
        raise TooMuch(f"it takes more than {MAX_STEPS} steps or {MAX_SECONDS:g} seconds")


def _length(value: Any) -> int:
    """The size of a value without looking into it."""
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, list | tuple | Mapping | set):
        return ELEMENT * len(value)
    return value.bit_length() // 3 if isinstance(value, int) else 1


def _weight(value: Any) -> int:
    """The size of a value written out; nested lists can name one another and so grow exponentially."""
    total, waiting = 0, [value]
    while waiting and total <= MAX_SIZE:
        item = waiting.pop()
        total += ELEMENT if isinstance(item, list | tuple | Mapping | set) else _length(item)
        if isinstance(item, Mapping):
            total += ELEMENT * len(item)
            waiting += [*item.keys(), *item.values()]
        elif isinstance(item, list | tuple | set):
            total += ELEMENT * len(item)
            waiting += item
    return total


# What an operation that can multiply its operands would build at most; values: its arguments in their written order
GROWTH: dict[str, Callable[[list[Any]], int]] = {
    "replace": lambda v: len(v[0]) + v[0].count(v[1]) * len(v[2]),
    "join": lambda v: _weight(v[0]) + len(v[0]) * _length(v[1] if len(v) > 1 else ""),
    "format": lambda v: _formatted(v[0], v[1:]),
    "format_map": lambda v: _formatted(v[0], v[1:]),
    "%": lambda v: _formatted(v[0], v[1:]),
    "translate": lambda v: len(v[0]) * _weight(v[1]),
    "expandtabs": lambda v: len(v[0]) + v[0].count("\t") * (v[1] if len(v) > 1 else 8),
    "indent": lambda v: len(v[0]) + v[0].count("\n") * (v[1] if isinstance(v[1], int) else len(v[1])),
    "wordwrap": lambda v: len(v[0]) * (1 + len(v[3] or "\n")),
}


def _formatted(pattern: str, values: list[Any]) -> int:
    """Every place may take the longest value, and every number, there or among the values, may be its width."""
    if re.search(r"\d{8}", pattern) or "*" in pattern:
        raise TooMuch("it formats a value to a width of many millions")
    places = pattern.count("%") + pattern.count("{")
    widths = sum(map(int, re.findall(r"\d+", pattern)))
    longest = max([0, *map(_weight, values), *(abs(value) for value in values if isinstance(value, int))])
    return len(pattern) + widths + places * longest


def _check_operands(name: str, values: list[Any]) -> None:
    """Refuses an operation before it builds too large a value."""
    for value in values:
        # a number may become a width, a count or a factor
        if isinstance(value, int) and abs(value) > MAX_SIZE:
            raise TooMuch(f"it uses the number {str(value)[:20]} as an argument")
    if name in GROWTH:
        _spend(GROWTH[name](values))


class _Generation(Extension):
    """Passes `{% generation %}` through, which only marks what the model wrote."""

    tags = {"generation"}  # noqa: RUF012 (so declared by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Box(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "*", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Adds the charges that no hook of jinja2 covers: loop turns, macro bodies, `~` and slices."""
        tree = super()._parse(source, name, filename)
        for body in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            constant = sum(len(text.data) for text in body.find_all(nodes.TemplateData))
            charge = nodes.Filter(nodes.Const(""), "_charged", [nodes.Const(constant)], [], None, None)
            body.body.insert(0, nodes.Output([charge]))  # pyright: ignore[reportAttributeAccessIssue]
        for joined in list(tree.find_all(nodes.Concat)):
            joined.nodes = [nodes.Filter(part, "_written", [], [], None, None) for part in joined.nodes]
        for part in list(tree.find_all(nodes.Getitem)):
            if isinstance(part.arg, nodes.Slice):
                part.node = nodes.Filter(part.node, "_sliced", [], [], None, None)
        for node in tree.find_all(nodes.Node):
            node.set_environment(self)
        return tree

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        numbers = [side for side in (left, right) if isinstance(side, int)]
        if operator == "%" and isinstance(left, str):
            _check_operands("%", [left, right])
        elif operator == "**" and len(numbers) == 2:
            _spend(_length(left) * abs(right))
        elif operator == "*" and len(numbers) == 1:
            _spend(_length(left if numbers[0] is right else right) * abs(numbers[0]))
        else:
            _spend(_length(left) + _length(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
        owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # jinja2 wraps str.format
        values = [*args, *kwargs.values()]
        if isinstance(owner, str):
            _check_operands(obj.__name__, [*values, owner] if obj.__name__ == "join" else [owner, *values])
        else:
            _check_operands("", values)
        result = super().call(context, obj, *args, **kwargs)
        _spend(_length(result))
        return result


def _bounded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that spends for what it is given and for what it returns."""
    parameters = signature(function)

    @wraps(function)  # also carries over whether jinja2 passes its environment
    def bounded(*args: Any, **kwargs: Any) -> Any:
        if name in LIGHT:
            _check_operands("", [*args, *kwargs.values()])
        else:
            args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
            bound = parameters.bind(*args, **kwargs)
            bound.apply_defaults()
            values = [value for value in bound.args if not isinstance(value, Environment | EvalContext | Context)]
            values += bound.kwargs.values()
            if name in GROWTH and not isinstance(values[0], list | str):
                values[0] = str(values[0])
            _check_operands(name, values)
            _spend(sum(map(_weight, values)))
        result = function(*args, **kwargs)
        _spend(_length(result))
        return result

    return bounded


class _Names(Namespace):
    """A namespace whose attributes cannot shadow Python's internals."""

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"attribute {name!r} of a namespace")
        super().__setitem__(name, value)


@pass_context
def _charged(_: Any, value: str, constant: int) -> str:
    """The turn of a loop or the call of a macro, whose text has this many characters."""
    _spend(constant)
    return value


def _written(value: Any) -> Any:
    _spend(_weight(value))
    return value


def _sliced(value: Any) -> Any:
    _spend(_length(value))
    return value


def _tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """Unlike jinja2's own: nothing is escaped for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise RejectedByTemplate(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


@cache
def sandbox() -> _Box:
    """The one environment in which all templates run."""
    box = _Box(trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols], finalize=_written)
    box.filters["tojson"] = _tojson
    box.filters = {name: _bounded(name, function) for name, function in box.filters.items()}
    box.filters |= {"_charged": _charged, "_written": _written, "_sliced": _sliced}
    del box.globals["lipsum"]  # makes text of any length, and no template needs it
    box.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Names}
    return box
