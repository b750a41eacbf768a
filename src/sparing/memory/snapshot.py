"""A memory as one safetensors file: entries of every layer, and what is needed to refuse the wrong model."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sparing.errors import CheckpointError
from sparing.memory.sequence import Memory

__all__ = ["load_memory", "save_memory"]

FORMAT = "sparing-memory-3"


def save_memory(memory: Memory, path: str | Path) -> None:
    """Write a memory. Raises ValueError while tokens are staged; a full disk raises and leaves nothing half-written."""
    from sparing.checkpoint.write import save_safetensors

    if memory.staged:
        raise ValueError(f"{memory.staged} tokens are staged: commit or roll back before saving")
    tensors = {
        f"{i}.{name}": tensor.contiguous()
        for i, layer in enumerate(memory.own)
        for name, tensor in layer.state().items()
    }
    progress = {"length": memory.length, "pruner": None if memory.pruner is None else memory.pruner.state()}
    save_safetensors(path, tensors, metadata={"memory": json.dumps(_description(memory) | progress)})


def load_memory(path: str | Path, memory: Memory) -> None:
    """Fill an empty memory of the same model and policy. Raises CheckpointError if the file was made for another."""
    from sparing.checkpoint.safetensors import SafetensorsFile

    file = SafetensorsFile(Path(path))
    try:
        found = json.loads(file.metadata["memory"])
        length, pruner = found.pop("length"), found.pop("pruner")
    except (KeyError, ValueError, AttributeError):
        raise CheckpointError(f"{path}: not a memory saved by sparing (metadata 'memory' is missing)") from None
    if found != _description(memory):
        raise CheckpointError(
            f"{path}: saved from another model, policy or dtype: {_difference(found, _description(memory))}"
        )
    for i, layer in enumerate(memory.own):
        prefix = f"{i}."
        names = [name for name in file.names() if name.startswith(prefix)]
        layer.restore(length, {name.removeprefix(prefix): file.read(name) for name in names})
    if memory.pruner is not None:
        memory.pruner.restore(pruner)


def _description(memory: Memory) -> dict:
    return {
        "format": FORMAT,
        "kv": memory.policy.kv,
        "options": {} if memory.pruner is None else memory.pruner.options(),
        "layers": [asdict(layer.spec) for layer in memory.own],
        "dtypes": [
            str(tensor.dtype)
            for layer in memory.own
            for name, tensor in layer.state().items()
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
