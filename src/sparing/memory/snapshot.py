"""A memory as one safetensors file: entries of every layer, and what is needed to refuse the wrong model."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sparing.config.memory import AttentionSpec, RecurrentSpec
from sparing.config.numbers import is_count
from sparing.config.policy import Policy
from sparing.errors import CheckpointError
from sparing.kernels.finite import all_finite
from sparing.memory.compressed import CompressedGroup
from sparing.memory.group import Group
from sparing.memory.triattention.pruner import Pruner
from sparing.memory.turboquant.saved import check_codes

__all__ = ["load_memory", "save_memory"]

FORMAT = "sparing-memory-5"
LONGEST = 2**31 - 1  # tokens


class Remembered(Protocol):
    """What is saved of a `Memory`."""

    policy: Policy
    pruner: Pruner | None
    groups: tuple[Group, ...]
    model: str | None
    length: int
    staged: int


def _layers(memory: Remembered) -> list[tuple[Group, int]]:
    """The layers that remember something of their own, in order."""
    return sorted(((group, i) for group in memory.groups for i in group.layers), key=lambda place: place[1])


def save_memory(memory: Remembered, path: str | Path, beside: Mapping[str, str] | None = None) -> None:
    """Write a memory. beside: texts to keep with it, by name.

    Raises ValueError while tokens are staged; a full disk raises and leaves nothing half-written.
    """
    from sparing.checkpoint.write import save_safetensors

    if memory.staged:
        raise ValueError(f"{memory.staged} tokens are staged: commit or roll back before saving")
    tensors = {
        f"{i}.{name}": tensor.contiguous()
        for i, (group, layer) in enumerate(_layers(memory))
        for name, tensor in group.state(layer).items()
    }
    progress = {"length": memory.length, "pruner": None if memory.pruner is None else memory.pruner.state()}
    save_safetensors(path, tensors, metadata={**(beside or {}), "memory": json.dumps(_description(memory) | progress)})


def load_memory(path: str | Path, memory: Remembered) -> None:
    """Fill an empty memory of the same model and policy.

    Raises CheckpointError, with the memory as it was, if the file was made for another or does not hold what a memory
    of its length does.
    """
    from sparing.checkpoint.safetensors import SafetensorsFile

    file = SafetensorsFile(Path(path))
    try:
        found = json.loads(file.metadata["memory"])
        length, pruner = found.pop("length"), found.pop("pruner")
    except (KeyError, ValueError, AttributeError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: not a memory saved by sparing (metadata 'memory' is missing)") from None
    if found != _description(memory):
        raise CheckpointError(
            f"{path}: saved from another model, policy or dtype: {_difference(found, _description(memory))}"
        )
    layers = _layers(memory)
    states: list[dict[str, Tensor]] = [{} for _ in layers]
    for name in file.names():
        index, _, rest = name.partition(".")
        if index not in map(str, range(len(states))):
            raise CheckpointError(f"{path}: {name} belongs to no layer of this memory")
        states[int(index)][rest] = file.read(name)
    try:
        _check_length(length)
        for i, (place, state) in enumerate(zip(layers, states, strict=True)):
            _check_layer(f"layer {i}", *place, state, length)
        of = {layer: (i, state) for i, ((_, layer), state) in enumerate(zip(layers, states, strict=True))}
        for group in memory.groups:
            _check_alike([of[layer] for layer in group.layers])
        if memory.pruner is not None:
            memory.pruner.check(pruner, length)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: {error}") from None
    for group in memory.groups:
        group.restore(length, {layer: of[layer][1] for layer in group.layers})
    memory.length = length
    if memory.pruner is not None:
        memory.pruner.restore(pruner)


def _check_length(length: Any) -> None:
    if not is_count(length, LONGEST):
        raise ValueError(f"length is {length!r}, expected a whole number from 0 to {LONGEST}")


def _check_layer(where: str, group: Group, layer: int, state: dict[str, Tensor], length: int) -> None:
    """Raises ValueError unless a layer's tensors are what it would hold after `length` tokens."""
    expected, found, spec = group.state(layer), dict(state), group.spec(layer)
    positions = found.pop("positions", None)
    if found.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
        raise ValueError(f"{where}: {f'{missing[0]} is missing' if missing else f'{extra[0]} is not of this memory'}")
    for name, mine in expected.items():
        theirs, grows = found[name], not isinstance(spec, RecurrentSpec) and mine.ndim > 0 and len(mine) == 0
        if name.endswith("channels"):
            continue  # of shape [0] until they are chosen
        same = theirs.shape[1:] == mine.shape[1:] if grows and theirs.ndim else theirs.shape == mine.shape
        if theirs.dtype != mine.dtype or not same:
            shape = ["n", *mine.shape[1:]] if grows else list(mine.shape)
            raise ValueError(
                f"{where}: {name} is {_short(theirs.dtype)} {list(theirs.shape)}, expected {_short(mine.dtype)} {shape}"
            )
        if theirs.is_floating_point() and not isinstance(group, CompressedGroup) and not all_finite(theirs):
            raise ValueError(f"{where}: {name} holds numbers that are not finite")
    if isinstance(spec, AttentionSpec):
        _check_entries(where, spec, found, positions, length)
    elif positions is not None:
        raise ValueError(f"{where}: positions is not of this memory")
    if isinstance(group, CompressedGroup):
        group.check(where, found, length)


def _check_alike(states: Sequence[tuple[int, dict[str, Tensor]]]) -> None:
    """Raises ValueError unless layers of a group hold as many entries. states: with the numbers of their layers."""
    first, expected = states[0]
    for i, state in states[1:]:
        for name in ("keys", "values", "k_tail", "v_tail", "positions", "counts"):
            mine, theirs = expected.get(name), state.get(name)
            if (mine is None) != (theirs is None):
                raise ValueError(f"layer {i if theirs is None else first}: {name} is missing")
            if mine is None or theirs is None:
                continue
            alike = torch.equal(mine, theirs) if name == "counts" else _entries(name, mine) == _entries(name, theirs)
            if not alike:
                raise ValueError(f"layer {i}: {name} are not as many as those of layer {first}")


def _entries(name: str, tensor: Tensor) -> int:
    return tensor.shape[1] if name == "positions" else tensor.shape[0]


def _check_entries(
    where: str, spec: AttentionSpec, found: dict[str, Tensor], positions: Tensor | None, length: int
) -> None:
    coded = 0
    if "counts" in found:
        coded = check_codes(where, spec, found, length)
    exact = {len(found[name]) for name in ("keys", "values", "k_tail", "v_tail") if name in found}
    held = coded + max(exact)
    if len(exact) > 1:
        raise ValueError(f"{where}: {min(exact)} keys or values stand beside {max(exact)}")
    if positions is not None:
        heads, fits = spec.num_key_value_heads, positions.dtype == torch.int32 and positions.ndim == 2
        if spec.rounds is None or not fits or len(positions) != heads or not 0 < positions.shape[1] <= held:
            raise ValueError(f"{where}: positions {list(positions.shape)} are not those of the first of {held} entries")
        end = length - (held - positions.shape[1])  # the position of the first that came after them
        order = positions.long().diff(dim=1, prepend=positions.new_full((heads, 1), -1).long())
        if (order <= 0).any() or (positions >= end).any():
            raise ValueError(f"{where}: positions do not rise from 0 to {end - 1}")
    elif not (length if spec.window is None else min(length, spec.window - 1)) <= held <= length:
        raise ValueError(f"{where}: {held} entries are held, which do not fit a length of {length}")
    elif spec.window is None and held != length:
        raise ValueError(f"{where}: {held} entries are held, the length is {length}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _description(memory: Remembered) -> dict:
    return {
        "format": FORMAT,
        "model": memory.model,
        "kv": memory.policy.without_options,
        "options": {} if memory.pruner is None else memory.pruner.options(),
        "layers": [asdict(group.spec(layer)) for group, layer in _layers(memory)],
        "dtypes": [
            str(tensor.dtype)
            for group, layer in _layers(memory)
            for name, tensor in group.state(layer).items()
            if name != "positions"  # held only once entries were forgotten
        ],
    }


def _difference(found: Any, expected: Any, where: str = "") -> str:
    """The first place where they differ, as far inside as both are built alike."""
    if isinstance(expected, dict) and isinstance(found, dict):
        pairs = [(f"{where}.{key}".lstrip("."), found.get(key), value) for key, value in expected.items()]
    elif isinstance(expected, list) and isinstance(found, list) and len(found) == len(expected):
        pairs = [(f"{where}[{i}]", *pair) for i, pair in enumerate(zip(found, expected, strict=True))]
    else:
        return f"{where} is {found!r}, this model has {expected!r}"
    differing = next((pair for pair in pairs if pair[1] != pair[2]), None)
    return "unknown extra keys" if differing is None else _difference(differing[1], differing[2], differing[0])
