"""What a policy must compute, recomputed without it: every pass of a run, over dense memories that forget nothing.

While a run goes on, each pass is recorded: its tokens, the positions every layer held for every key head, the outputs
that were read, and what was then committed. The replay attends over all keys and values ever committed, with a mask
that hides what had been forgotten, and another that says which of them are seen through their codes. If both agree,
forgetting and quantising (and nothing else) is what the policy did.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from sparing.config.memory import AttentionSpec
from sparing.memory.sequence import Memory
from sparing.memory.turboquant.codebook import lloyd_max_codebook
from sparing.memory.turboquant.definition import tq_dequantize, tq_quantize
from sparing.memory.turboquant.group import CodedGroup
from sparing.models.batch import RaggedBatch, Row

# Of a pass and a layer, all keys and values [kv_heads, S, d], the last T of which are new -> what their codes stand for
# (float64), and which of them each query reads exactly, bool [T, S]. None: the layer has no codes.
Seen = Callable[["Pass", int, Tensor, Tensor, int], tuple[Tensor, Tensor, Tensor] | None]


@dataclass
class Pass:
    """One row's share of a forward.

    entries: per layer int64 [kv_heads, n], None where a layer has no keys; last_round: length at the last eviction.
    """

    memory: Memory
    tokens: Tensor
    causal: bool
    entries: list[Tensor | None]
    output: Tensor
    soft: Tensor | None
    last_round: int


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
            if self is not model or not isinstance(batch, RaggedBatch) or isinstance(batch, MaskedBatch):
                return plain(self, batch, *rest, **options)
            before = [_entries(row.memory) for row in batch.rows]
            hidden = plain(self, batch, *rest, **options)
            soft = rest[0] if name != "forward" and rest else None
            canvases = [row for row in batch.rows if not row.causal]
            signals = [None] * len(batch.rows)
            if soft is not None:
                signals[-len(canvases) :] = soft.split([len(row.tokens) for row in canvases])
            outputs = hidden.split([row.num_wanted for row in batch.rows])
            for row, entries, output, signal in zip(batch.rows, before, outputs, signals, strict=True):
                rounds = row.memory.pruner.evictions if row.memory.pruner is not None else []
                last = rounds[-1]["length"] if rounds else 0
                recording.events.append(Pass(row.memory, row.tokens, row.causal, entries, output, signal, last))
            return hidden

        patch.setattr(type(model), name, forward)

    recording_forward("forward")
    for name in ("denoise_hidden", "mixed_hidden"):
        if hasattr(model, name):
            recording_forward(name)
    commit = Memory.commit

    def recording_commit(self: Memory, n: int, **options: Any) -> None:
        commit(self, n, **options)
        recording.events.append((self, n))

    patch.setattr(Memory, "commit", recording_commit)
    return recording


def _entries(memory: Memory) -> list[Tensor | None]:
    return [
        memory.entries(i).clone() if layer is not None and isinstance(layer.spec, AttentionSpec) else None
        for i, layer in enumerate(memory.layers)
    ]


class MaskedBatch(RaggedBatch):
    """One row over a dense memory, of which each key head of a layer sees only what another memory held in a pass."""

    def __init__(self, row: Row, event: Pass, seen: Seen):
        super().__init__([row])
        self._pass, self._seen = event, seen

    def narrow(self) -> None:
        return None

    def attend(self, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float = 1.0) -> Tensor:
        (row,) = self.rows
        memory = row.memory.layers[layer]
        assert memory is not None and isinstance(memory.spec, AttentionSpec)
        if memory.spec.window is not None:
            return super().attend(layer, q, k, v, scale)
        if k is not None and v is not None:
            memory.write(k, v)
        keys, values = memory.read()  # [kv_heads, committed + T, d]
        committed, new = memory.held, len(q)
        entries, held = self._pass.entries[layer], self._pass.memory.layers[layer]
        assert entries is not None and held is not None and isinstance(held.spec, AttentionSpec)
        visible = torch.zeros(len(keys), new, committed + new, dtype=torch.bool)
        visible[..., :committed].scatter_(-1, entries[:, None].expand(-1, new, -1), True)
        visible[..., committed:] = torch.ones(new, new, dtype=torch.bool).tril() if row.causal else True
        if row.causal and (window := held.spec.window) is not None:
            visible &= torch.ones(new, committed + new, dtype=torch.bool).triu(committed - window + 1)
        grouped = q.unflatten(1, (len(keys), -1)).double() * scale  # [T, kv_heads, group, d]
        coded = self._seen(self._pass, layer, keys, values, new)
        scores = torch.einsum("tkgd,ksd->kgts", grouped, keys.double())
        if coded is not None:
            scores = torch.where(coded[2], scores, torch.einsum("tkgd,ksd->kgts", grouped, coded[0]))
        weights = scores.masked_fill(~visible[:, None], float("-inf")).softmax(-1)
        exact = weights if coded is None else weights * coded[2]
        mixed = torch.einsum("kgts,ksd->tkgd", exact, values.double())
        if coded is not None:
            mixed += torch.einsum("kgts,ksd->tkgd", weights * ~coded[2], coded[1])
        return mixed.flatten(1, 2).to(q.dtype)


def as_they_are(event: Pass, layer: int, keys: Tensor, values: Tensor, new: int) -> None:
    return None


def through_codes(event: Pass, layer: int, keys: Tensor, values: Tensor, new: int) -> Any:
    """TurboQuant by its definition: each vector rotated, rounded, scaled; which of them are codes by position alone."""
    memory = event.memory.layers[layer]
    assert memory is not None
    if not isinstance(memory.group, CodedGroup):
        return None
    form, (number, i) = memory.group.form, memory.group.place(memory.layer)
    layers = memory.group.alike(number)
    coders = {coder.role: coder for coder in layers.coders[i]}
    decoded = []
    for x, bits, role in ((keys, form.k_bits, "keys"), (values, form.v_bits, "values")):
        if role not in coders:
            continue
        rotation = coders[role].quantiser.rotation.matrix.double()
        codebook = lloyd_max_codebook(x.shape[-1], int(bits))
        codes, scales = tq_quantize(x.double(), rotation, int(bits), codebook, form.scale)
        decoded.append(tq_dequantize(codes, scales, rotation, codebook))
    if "keys" not in coders:
        tied = layers.keys_from_values[i]
        decoded.insert(0, tied(decoded[0].float(), torch.arange(keys.shape[1])).double())
    total = keys.shape[1]
    j, i = torch.arange(total), torch.arange(total - new, total)[:, None]
    if not event.causal:
        i = torch.full_like(i, total - new)  # a canvas reads what was codes before it
    exact = (i < (j // form.block + 1) * form.block + form.window) | (j < form.sink_tokens)
    exact &= (j >= event.last_round - form.window) | (j < form.sink_tokens)  # a round makes codes of all others
    if not event.causal or form.prefill == "exact":
        exact[:, total - new :] = True
    return (*decoded, exact)


@torch.inference_mode()
def replay(model: Any, recording: Recording, *, seen: Seen = as_they_are, tolerance: float = 1e-4) -> int:
    """Compute every recorded pass again and compare its outputs; returns how many had entries to hide.

    seen: what queries see of entries, where their storage changes them.
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
        batch = MaskedBatch(Row(event.tokens, memory, causal=event.causal), event, seen)
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
            if layer is not None and isinstance(layer.spec, AttentionSpec)
        )
    return hidden
