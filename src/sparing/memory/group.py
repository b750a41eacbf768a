"""What a memory is made of: groups of layers that are alike, moved by one ledger."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, Self, TypeGuard

from torch import Tensor

from sparing.config.memory import AttentionSpec, MemorySpec

__all__ = ["EntryGroup", "Group", "Reading", "Share", "allocations", "has_entries"]


class Reading:
    """What passes over one canvas keep for those that follow, because all of them read the same entries.

    Dropped when the canvas is done; nobody else holds it.
    """

    def __init__(self) -> None:
        self._kept: dict[int, tuple[Any, tuple[Tensor, ...]]] = {}

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensors in self._kept.values() for tensor in tensors)

    def find(self, layer: int, made_of: Any) -> tuple[Tensor, ...] | None:
        """What is kept of a layer, unless it was made of anything else."""
        found = self._kept.get(layer)
        return found[1] if found is not None and found[0] == made_of else None

    def keep(self, layer: int, made_of: Any, tensors: tuple[Tensor, ...]) -> None:
        self._kept[layer] = made_of, tensors


@dataclass
class Share:
    """What a row brings to a pass.

    added: tokens it stages; queries: how many of the newest positions ask; causal: False where all of them see each
    other; end: the position after the last; window: entries that a query sees, the last ones (None: as the spec says);
    reading: of a canvas, where passes over it follow.
    """

    added: int
    queries: int
    causal: bool
    end: int
    window: int | None = None
    reading: Reading | None = None


class Group(Protocol):
    """Layers alike of one sequence. layers: their numbers in the model.

    Whatever a group holds is replaced, never changed, so that `mark` is cheap and `fork`, `nbytes` and `state` change
    nothing. Which pass they have part in together with the groups of other rows, `together` says.
    """

    layers: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of what is held, staged tokens included."""
        ...

    def spec(self, layer: int) -> MemorySpec:
        """Of a layer of the model."""
        ...

    def stage(self, n: int, length: int, room: int) -> None:
        """Make room for n tokens after `length` committed ones, of a text that goes on for `room` tokens."""
        ...

    def commit(self, n: int, staged: int, length: int) -> None:
        """Keep the first n of the staged tokens that follow `length` committed ones, and forget the rest."""
        ...

    def mark(self) -> Any:
        """What `reset` needs to bring back what is held now."""
        ...

    def reset(self, mark: Any) -> None: ...

    def fork(self) -> Self:
        """A group of its own with the same content."""
        ...

    def blocks(self) -> dict[int, int]:
        """Bytes of every allocation that it holds, shared or not, by what tells it apart."""
        ...

    def state(self, layer: int) -> dict[str, Tensor]:
        """What `restore` needs of a layer, as named tensors."""
        ...

    def restore(self, length: int, states: Mapping[int, dict[str, Tensor]]) -> None:
        """Take over the states of a memory in which `length` tokens were committed, of each layer."""
        ...

    @staticmethod
    def together(groups: Sequence[Any], shares: Sequence[Share]) -> Any:
        """The same group of several rows in one pass."""
        ...


class EntryGroup(Group, Protocol):
    """Layers of attention, which hold entries."""

    def held(self, layer: int) -> int:
        """Entries of a layer, staged ones included."""
        ...

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Fill the staged entries of a layer. k, v: [T, kv_heads, head_dim], k normed and rotated."""
        ...

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """(keys, values) [kv_heads, n, head_dim] of all entries of a layer."""
        ...

    def entries(self, layer: int) -> Tensor:
        """Positions of all entries: int64 [kv_heads, n]."""
        ...

    def keep(self, index: Mapping[int, Tensor]) -> None:
        """Forget all entries of each layer but index int64 [kv_heads, m], ascending; positions and rotations stay."""
        ...

    def hold_at_least(self, entries: int) -> None:
        """Keep at least this many of the newest entries from now on, although the group's own queries see fewer."""
        ...


def has_entries(group: Group) -> TypeGuard[EntryGroup]:
    """Whether its layers attend."""
    return isinstance(group.spec(group.layers[0]), AttentionSpec)


def allocations(tensors: Iterable[Tensor | None]) -> dict[int, int]:
    """Bytes of each allocation that tensors lie in, by its address."""
    storages = [tensor.untyped_storage() for tensor in tensors if tensor is not None]
    return {storage.data_ptr(): storage.nbytes() for storage in storages}
