"""Which functions the program runs, read from its source: whatever is named, directly or through others, by what users
call. A function that only tests call is the definition that something faster is held against, or should not be there.
"""

import ast
from collections import defaultdict
from collections.abc import Iterator
from functools import cache
from importlib import import_module
from pathlib import Path

import pytest

from sparing.learn.problems import PROBLEMS

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src" / "sparing"
ANSWERS = {
    f"{home}.{name}": (problem, name)
    for problem in PROBLEMS.values()
    for name in problem.names
    if (home := problem.home(name)) is not None
}
DEFINITIONS = {answer for answer, (problem, name) in ANSWERS.items() if problem.runs(name) != (answer,)}


def named(part: ast.AST) -> set[str]:
    """All names in a piece of source; texts too, since commands, architectures and lazy imports are found by those."""
    return {
        name
        for node in ast.walk(part)
        if (name := getattr(node, "id", None) or getattr(node, "attr", None) or getattr(node, "value", None))
        and isinstance(name, str)
    }


def statements() -> Iterator[tuple[str, ast.stmt]]:
    """(module, statement) for all that stands at the top of a module, except for what stands there to be read."""
    for path in SOURCE.rglob("*.py"):
        module = ".".join(path.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__")
        if not module.startswith("sparing.learn"):
            for statement in ast.parse(path.read_text()).body:
                listing = isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "__all__"
                if not listing or module == "sparing":
                    yield module, statement


@cache
def source() -> tuple[dict[str, dict[str, set[str]]], set[str]]:
    """What each function and class names, {name: {module.name: names}}, and the names that users call."""
    defined: dict[str, dict[str, set[str]]] = defaultdict(dict)
    called: set[str] = set()
    for module, statement in statements():
        if not isinstance(statement, ast.FunctionDef | ast.ClassDef):
            called |= named(statement)
            continue
        defined[statement.name][f"{module}.{statement.name}"] = named(statement)
        if statement.decorator_list or statement.name.startswith("__") or module.startswith("sparing.plugins"):
            called.add(statement.name)
    return defined, called


def reached(*more: str) -> set[str]:
    """Functions and classes, as module.name, that the program reaches, and whatever these names do."""
    defined, called = source()
    found: set[str] = set()
    seen: set[str] = set()
    todo = called | set(more)
    while todo:
        seen.add(name := todo.pop())
        for full_name, names in defined.get(name, {}).items():
            found.add(full_name)
            todo |= names - seen
    return found


def test_the_program_runs_what_is_no_definition():
    assert set(ANSWERS) & reached() == set(ANSWERS) - DEFINITIONS


def test_nothing_else_is_there_for_tests_alone():
    everything = {full_name for found in source()[0].values() for full_name in found}
    benchmarks = set[str]().union(*(named(ast.parse(path.read_text())) for path in (ROOT / "benchmarks").glob("*.py")))
    definitions = {answer.rpartition(".")[2] for answer in DEFINITIONS}
    assert everything - reached(*benchmarks, *definitions) == set()


@pytest.mark.parametrize("answer", sorted(DEFINITIONS))
def test_what_runs_in_place_of_a_definition_exists(answer):
    problem, name = ANSWERS[answer]
    for other in problem.runs(name):
        module, _, attribute = other.rpartition(".")
        assert other in reached()
        assert getattr(import_module(module), attribute).__doc__
