"""The shape of the package: imports point one way, the public names are those promised, files stay readable."""

from __future__ import annotations

import ast
import inspect
import pkgutil
from dataclasses import fields
from functools import cache
from pathlib import Path

import pytest

import sparing

PACKAGE = Path(sparing.__file__).parent

# From the ground up: a room imports from the rooms below it, and none beside it imports it.
FLOORS = [
    {"errors", "text", "sudoku"},
    {"config"},
    {"kernels"},
    {"checkpoint"},
    {"weights"},
    {"memory"},
    {"models"},
    {"decoding"},
    {"planning"},
    {"training", "plugins"},
    {"inspection"},
    {"learn"},
    {"cli"},
]
# What no room may know, although it lies below.
NEVER = {
    "config": {"text"},
    "checkpoint": {"kernels"},
    "weights": {"text"},
    "decoding": {"checkpoint", "weights"},
}


@cache
def modules() -> dict[str, ast.Module]:
    """Every module by its dotted name below the package; a package's own is that of its folder."""
    found = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text())
    return found


def imports(tree: ast.Module) -> set[str]:
    """Modules of the package imported anywhere in a file, also inside functions and for types alone."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] == "sparing":
            home = node.module.removeprefix("sparing").removeprefix(".")
            for alias in node.names:
                inner = f"{home}.{alias.name}".removeprefix(".")
                found.add(inner if inner in modules() else home)
        elif isinstance(node, ast.Import):
            found |= {a.name.removeprefix("sparing.") for a in node.names if a.name.startswith("sparing.")}
    return found


def test_rooms_import_from_the_floors_below() -> None:
    floors = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}
    for module, tree in modules().items():
        room = module.partition(".")[0]
        if not room:  # the package itself names what it hands on
            continue
        assert room in floors, f"{module} is in no room: add {room} to FLOORS"
        for imported in imports(tree):
            other = imported.partition(".")[0]
            if not other:  # `from sparing import __version__`, or a public name
                assert floors[room] == len(FLOORS) - 1, f"{module} imports from the package itself"
            elif other != room:
                assert floors[other] < floors[room], f"{module} imports {imported}, which is not below it"
                assert other not in NEVER.get(room, ()), f"{module} imports {imported}"


def test_no_file_imports_itself_through_others() -> None:
    waiting = {module: imports(tree) - {module, ""} for module, tree in modules().items() if module}
    while free := [module for module, needs in waiting.items() if not needs & waiting.keys()]:
        for module in free:
            del waiting[module]
    assert not waiting, f"these import each other: {', '.join(sorted(waiting))}"


def test_a_file_is_read_in_one_sitting() -> None:
    for path in PACKAGE.rglob("*.py"):
        assert len(path.read_text().splitlines()) <= 400, path


def test_what_is_not_a_dependency_is_imported_in_one_place() -> None:
    homes = {"transformers": ("plugins.", "inspection."), "triton": ("kernels.gpu.",)}
    for module, tree in modules().items():
        for node in ast.walk(tree):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert module.startswith(homes.get(name.split(".")[0], "")), f"{module} imports {name}"


def test_every_public_name_resolves() -> None:
    for name in sparing.__all__:
        assert getattr(sparing, name) is not None
    with pytest.raises(AttributeError, match="nothing_like_this"):
        _ = sparing.nothing_like_this


# The public contract: arguments in order, with the values they have when left out (...: none). More may follow.
CONTRACT: dict[str, dict[str, object]] = {
    "sparing.load": {"source": None, "dtype": "auto", "weights": "stored", "device": "auto", "revision": None},
    "sparing.generate": {
        "model": ...,
        "prompt": ...,
        "decoder": "auto",
        "kv": "dense",
        "max_new_tokens": None,
        **dict.fromkeys(("temperature", "top_k", "top_p", "seed", "draft", "stop")),
    },
    "sparing.plan": {
        "source_or_config": ...,
        "context": ...,
        "batch": 1,
        "kv": "dense",
        "weights": "stored",
        **dict.fromkeys(("hardware", "new_tokens", "steps")),
    },
    "sparing.calibrate": {"model": ..., "text_or_tokens": ...},
    "sparing.models.base.LanguageModel.logits": {"self": ..., "tokens": ..., "memory": None},
    "sparing.models.base.LanguageModel.hidden_states": {"self": ..., "tokens": ...},
    "sparing.models.base.LanguageModel.run_layers": {"self": ..., "layers": ..., "tokens": None},
    "sparing.models.base.LanguageModel.memory": {"self": ..., "kv": "dense"},
    "sparing.models.base.LanguageModel.load_memory": {"self": ..., "path": ...},
    "sparing.models.diffusion_gemma.DiffusionGemma.denoise": {"self": ..., "canvas": ..., "memory": ..., "soft": None},
    "sparing.memory.sequence.Memory.entries": {"self": ..., "layer": ...},
    "sparing.memory.sequence.Memory.fork": {"self": ...},
    "sparing.memory.sequence.Memory.save": {"self": ..., "path": ...},
    "sparing.Statistics.save": {"self": ..., "path": ...},
    "sparing.Statistics.load": {"path": ...},
}


@pytest.mark.parametrize("name", CONTRACT)
def test_contract_signatures(name: str) -> None:
    parameters = list(inspect.signature(pkgutil.resolve_name(name)).parameters.values())
    promised = CONTRACT[name]
    assert [parameter.name for parameter in parameters[: len(promised)]] == list(promised)
    for parameter, default in zip(parameters, promised.values(), strict=False):
        assert parameter.default == (inspect.Parameter.empty if default is ... else default)
    further = [p for p in parameters[len(promised) :] if p.kind is not inspect.Parameter.VAR_KEYWORD]
    assert all(parameter.default is not inspect.Parameter.empty for parameter in further)


def test_contract_of_a_plan_and_of_events() -> None:
    promised = {"parameters", "active_parameters", "weight_bytes", "memory_bytes", "memory_by_kind"}
    promised |= {"flops_per_token", "bytes_per_token", "seconds_per_token"}
    plan = sparing.plan("gemma-4-e2b", context=100).to_dict()
    assert promised <= plan.keys() and plan["seconds_per_token"] is None
    names = {event: [f.name for f in fields(event)] for event in (sparing.Draft, sparing.Commit, sparing.Done)}
    assert names[sparing.Draft] == ["row", "ids", "accepted", "step", "entropy"]
    assert names[sparing.Commit][:3] == ["row", "ids", "text"]
    assert names[sparing.Done] == ["row", "reason", "stats"]
