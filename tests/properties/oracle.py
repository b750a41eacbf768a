"""What a policy must compute, recomputed without it: every pass of a run, over dense memories that forget nothing.

While a run goes on, each pass is recorded: its tokens, the positions every layer held for every key head, the outputs
that were read, and what was then committed. The replay attends over all keys and values ever committed, with a mask
that hides what had been forgotten. If both agree, forgetting (and nothing else) is what the policy did.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from sparing.memory.attention import AttentionMemory
from sparing.memory.batch import PackedBatch, Row
from sparing.memory.sequence import Memory

# (keys, values) [kv_heads, n, d] of committed entries -> what a query sees of them
Seen = Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]]


@dataclass
class Pass:
    """One row's share of a forward. entries: per layer int64 [kv_heads, n], None where a layer has no keys."""

    memory: Memory
    tokens: Tensor
    causal: bool
    entries: list[Tensor | None]
    output: Tensor
    soft: Tensor | None


@dataclass
class Recording:
    """What happened to a model's memories, in order: passes, and commits as (memory, n)."""

    events: list[Any] = field(default_factory=list)

    @property
    def passes(self) -> list[Pass]:
        return [event for event in self.events if isinstance(event, Pass)]


def record(model: Any, patch: pytest.MonkeyPatch) -> Recording:
    """Record everything `model` does from now on."""
    recording = Recording()

    def recording_forward(name: str) -> None:
        plain = getattr(type(model), name)

        def forward(self: Any, batch: Any, *rest: Any, **options: Any) -> Tensor:
            if self is not model or not isinstance(batch, PackedBatch) or isinstance(batch, MaskedBatch):
                return plain(self, batch, *rest, **options)
            before = [_entries(row.memory) for row in batch.rows]
            hidden = plain(self, batch, *rest, **options)
            soft = rest[0] if name == "denoise_hidden" and rest else None
            signals = [None] * len(batch.rows) if soft is None else soft.split([len(row.tokens) for row in batch.rows])
            outputs = hidden.split([row.num_wanted for row in batch.rows])
            for row, entries, output, signal in zip(batch.rows, before, outputs, signals, strict=True):
                recording.events.append(Pass(row.memory, row.tokens, row.causal, entries, output, signal))
            return hidden

        patch.setattr(type(model), name, forward)

    recording_forward("forward")
    if hasattr(model, "denoise_hidden"):
        recording_forward("denoise_hidden")
    commit = Memory.commit

    def recording_commit(self: Memory, n: int, **options: Any) -> None:
        commit(self, n, **options)
        recording.events.append((self, n))

    patch.setattr(Memory, "commit", recording_commit)
    return recording


def _entries(memory: Memory) -> list[Tensor | None]:
    return [
        memory.entries(i).clone() if isinstance(layer, AttentionMemory) else None
        for i, layer in enumerate(memory.layers)
    ]


class MaskedBatch(PackedBatch):
    """One row over a dense memory, of which each key head of a layer sees only what another memory holds.

    entries: its positions; windows: of its layers.
    """

    def __init__(self, row: Row, entries: list[Tensor | None], windows: list[int | None], seen: Seen):
        super().__init__([row])
        self._entries, self._windows, self._seen = entries, windows, seen

    def narrow(self) -> None:
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float = 1.0) -> Tensor:
        (row,) = self.rows
        memory = row.memory.layers[layer]
        assert isinstance(memory, AttentionMemory)
        if memory.spec.window is not None:
            return super().attend(layer, q, k, v, scale)
        if k is not None and v is not None:
            memory.stage(k, v)
        keys, values = memory.storage.read(memory.where())  # [kv_heads, committed + T, d]
        committed, new = memory.held, len(q)
        seen = self._seen(layer, keys[:, :committed], values[:, :committed])
        keys, values = (torch.cat([a, b[:, committed:]], 1) for a, b in zip(seen, (keys, values), strict=True))
        entries = self._entries[layer]
        assert entries is not None
        visible = torch.zeros(len(keys), new, committed + new, dtype=torch.bool)
        visible[..., :committed].scatter_(-1, entries[:, None].expand(-1, new, -1), True)
        visible[..., committed:] = torch.ones(new, new, dtype=torch.bool).tril() if row.causal else True
        if row.causal and (window := self._windows[layer]) is not None:
            visible &= torch.ones(new, committed + new, dtype=torch.bool).triu(committed - window + 1)
        group = q.shape[1] // len(keys)
        grouped = q.unflatten(1, (len(keys), group))  # [T, kv_heads, group, d]
        scores = torch.einsum("tkgd,ksd->kgts", grouped.double() * scale, keys.double())
        weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
        return torch.einsum("kgts,ksd->tkgd", weights, values.double()).flatten(1, 2).to(q.dtype)


def as_they_are(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    return keys, values


@torch.inference_mode()
def replay(model: Any, recording: Recording, *, seen: Seen = as_they_are, tolerance: float = 1e-4) -> int:
    """Compute every recorded pass again and compare its outputs; returns how many had entries to hide.

    seen: how entries look to queries, where their storage changes them.
    """
    dense: dict[int, Memory] = {}
    hidden = 0
    for event in list(recording.events):
        if not isinstance(event, Pass):
            memory, n = event
            if id(memory) in dense:
                dense[id(memory)].commit(n)
            continue
        memory = dense.setdefault(id(event.memory), model.memory())
        memory.rollback()
        windows = [getattr(layer and layer.spec, "window", None) for layer in event.memory.layers]
        batch = MaskedBatch(Row(event.tokens, memory, causal=event.causal), event.entries, windows, seen)
        again = model.forward(batch) if event.causal else model.denoise_hidden(batch, event.soft)
        if not event.causal:
            memory.rollback()
        if count := len(event.output):
            scale = again.abs().max().item()
            difference = (again[-count:] - event.output).abs().max().item()
            assert difference <= tolerance * scale, f"differs by {difference:.3g} of {scale:.3g}"
        hidden += any(
            e is not None and e.shape[1] < memory.length and layer.spec.window is None
            for e, layer in zip(event.entries, memory.layers, strict=True)
            if isinstance(layer, AttentionMemory)
        )
    return hidden
