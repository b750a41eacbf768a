"""Bytes of everything remembered about sequences, from the specs that also build the memories. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sparing.config.memory import AttentionSpec, CompressedSpec, MemorySpec, RecurrentSpec
from sparing.config.numbers import whole, whole_numbers

__all__ = ["bytes_read", "canvas_bytes", "hybrid_cache_bytes", "memory_by_kind", "memory_kind"]


def memory_kind(spec: MemorySpec | None) -> str:
    """What a layer keeps, in one word."""
    if spec is None:
        return "none"
    if isinstance(spec, RecurrentSpec):
        return "recurrent"
    if isinstance(spec, CompressedSpec):
        if not spec.is_compressed:
            return "sparse" if spec.ratio else "sliding"
        return "heavily_compressed" if spec.index is None else "compressed_sparse"
    if spec.shared_with is not None:
        return "shared"
    if spec.window is not None:
        return "sliding"
    return "value_only" if spec.value_only else "full"


def memory_by_kind(specs: Sequence[MemorySpec | None], tokens: int, element_size: int) -> dict[str, int]:
    """Bytes held by one sequence of `tokens` committed tokens, by kind of layer.

    What compressors hold of open windows, whatever the number of tokens, is counted apart, as "compressors".
    """
    held: dict[str, int] = {}
    for spec in specs:
        if spec is None or memory_kind(spec) == "shared":
            continue
        state = spec.state_nbytes if isinstance(spec, CompressedSpec) else 0
        held[memory_kind(spec)] = held.get(memory_kind(spec), 0) + spec.nbytes(tokens, element_size) - state
        if state:
            held["compressors"] = held.get("compressors", 0) + state
    return held


def canvas_bytes(specs: Sequence[MemorySpec | None], tokens: int, canvas: int, element_size: int) -> int:
    """Bytes that passes over a canvas after `tokens` committed tokens hold in addition: decoded entries of codes."""
    growing = (spec for spec in specs if isinstance(spec, AttentionSpec))
    return sum(spec.decoded_nbytes(tokens, canvas, element_size) for spec in growing)


def bytes_read(specs: Sequence[MemorySpec | None], tokens: int, element_size: int) -> int:
    """Bytes that one pass over a sequence moves.

    A layer that shares reads its producer's entries again; a recurrent state, or that of a compressor, is read and
    written. Where an indexer chooses, all its keys are read and the entries that a query takes.
    """
    total = 0
    for spec in specs:
        if isinstance(spec, RecurrentSpec):
            total += 2 * spec.nbytes(tokens, element_size)
        elif isinstance(spec, CompressedSpec):
            total += (spec.window_entries(tokens) + spec.read_entries(tokens)) * spec.entry_nbytes(element_size)
            total += spec.entries(tokens) * spec.key_nbytes(element_size) + 2 * spec.state_nbytes
        elif spec is not None:
            total += replace(spec, shared_with=None).nbytes(tokens, element_size)
    return total


def hybrid_cache_bytes(
    pattern: str,
    tokens: int,
    kv_heads: int,
    head_dim: int,
    mamba_heads: int,
    mamba_head_dim: int,
    state: int,
    groups: int,
    kernel: int,
    kv_bytes: int = 2,
    ssm_bytes: int = 4,
    conv_bytes: int = 2,
) -> dict[str, int]:
    """Bytes that one sequence of a Mamba and attention hybrid holds: {"kv", "ssm", "conv", "total"}.

    pattern: a letter per layer, M (Mamba), * (attention), E and - (nothing to remember). kv grows with `tokens`; the
    states and the last `kernel - 1` inputs of the convolutions do not. *_bytes: of one number.
    Raises ValueError for another letter, and for numbers that are not whole or are negative.
    Source: Nemotron 3, layout of the caches.
    """
    if bad := sorted(set(pattern) - set("M*E-")):
        raise ValueError(f"pattern holds {bad[0]!r}, use the letters M * E -")
    tokens, kv_heads, head_dim = whole_numbers(0, tokens=tokens, kv_heads=kv_heads, head_dim=head_dim)
    heads, size = whole_numbers(0, mamba_heads=mamba_heads, mamba_head_dim=mamba_head_dim)
    state, groups = whole_numbers(0, state=state, groups=groups)
    attention = AttentionSpec(kv_heads, head_dim)
    mamba = RecurrentSpec(heads, size, state, groups, whole("kernel", kernel, 1))
    held = {
        "kv": pattern.count("*") * attention.nbytes(tokens, kv_bytes),
        "ssm": pattern.count("M") * mamba.state_nbytes // 4 * ssm_bytes,
        "conv": pattern.count("M") * mamba.conv_nbytes(conv_bytes),
    }
    return {**held, "total": sum(held.values())}
