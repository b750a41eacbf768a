"""Everything a model remembers about one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from sparing.config.memory import MemorySpec, RecurrentSpec
from sparing.config.policy import Policy, apply_policy
from sparing.kernels import KeysFromValues
from sparing.memory.attention import AttentionMemory
from sparing.memory.dense import Buffer, KeyValueStorage, Storage
from sparing.memory.recurrent import RecurrentMemory
from sparing.memory.snapshot import LayerMemory, save_memory
from sparing.memory.triattention.pruner import Pruner
from sparing.memory.turboquant.key_bias import KeyBias
from sparing.memory.turboquant.logit_noise import LogitNoise, warn_of_noise
from sparing.memory.turboquant.storage import turboquant_storage
from sparing.memory.value_only import ValueOnlyStorage

__all__ = ["LayerMemory", "Memory", "MemoryPlan", "plan_memory"]


class Memory:
    """One memory per layer, moved together. `layers[i]` of a consumer layer is its producer's object, and None where a
    layer remembers nothing.

    A forward pass stages tokens; `commit(n)` keeps the first n of them in every layer and forgets the rest. Nothing
    else changes what is remembered, and a forward that raises leaves it as it was.
    """

    def __init__(self, layers: Sequence[LayerMemory | None], policy: Policy, pruner: Pruner | None = None):
        self.layers = list(layers)
        self.policy = policy
        self.pruner = pruner
        # Without the consumers' references and the layers that remember nothing.
        self.own = list({id(layer): layer for layer in layers if layer is not None}.values())

    @property
    def length(self) -> int:
        """Tokens ever committed: the logical position of the next token."""
        return self.own[0].length

    @property
    def staged(self) -> int:
        return self.own[0].staged

    @property
    def nbytes(self) -> int:
        """Bytes of all entries held. A buffer's head-room (at most 256 entries a layer) is not counted."""
        return sum(layer.nbytes for layer in self.own)

    @property
    def depends_on_cuts(self) -> bool:
        """Whether what it holds, or lets be read, differs with how tokens were cut into passes and commits, apart
        from rounding. If so, decoding in other portions may give another text."""
        return any(layer.spec.depends_on_cuts for layer in self.own)

    @property
    def held(self) -> int | None:
        """Entries of a growing layer, per key head, under a policy that forgets some; None where it forgets none."""
        return None if self.pruner is None else self.pruner.held(self.layers)

    @property
    def evictions(self) -> list[dict[str, int]]:
        """Every round in which entries were forgotten, see `Pruner`; empty where the policy forgets none."""
        return [] if self.pruner is None else self.pruner.evictions

    def commit(self, n: int, *, prompt: bool = False) -> None:
        """Keep the first n staged tokens and forget the rest.

        prompt: they were given, not generated. A policy with a budget forgets nothing while a prompt is read, and may
        protect the first one. Raises ValueError if fewer are staged, or if the prompt does not fit the budget.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= self.staged:
            raise ValueError(f"cannot commit {n!r} tokens: {self.staged} are staged")
        if prompt:
            self.check_prompt(n)
        for layer in self.own:
            layer.commit(n)
        if self.length == n and n:
            self._say_noise()
        if self.pruner is not None and n:
            self.pruner.committed(self.layers, n, prompt=prompt)

    def _say_noise(self) -> None:
        """Warn, after the first tokens, of what codes will do to attention."""
        coded = {i: m.noise for i, m in enumerate(self.layers) if isinstance(m, AttentionMemory) and m.noise}
        if self.policy.store is not None and coded:
            warn_of_noise(self.policy.kv, self.policy.store, coded)
        for layer in self.own:
            if isinstance(layer, AttentionMemory):
                layer.noise = None

    def check_prompt(self, n: int) -> None:
        """Raises ValueError if n more tokens of prompt would not fit the policy's budget."""
        if self.pruner is not None:
            self.pruner.check_prompt(n)

    def rollback(self) -> None:
        """Forget all staged tokens, also after a forward that stopped half-way through the layers."""
        for layer in self.own:
            layer.commit(0)

    def hold_decoded(self, on: bool) -> None:
        """Whether passes over a canvas share the entries that the first of them decodes from codes.

        They are then held in the model's dtype, which `nbytes` counts, until they are given back with on=False. A fork
        holds none.
        """
        for layer in self.own:
            if isinstance(layer, AttentionMemory):
                layer.storage.hold_decoded(on)

    def entries(self, layer: int) -> Tensor:
        """Committed key positions of an attention layer: int64 [kv_heads, n]. Raises ValueError for another layer."""
        memory = self.layers[layer]
        if not isinstance(memory, AttentionMemory):
            raise ValueError(f"layer {layer} has no keys: it {'keeps a state' if memory else 'remembers nothing'}")
        return memory.entries()

    def fork(self) -> Memory:
        """An independent memory with the same content; tensors are copied when either side writes."""
        if self.staged:
            raise ValueError(f"{self.staged} tokens are staged: commit or roll back before forking")
        twins: dict[int, LayerMemory] = {id(layer): layer.fork() for layer in self.own}
        pruner = None if self.pruner is None else self.pruner.fork()
        return Memory([twins.get(id(layer)) for layer in self.layers], self.policy, pruner)

    def save(self, path: str | Path) -> None:
        """Write to one safetensors file, to be read by `model.load_memory(path)`."""
        save_memory(self, path)


class MemoryPlan:
    """A policy prepared for one model: parsed, statistics read, queries digested, codebooks and rotations made.

    policy: taken apart; specs: per layer, as the policy changes them. A row's memory then costs allocations alone.
    """

    def __init__(self, empty: Memory, specs: Sequence[MemorySpec | None]):
        self.policy, self.specs = empty.policy, list(specs)
        self._empty = empty

    def memory(self) -> Memory:
        """An empty memory for one sequence."""
        return self._empty.fork()


def plan_memory(
    specs: Sequence[MemorySpec | None],
    policy: Policy,
    *,
    dtype: torch.dtype,
    device: torch.device,
    keys_from_values: Sequence[KeysFromValues | None],
    key_biases: Sequence[KeyBias | None],
    pruner: Pruner | None = None,
) -> MemoryPlan:
    """A policy prepared for the memories of one model.

    specs: the model's, before the policy. keys_from_values: per layer, how keys follow from values where the spec is
    `value_only` (else None). key_biases: per layer, the bias in its keys (None: none that can be told apart).
    pruner: who forgets entries, where the policy has a budget.
    """
    specs, layers = apply_policy(specs, policy), list[LayerMemory | None]()
    for i, (spec, rebuild) in enumerate(zip(specs, keys_from_values, strict=True)):
        if spec is None:
            layers.append(None)
            continue
        if isinstance(spec, RecurrentSpec):
            layers.append(RecurrentMemory(spec, dtype, device, i))
            continue
        if spec.shared_with is not None:
            layers.append(layers[spec.shared_with])
            continue
        values = Buffer(spec.num_key_value_heads, spec.head_dim, dtype, device)
        storage: Storage
        noise = None
        if spec.codes is not None and policy.store is not None:
            role = "values" if spec.value_only and rebuild is not None else "keys"
            noise = LogitNoise(policy.store, spec.head_dim, key_biases[i], role)
            storage = turboquant_storage(
                spec,
                policy.store,
                i,
                dtype=dtype,
                device=device,
                keys_from_values=rebuild,
                bias=key_biases[i],
            )
        elif spec.value_only and rebuild is not None:
            storage = ValueOnlyStorage(values, rebuild)
        else:
            storage = KeyValueStorage(Buffer(spec.num_key_value_heads, spec.head_dim, dtype, device), values)
        layers.append(AttentionMemory(spec, storage, noise))
    return MemoryPlan(Memory(layers, policy, pruner), specs)
