"""TriAttention: forget the entries that queries to come are expected to look at least.

After a commit of generated tokens, integers alone decide whether a round is due. Then every growing layer's keys are
scored by all query heads that read them, the best `size` stay, and the rest is deleted: keys, values or codes, and
positions. Nothing is rotated anew; the next token keeps its true position.
Source: TriAttention arXiv 2604.04921; the formulas are in `memory/triattention/scores.py`.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from sparing.config.memory import RecurrentSpec
from sparing.config.numbers import is_count
from sparing.config.policy import Budget, Policy
from sparing.config.protocol import ModelConfig
from sparing.memory.triattention.scores import triattention_keep
from sparing.memory.triattention.statistics import ScoredLayer, Statistics, geometry, scored_layers


class Pruned(Protocol):
    """What it forgets entries of: a `Memory`."""

    length: int

    @property
    def layers(self) -> Sequence[Any]: ...

    def keep(self, index: Mapping[int, Tensor]) -> None: ...


__all__ = ["Pruner", "make_pruner"]

ROUND = {"length", "held", "kept", "evicted"}  # what is told of an eviction


@dataclass(frozen=True)
class Voters:
    """All query heads that read the entries of one layer: its own, and those of layers that share with it.

    center: complex64 [heads, F], norm: float32 [heads, F], heads ordered by the key head they read; inv_freq: float32
    [<= F], scaling: of the layer's rotation.
    """

    layer: int
    center: Tensor
    norm: Tensor
    inv_freq: Tensor
    scaling: float


class Pruner:
    """Forgets entries of one sequence; forked, saved and loaded with its memory.

    The first prompt ends with the first generated token. Prompts of later turns are read like it, without a round, but
    their entries are then scored as all others. evictions: a dict for each round: "length", tokens so far; per key head
    "held" before and "kept" after it; "evicted".
    """

    def __init__(self, budget: Budget, mode: str, voters: Sequence[Voters], digest: str):
        self.budget, self.mode, self.voters, self._digest = budget, mode, voters, digest
        self.prompt = 0  # tokens of the first prompt so far
        self.answering = False
        self.peak = 0  # most entries a growing layer held at once
        self.evictions: list[dict[str, int]] = []

    @property
    def protected(self) -> int:
        """First entries that are neither scored nor forgotten."""
        return self.prompt if self.budget.protect_prompt else 0

    def check_prompt(self, n: int) -> None:
        """Raises ValueError if a first prompt of n tokens more leaves nothing of the budget to choose."""
        budget, prompt = self.budget, self.prompt + n
        if self.answering or not budget.protect_prompt or not budget.count_prompt:
            return
        room = budget.size - prompt
        if room <= 0:
            raise ValueError(
                f"the prompt has {prompt} tokens and is protected, the budget is {budget.size}: raise the budget,"
                " or use count_prompt=false (prompt on top of the budget) or protect_prompt=false"
            )
        protected = budget.protect_recent + max(0, budget.protect_sinks - prompt)
        if protected >= room:
            raise ValueError(
                f"the prompt of {prompt} tokens leaves {room} of the budget of {budget.size}, and {protected} recent"
                " and first entries are protected: raise the budget"
            )

    def held(self, memory: Pruned) -> int:
        """Entries that each growing layer holds."""
        return memory.layers[self.voters[0].layer].held

    def committed(self, memory: Pruned, n: int, *, prompt: bool) -> None:
        """Take note of n tokens just committed, and forget entries if a round is due."""
        held, length = self.held(memory), memory.length
        self.peak = max(self.peak, held)
        if prompt:
            self.prompt += 0 if self.answering else n
            return
        self.answering = True
        uncounted = 0 if self.budget.count_prompt else self.prompt
        if self.budget.rounds.due(held - uncounted, length - n, length):
            self._evict(memory, held, length)

    @torch.no_grad()
    def _evict(self, memory: Pruned, held: int, length: int) -> None:
        budget, protected = self.budget, self.protected
        all_layers = memory.layers
        layers = [all_layers[voters.layer] for voters in self.voters]
        choose = budget.size - (protected if budget.count_prompt else 0)  # of the entries that are scored
        kept = triattention_keep(
            (layer.read()[0][:, protected:] for layer in layers),
            [voters.center for voters in self.voters],
            [voters.norm for voters in self.voters],
            [voters.inv_freq for voters in self.voters],
            t0=length,
            keep=choose,
            mode=self.mode,
            max_offset=budget.max_offset,
            aggregation=budget.aggregation,
            group=budget.group,
            attention_scaling=[voters.scaling for voters in self.voters],
            protect_recent=budget.protect_recent,
            protect_sinks=max(0, budget.protect_sinks - protected),
            trig=budget.trig,
            norm_weighting=budget.norm_weighting,
        )
        stay_of: dict[int, Tensor] = {}
        for i, (layer, voters) in enumerate(zip(layers, self.voters, strict=True)):
            index = kept[i] if self.mode == "per_layer_per_head" else kept
            assert isinstance(index, Tensor)
            index = index.expand(layer.spec.num_key_value_heads, -1) + protected  # [kv_heads, choose]
            prompt = torch.arange(protected, device=index.device).expand(len(index), -1)
            stay_of[voters.layer] = torch.cat([prompt, index], 1)
        memory.keep(stay_of)
        stay = protected + choose
        self.evictions = [*self.evictions, {"length": length, "held": held, "kept": stay, "evicted": held - stay}]

    def options(self) -> dict[str, Any]:
        """What a saved memory and the one that loads it must have in common."""
        budget = self.budget
        stated = {name: getattr(budget, name) for name in budget.__dataclass_fields__ if name != "statistics"}
        return {**stated, "statistics": self._digest}

    def state(self) -> dict[str, Any]:
        return {
            "prompt": self.prompt,
            "answering": self.answering,
            "peak": self.peak,
            "evictions": self.evictions,
        }

    @staticmethod
    def check(state: Any, length: int) -> None:
        """Raises ValueError unless this is what `state` gives after `length` tokens."""
        if not isinstance(state, dict) or state.keys() != {"prompt", "answering", "peak", "evictions"}:
            raise ValueError("pruner is not the state of a memory with a budget")
        for name in ("prompt", "peak"):
            if not is_count(state[name], length):
                raise ValueError(f"pruner: {name} is {state[name]!r}, expected a whole number from 0 to {length}")
        if not isinstance(state["answering"], bool) or not isinstance(state["evictions"], list):
            raise ValueError("pruner: answering must be true or false, and evictions a list")
        for one in state["evictions"]:
            if not isinstance(one, dict) or one.keys() != ROUND or not all(is_count(n, length) for n in one.values()):
                raise ValueError(f"pruner: an eviction is {one!r}, expected counts of {', '.join(sorted(ROUND))}")

    def restore(self, state: dict[str, Any]) -> None:
        self.prompt, self.answering, self.peak = state["prompt"], state["answering"], state["peak"]
        self.evictions = [dict(round) for round in state["evictions"]]

    def fork(self) -> Pruner:
        twin = Pruner(self.budget, self.mode, self.voters, self._digest)
        twin.restore(self.state())
        return twin


def make_pruner(
    config: ModelConfig, policy: Policy, *, weights: str, device: torch.device, remembered: range | None = None
) -> Pruner | None:
    """Who forgets entries under a policy with a budget; None if none of the remembered layers grows.

    weights: digest of the model's query weights, see `weights_digest`; remembered: layers of the memory (None: all),
    which alone choose what stays. Raises ValueError for missing statistics or those of another model, and where the
    method is not defined.
    """
    budget = policy.keep
    assert isinstance(budget, Budget)
    layers = scored_layers(config)
    nope = next((layer.layer for layer in layers if layer.rope is None), None)
    if nope is not None and not budget.allow_nope:
        raise ValueError(
            f"layer {nope} has no RoPE: to score its entries by content alone,"
            f" use triattention:{budget.size},allow_nope=true"
        )
    if budget.statistics is None:
        by_content = f" (of layer {nope} too: its keys are scored by their product with the mean query)"
        raise ValueError(
            f"kv={policy.kv!r} needs statistics=: make them with sparing.calibrate(model, text) or"
            " `sparing calibrate MODEL --text FILE --out STATISTICS`, then --statistics STATISTICS"
            f"{'' if nope is None else by_content}"
        )
    found = budget.statistics
    if not isinstance(found, Statistics | str | os.PathLike):
        raise ValueError(f"statistics is a {type(found).__name__}, expected Statistics or the path of their file")
    statistics = found if isinstance(found, Statistics) else Statistics.load(Path(found))
    if statistics.geometry not in (None, geometry(config)):
        raise ValueError("the statistics were made for a model of another config: calibrate this one")
    if statistics.weights not in (None, weights):
        warnings.warn("the statistics were made with other weights: calibrate this model", stacklevel=2)
    if any(isinstance(spec, RecurrentSpec) for spec in config.memory_specs()):
        warnings.warn(
            "this model attends in few layers: pruning them can lose single facts that perplexity does not show",
            stacklevel=2,
        )
    if not (layers := [layer for layer in layers if remembered is None or layer.layer in remembered]):
        return None
    owners = sorted({layer.owner for layer in layers})
    voters = [_voters(owner, [s for s in layers if s.owner == owner], statistics, device) for owner in owners]
    kv_heads = {layer.owner: layer.kv_heads for layer in layers}
    obstacle = _obstacle_to_heads(voters, kv_heads, across_layers=budget.mode != "per_layer_per_head")
    if budget.mode in ("per_head", "per_layer_per_head") and obstacle:
        raise ValueError(f"mode={budget.mode!r} {obstacle}: use mode=global")
    mode = budget.mode or ("global" if obstacle else "per_head")
    return Pruner(budget, mode, voters, statistics.digest)


def _obstacle_to_heads(voters: Sequence[Voters], kv_heads: Mapping[int, int], across_layers: bool) -> str | None:
    """Why key heads cannot choose for themselves, if so. across_layers: one choice of a head for all layers."""
    if across_layers and len(set(kv_heads.values())) > 1:
        return f"needs the same number of key heads in all layers, found {sorted(set(kv_heads.values()))}"
    for one in voters:
        silent = (one.norm > 0).any(-1).view(kv_heads[one.layer], -1).any(-1).logical_not()
        if silent.any():
            j = int(silent.int().argmax())
            return f"needs statistics of every key head, and no query head of layer {one.layer}, key head {j} has any"
    return None


def _voters(owner: int, readers: Sequence[ScoredLayer], statistics: Statistics, device: torch.device) -> Voters:
    """Heads of all readers of one storage, those of the same key head together."""
    found = [statistics.of(reader) for reader in readers]
    kv_heads = readers[0].kv_heads
    # [readers, heads, F] -> heads by key head, then by reader
    center = torch.cat([one.center.unflatten(0, (kv_heads, -1)) for one in found], 1).flatten(0, 1)
    norm = torch.cat([one.norm.unflatten(0, (kv_heads, -1)) for one in found], 1).flatten(0, 1)
    inv_freq, scaling = readers[0].rotation
    return Voters(owner, center.to(device), norm.to(device), inv_freq.to(device), scaling)
