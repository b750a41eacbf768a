"""Bytes of everything remembered about sequences, from the specs that also build the memories. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparing.memory.spec import MemorySpec

__all__ = ["bytes_read", "memory_by_kind", "memory_kind"]


def memory_kind(spec: MemorySpec) -> str:
    """What a layer keeps, in one word."""
    if spec.shared_with is not None:
        return "shared"
    if spec.window is not None:
        return "sliding"
    return "value_only" if spec.value_only else "full"


def memory_by_kind(specs: Sequence[MemorySpec], tokens: int, element_size: int) -> dict[str, int]:
    """Bytes held by one sequence of `tokens` committed tokens, by kind of layer."""
    held: dict[str, int] = {}
    for spec in specs:
        if spec.shared_with is None:
            held[memory_kind(spec)] = held.get(memory_kind(spec), 0) + spec.nbytes(tokens, element_size)
    return held


def bytes_read(specs: Sequence[MemorySpec], tokens: int, element_size: int) -> int:
    """Bytes that one pass over a sequence reads: a layer that shares reads its producer's entries again."""
    return sum(replace(spec, shared_with=None).nbytes(tokens, element_size) for spec in specs)
