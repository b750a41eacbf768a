"""A memory policy prepared for one model, from which the memory of each sequence is made."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from sparing.config.memory import AttentionSpec, CompressedSpec, MemorySpec, RecurrentSpec
from sparing.config.policy import Policy, apply_policy, settled
from sparing.kernels import KeysFromValues
from sparing.memory.attention import AttentionGroup
from sparing.memory.compressed import CompressedGroup
from sparing.memory.group import Group
from sparing.memory.recurrent import RecurrentGroup
from sparing.memory.sequence import Layout, Memory
from sparing.memory.triattention.pruner import Pruner
from sparing.memory.turboquant.group import coded_group
from sparing.memory.turboquant.key_bias import KeyBias

__all__ = ["MemoryPlan", "plan_memory"]


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
    model: str | None = None,
    layers: range | None = None,
) -> MemoryPlan:
    """A policy prepared for the memories of one model.

    specs: the model's, before the policy. keys_from_values: per layer, how keys follow from values where the spec is
    `value_only` (else None). key_biases: per layer, the bias in its keys (None: none that can be told apart).
    pruner: who forgets entries, where the policy has a budget. model: digest of whose entries they are.
    layers: those that are remembered (None: all), of what the policy makes of the whole model.
    """
    specs, policy = apply_policy(specs, policy), settled(policy, specs)
    specs = [None if layers and i not in layers else spec for i, spec in enumerate(specs)]
    groups, coded, alike = list[Group](), dict[int, AttentionSpec](), dict[tuple[MemorySpec, bool], list[int]]()
    for i, spec in enumerate(specs):
        if isinstance(spec, AttentionSpec) and spec.shared_with is not None:
            continue
        if isinstance(spec, AttentionSpec) and spec.codes is not None and policy.store is not None:
            coded[i] = spec
        elif spec is not None:
            alike.setdefault((spec, keys_from_values[i] is not None), []).append(i)
    for (spec, is_tied), numbers in alike.items():
        if isinstance(spec, RecurrentSpec):
            groups.append(RecurrentGroup(spec, numbers, dtype, device))
        elif isinstance(spec, CompressedSpec):
            groups.append(CompressedGroup(spec, numbers, dtype, device))
        elif isinstance(spec, AttentionSpec):
            rebuild = [
                found for i in numbers if (found := keys_from_values[i]) is not None and is_tied and spec.value_only
            ]
            groups.append(AttentionGroup(spec, numbers, dtype, device, rebuild))
    if coded and policy.store is not None:
        made = coded_group(
            policy.kv,
            policy.store,
            coded,
            dtype=dtype,
            device=device,
            keys_from_values=keys_from_values,
            key_biases=key_biases,
        )
        groups.append(made)
    layout = _layout(tuple(specs), tuple((type(group), group.layers) for group in groups))
    return MemoryPlan(Memory(policy, groups, layout, pruner, model), specs)


@cache
def _layout(specs: tuple[MemorySpec | None, ...], groups: tuple[tuple[type, tuple[int, ...]], ...]) -> Layout:
    holders = {i: number for number, (_, layers) in enumerate(groups) for i in layers}
    sources = tuple(_source(i, spec) for i, spec in enumerate(specs))
    return Layout(sources, tuple(None if source is None else holders[source] for source in sources))


def _source(layer: int, spec: MemorySpec | None) -> int | None:
    """The layer whose entries a layer reads."""
    if isinstance(spec, AttentionSpec) and spec.shared_with is not None:
        return spec.shared_with
    return None if spec is None else layer
