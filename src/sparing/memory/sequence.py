"""Everything a model remembers about one sequence: the ledger that its layers follow."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sparing.config.memory import MemorySpec
from sparing.config.policy import Policy
from sparing.memory.compressed import CompressedGroup
from sparing.memory.group import EntryGroup, Group, Reading, Share, has_entries
from sparing.memory.snapshot import save_memory
from sparing.memory.triattention.pruner import Pruner

__all__ = ["LayerMemory", "Layout", "Memory", "resident_bytes"]


@dataclass(frozen=True, eq=False)
class Layout:
    """Where memories of one policy and model keep what. Of memories that are alike it is the same object.

    sources, per layer of the model: the layer whose entries it reads; places: the number of the group that holds them;
    None where nothing is remembered.
    """

    sources: tuple[int | None, ...]
    places: tuple[int | None, ...]


class Memory:
    """Groups of layers that are alike, moved together: one length, one number of staged tokens.

    A forward pass stages tokens; `commit(n)` keeps the first n of them in every layer and forgets the rest. Nothing
    else changes what is remembered, and whatever raises leaves it as it was.
    """

    def __init__(
        self,
        policy: Policy,
        groups: Sequence[Group],
        layout: Layout,
        pruner: Pruner | None = None,
        model: str | None = None,
    ):
        self.policy, self.pruner = policy, pruner
        self.model = model  # digest of whose entries these are, where it is known
        self.groups = tuple(groups)
        self.layout = layout
        self.length = 0  # tokens ever committed: the logical position of the next token
        self.staged = 0

    @property
    def layers(self) -> list[LayerMemory | None]:
        """Per layer of the model, None where nothing is remembered; one that shares another's entries has that one."""
        of = {i: LayerMemory(self, group, i) for group in self.groups for i in group.layers}
        return [None if i is None else of[i] for i in self.layout.sources]

    @property
    def own(self) -> list[LayerMemory]:
        """The layers that remember something of their own."""
        return [layer for i, layer in enumerate(self.layers) if layer is not None and layer.layer == i]

    @property
    def nbytes(self) -> int:
        """Bytes of all entries held, the head-room of their extents not counted."""
        return sum(group.nbytes for group in self.groups)

    @property
    def depends_on_cuts(self) -> bool:
        """Whether what it holds, or lets be read, differs with how tokens were cut into passes and commits, apart
        from rounding. If so, decoding in other portions may give another text."""
        return any(group.spec(i).depends_on_cuts for group in self.groups for i in group.layers)

    @property
    def held(self) -> int | None:
        """Entries of a growing layer, per key head, under a policy that forgets some; None where it forgets none."""
        return None if self.pruner is None else self.pruner.held(self)

    @property
    def evictions(self) -> list[dict[str, int]]:
        """Every round in which entries were forgotten, see `Pruner`; empty where the policy forgets none."""
        return [] if self.pruner is None else self.pruner.evictions

    def stage(self, n: int, upto: int = 0) -> None:
        """Make room for n tokens more, which a forward pass fills layer by layer; `commit` or `rollback` ends it.

        upto: the length that the text is known to reach, where these are a piece of it. Raises ValueError while others
        are staged.
        """
        if self.staged:
            raise ValueError(f"{self.staged} tokens are staged: commit or roll back before staging more")
        marks = [group.mark() for group in self.groups]
        try:
            for group in self.groups:
                group.stage(n, self.length, max(n, upto - self.length))
            self.staged = n
        except BaseException:
            self._reset(marks)
            raise

    def commit(self, n: int, *, prompt: bool = False) -> None:
        """Keep the first n staged tokens and forget the rest.

        prompt: they were given, not generated. A policy with a budget forgets nothing while a prompt is read, and may
        protect the first one. Raises ValueError if fewer are staged, or if the prompt does not fit the budget. Whatever
        raises, nothing has changed.
        """
        if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= self.staged:
            raise ValueError(f"cannot commit {n!r} tokens: {self.staged} are staged")
        if prompt:
            self.check_prompt(n)
        before = self.length, self.staged
        marks, pruner = [group.mark() for group in self.groups], None if self.pruner is None else self.pruner.state()
        try:
            for group in self.groups:
                group.commit(n, self.staged, self.length)
            self.length, self.staged = self.length + n, 0
            if self.pruner is not None and n:
                self.pruner.committed(self, n, prompt=prompt)
        except BaseException:
            self.length, self.staged = before
            self._reset(marks)
            if self.pruner is not None and pruner is not None:
                self.pruner.restore(pruner)
            raise

    def _reset(self, marks: Sequence[Any]) -> None:
        for group, mark in zip(self.groups, marks, strict=True):
            group.reset(mark)

    def check_prompt(self, n: int) -> None:
        """Raises ValueError if n more tokens of prompt would not fit the policy's budget."""
        if self.pruner is not None:
            self.pruner.check_prompt(n)

    def rollback(self) -> None:
        """Forget all staged tokens, also after a forward that stopped half-way through the layers."""
        self.commit(0)

    def keep(self, index: Mapping[int, Tensor]) -> None:
        """Forget all committed entries but index int64 [kv_heads, m], ascending, of each of these layers.

        Positions and rotations stay. Raises ValueError while tokens are staged, and unless whole groups are named.
        """
        if self.staged:
            raise ValueError(f"{self.staged} tokens are staged: commit or roll back before forgetting entries")
        for group in self.groups:
            if named := [i for i in group.layers if i in index]:
                if not has_entries(group) or len(named) < len(group.layers):
                    raise ValueError(f"layers {named} are not all of a group of layers with entries: {group.layers}")
                group.keep(index)

    def hold_at_least(self, layer: int, entries: int) -> None:
        """Keep at least this many entries of a layer from now on, although its own queries see fewer.

        Raises ValueError for a layer without keys.
        """
        self._with_entries(layer).hold_at_least(entries)

    def reading(self) -> Reading:
        """What passes over a canvas share while it is denoised; each of their rows carries it."""
        return Reading()

    def entries(self, layer: int) -> Tensor:
        """Committed key positions of an attention layer: int64 [kv_heads, n]. Raises ValueError for another layer."""
        found = self.layers[layer]
        if found is not None and isinstance(found.group, CompressedGroup):
            return found.group.entries(layer, self.length)
        return self._with_entries(layer).entries()

    def _with_entries(self, layer: int) -> LayerMemory:
        found = self.layers[layer]
        if found is None or not has_entries(found.group):
            raise ValueError(f"layer {layer} has no keys: it {'keeps a state' if found else 'remembers nothing'}")
        return found

    def fork(self) -> Memory:
        """An independent memory with the same content, in the same extents: nothing is copied, then or later."""
        if self.staged:
            raise ValueError(f"{self.staged} tokens are staged: commit or roll back before forking")
        twin = copy(self)
        twin.groups = tuple(group.fork() for group in self.groups)
        twin.pruner = None if self.pruner is None else self.pruner.fork()
        return twin

    def save(self, path: str | Path, beside: Mapping[str, str] | None = None) -> None:
        """Write to one safetensors file, to be read by `model.load_memory(path)`. beside: texts to keep with it."""
        save_memory(self, path, beside)


class LayerMemory:
    """What a memory holds in one layer. layer: its number in the model."""

    def __init__(self, memory: Memory, group: Group, layer: int):
        self.memory, self.group, self.layer = memory, group, layer

    @property
    def spec(self) -> MemorySpec:
        return self.group.spec(self.layer)

    @property
    def length(self) -> int:
        return self.memory.length

    @property
    def staged(self) -> int:
        return self.memory.staged

    @property
    def held(self) -> int:
        """Committed entries, per key head."""
        return self._attention.held(self.layer) - self.memory.staged

    def write(self, k: Tensor, v: Tensor) -> None:
        """Fill the staged entries. k, v: [T, kv_heads, head_dim], k normed and rotated."""
        self._attention.write(self.layer, k, v)

    def attend(self, q: Tensor, *, scale: float, causal: bool = True) -> Tensor:
        """Mix values for the last T positions, staged ones included. q: [T, heads, head_dim]; returns its shape."""
        share = Share(self.memory.staged, len(q), causal, self.memory.length + self.memory.staged)
        return self.group.together([self.group], [share]).attend(self.layer, q, scale)

    def read(self) -> tuple[Tensor, Tensor]:
        """(keys, values) [kv_heads, n, head_dim] of all entries, staged ones included."""
        return self._attention.read(self.layer)

    def hold_at_least(self, entries: int) -> None:
        """See `Memory.hold_at_least`."""
        self._attention.hold_at_least(entries)

    def entries(self) -> Tensor:
        """Positions of committed entries: int64 [kv_heads, n]."""
        return self._attention.entries(self.layer)[:, : self.held]

    def state(self) -> dict[str, Tensor]:
        """What is saved of it, as named tensors."""
        return self.group.state(self.layer)

    @property
    def _attention(self) -> EntryGroup:
        assert has_entries(self.group)
        return self.group


def resident_bytes(memories: Iterable[Memory]) -> int:
    """Bytes of everything that memories hold, head-room included, what several of them share counted once."""
    found: dict[int, int] = {}
    for memory in list(memories):  # all of them alive: what tells allocations apart is where they are
        for group in memory.groups:
            found |= group.blocks()
    return sum(found.values())
