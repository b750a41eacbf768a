"""The box in which somebody else's chat template runs.

Jinja2's sandbox keeps a template away from Python's internals. It does not keep it from running for ever or from
building a value that fills the machine, so on top of it every loop turn, call, operator, comparison and filter spends
from an allowance (`chat_allowance`), nothing is computed while a template is compiled, and a template has a limit of
its own. Filters and globals are those of transformers' `apply_chat_template`, for which templates are written.
"""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from functools import cache, wraps
from inspect import signature
from typing import Any, NoReturn

from jinja2 import Environment, TemplateError, nodes, pass_context
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.lexer import Token, TokenStream
from jinja2.nodes import EvalContext
from jinja2.parser import Parser
from jinja2.runtime import Context, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace

from sparing.checkpoint.chat.allowance import GROWTH, TooMuch, check_growth, check_numbers, length, spend, weight

__all__ = ["RejectedByTemplate", "sandbox"]

# Of a template; the largest in use have 3,800 tokens, 1,300 nodes, of which 110 open a scope, and 60 names.
# What compiling takes grows with the nodes and with the product of scopes and names.
MAX_TOKENS = 12_000
MAX_NODES = 5_000
MAX_NAMES_IN_SCOPES = 50_000
SCOPES = (nodes.If, nodes.For, nodes.Macro, nodes.CallBlock, nodes.With, nodes.Block, nodes.AssignBlock)

# filters that look at the elements of a list without writing them out, and tests that only ask for the type
LIGHT = frozenset(
    {
        *("attr", "batch", "count", "d", "default", "first", "items", "last", "length", "list", "map", "random"),
        *("reject", "rejectattr", "reverse", "select", "selectattr", "slice"),
    }
)
LIGHT_TESTS = frozenset(
    {
        *("boolean", "callable", "defined", "escaped", "false", "filter", "float", "integer", "iterable", "mapping"),
        *("none", "number", "sameas", "sequence", "string", "test", "true", "undefined"),
    }
)
BYTES = frozenset({"encode", "to_bytes", "from_bytes"})  # no template needs them, and some encodings take for ever


class RejectedByTemplate(TemplateError):
    """The template called raise_exception: it was given messages it is not made for."""


class _Generation(Extension):
    """Passes `{% generation %}` through, which only marks what the model wrote, and limits what is parsed."""

    tags = {"generation"}  # noqa: RUF012 (so declared by jinja2)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    def filter_stream(self, stream: TokenStream) -> Iterable[Token]:
        for count, token in enumerate(stream):
            if count > MAX_TOKENS:
                raise TooMuch(f"it has more than {MAX_TOKENS} parts")
            yield token


class _Box(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "**", "%"})

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Adds the charges that no hook of jinja2 covers: loop turns, macro bodies, `~`, comparisons, keys, slices."""
        tree = super()._parse(source, name, filename)
        _check_size(tree)
        for body in list(tree.find_all((nodes.For, nodes.Macro, nodes.CallBlock))):
            constant = sum(len(text.data) for text in body.find_all(nodes.TemplateData))
            charge = nodes.Filter(nodes.Const(""), "_charged", [nodes.Const(constant)], [], None, None)
            body.body.insert(0, nodes.Output([charge]))  # pyright: ignore[reportAttributeAccessIssue]
            if isinstance(body, nodes.For) and body.test is not None:
                body.test = _through("_sized", body.test)
        for joined in list(tree.find_all(nodes.Concat)):
            joined.nodes = [_through("_written", part) for part in joined.nodes]
        for compared in list(tree.find_all(nodes.Compare)):
            compared.expr = _through("_written", compared.expr)
            for operand in compared.ops:
                operand.expr = _through("_searched" if operand.op in ("in", "notin") else "_written", operand.expr)
        for pair in list(tree.find_all(nodes.Pair)):
            pair.key = _through("_written", pair.key)
        for part in list(tree.find_all(nodes.Getitem)):
            if isinstance(part.arg, nodes.Slice):
                part.node = _through("_sized", part.node)
        for node in tree.find_all(nodes.Node):
            node.set_environment(self)
        return tree

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        return attr not in BYTES and super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: Any, argument: Any) -> Any:
        if not isinstance(argument, str | int):  # hashed, or written into a complaint
            spend(weight(argument))
        return super().getitem(obj, argument)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        check_numbers(left, right)
        numbers = [side for side in (left, right) if isinstance(side, int)]
        if operator == "%" and isinstance(left, str):
            check_growth("%", [left, right])
        elif operator == "**" and len(numbers) == 2:
            check_numbers(1 << min(left.bit_length() * abs(right), 99_999))
        elif operator == "*" and len(numbers) == 1:
            spend(length(left if numbers[0] is right else right) * abs(numbers[0]))
        elif operator == "-" and not numbers:  # of the keys of mappings, which are hashed
            spend(weight(left) + weight(right))
        else:
            spend(length(left) + length(right))
        return super().call_binop(context, operator, left, right)

    def call(self, context: Any, obj: Any, /, *args: Any, **kwargs: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not isinstance(obj, Macro):  # which is handed its arguments, and does nothing with them itself
            args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
            values = [*args, *kwargs.values()]
            spend(sum(map(weight, values)))
            name = getattr(obj, "__name__", "")
            owner = getattr(getattr(obj, "__wrapped__", obj), "__self__", None)  # jinja2 wraps str.format
            if isinstance(owner, str):
                check_growth(name, [*values, owner] if name == "join" else [owner, *values])
            elif isinstance(owner, list | tuple):
                spend(weight(owner))  # searched or counted
            elif obj is _strftime_now:
                check_growth("strftime_now", values)
        result = super().call(context, obj, *args, **kwargs)
        spend(length(result))
        return result


def _check_size(tree: nodes.Template) -> None:
    every = list(tree.find_all(nodes.Node))
    if len(every) > MAX_NODES:
        raise TooMuch(f"it has {len(every)} operations and texts, at most {MAX_NODES} are accepted")
    names = {node.name for node in every if isinstance(node, nodes.Name)}
    scopes = sum(isinstance(node, SCOPES) for node in every)
    if (10 + len(names)) * scopes > MAX_NAMES_IN_SCOPES:
        raise TooMuch(f"it has {len(names)} names in {scopes} scopes, far more than any template in use")


def _through(name: str, node: Any) -> nodes.Expr:
    """What is computed goes through one of the charging filters."""
    return node if isinstance(node, nodes.Const) else nodes.Filter(node, name, [], [], None, None)


def _bounded(name: str, function: Callable[..., Any], light: frozenset[str] = LIGHT) -> Callable[..., Any]:
    """A filter or test that spends for what it is given and for what it returns."""
    parameters = signature(function)

    @wraps(function)  # also carries over whether jinja2 passes its environment
    def bounded(*args: Any, **kwargs: Any) -> Any:
        if name in light and name not in GROWTH:
            result = function(*args, **kwargs)
            spend(length(result))
            return result
        args = tuple(list(value) if isinstance(value, Iterator) else value for value in args)
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        values = [value for value in bound.args if not isinstance(value, Environment | EvalContext | Context)]
        values += bound.kwargs.values()
        if name not in light:
            spend(sum(map(weight, values)))
        check_growth("filter format" if name == "format" else name, values)
        result = function(*args, **kwargs)
        spend(length(result))
        return result

    return bounded


class _Names(Namespace):
    """A namespace whose attributes cannot shadow Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:  # as jinja2's own, so that `self` can be an attribute
        self, attributes = args[0], dict(*args[1:], **kwargs)
        Namespace.__init__(self, {})
        for name, value in attributes.items():
            self[name] = value

    def __setitem__(self, name: str, value: Any) -> None:
        if name.startswith("_"):
            raise SecurityError(f"attribute {name!r} of a namespace")
        super().__setitem__(name, value)


@pass_context
def _charged(_: Any, value: str, constant: int) -> str:
    """The turn of a loop or the call of a macro, whose text has this many characters."""
    spend(constant)
    return value


def _written(value: Any) -> Any:
    """Something that is written, compared or hashed."""
    spend(weight(value))
    return value


def _searched(value: Any) -> Any:
    spend(1 if isinstance(value, Mapping) else weight(value))
    return value


def _sized(value: Any) -> Any:
    spend(length(value))
    return value


@pass_context
def _finalized(_: Any, value: Any) -> Any:
    """What is written into the output; as it asks for the context, jinja2 folds no constants for it."""
    return _written(value)


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
    box = _Box(
        trim_blocks=True,
        lstrip_blocks=True,
        extensions=[_Generation, loopcontrols],
        finalize=_finalized,
        optimized=False,  # nothing is computed while compiling
    )
    box.filters["tojson"] = _tojson
    box.filters = {name: _bounded(name, function) for name, function in box.filters.items()}
    box.filters |= {"_charged": _charged, "_written": _written, "_searched": _searched, "_sized": _sized}
    box.tests = {name: _bounded(name, function, LIGHT_TESTS) for name, function in box.tests.items()}
    del box.globals["lipsum"]  # makes text of any length, and no template needs it
    box.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now, "namespace": _Names}
    return box
