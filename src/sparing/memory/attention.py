"""Memory of attention layers that are alike: all entries, or a sliding window.

Entries are keys and values, or values alone where keys follow from them (`kernels/tied_keys.py`). What is staged
follows what is committed. A window is cut in `commit` and nowhere else: while tokens are staged the layers still hold
every entry that the first of them may see, and a layer that shares another's entries sees exactly what that one saw.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sparing.config.memory import AttentionSpec
from sparing.kernels import KeysFromValues
from sparing.kernels.rows import AttendedRow, RowTable, attend_rows, write_rows
from sparing.memory.extents import Entries, Mark
from sparing.memory.group import Share

__all__ = ["AttentionGroup", "AttentionRows"]


class AttentionGroup:
    """Entries of one sequence in layers of one spec. keys_from_values: of each layer; empty where keys are stored."""

    def __init__(
        self,
        spec: AttentionSpec,
        layers: Sequence[int],
        dtype: torch.dtype,
        device: torch.device,
        keys_from_values: Sequence[KeysFromValues] = (),
    ):
        self.layers, self.keys_from_values = tuple(layers), tuple(keys_from_values)
        self._spec = spec
        parts = 1 if keys_from_values else 2
        self.kept = Entries(len(layers), parts, spec.num_key_value_heads, spec.head_dim, dtype, device)
        self._most = None if spec.window is None else spec.window - 1  # entries kept

    def spec(self, layer: int) -> AttentionSpec:
        return self._spec

    @property
    def nbytes(self) -> int:
        return self.kept.nbytes

    def held(self, layer: int) -> int:
        """Entries of a layer, staged ones included."""
        return len(self.kept)

    def stage(self, n: int, length: int, room: int) -> None:
        self.kept.extend(n, length, room if self._most is None else n)

    def commit(self, n: int, staged: int, length: int) -> None:
        self.kept.truncate(len(self.kept) - staged + n)
        if self._most is not None:
            self.kept.drop(max(0, len(self.kept) - self._most))

    def hold_at_least(self, entries: int) -> None:
        """Keep at least this many entries of a window from now on, although its own queries see fewer."""
        if self._most is not None:
            self._most = max(self._most, entries)

    def keep(self, index: Mapping[int, Tensor]) -> None:
        """Forget all entries of each layer but index int64 [kv_heads, m], ascending; positions and rotations stay."""
        self.kept.keep(torch.stack([index[layer] for layer in self.layers]))

    def mark(self) -> Mark:
        return self.kept.mark()

    def reset(self, mark: Mark) -> None:
        self.kept.reset(mark)

    def fork(self) -> AttentionGroup:
        twin = object.__new__(AttentionGroup)
        twin.__dict__.update(self.__dict__)
        twin.kept = self.kept.fork()
        return twin

    def blocks(self) -> dict[int, int]:
        return self.kept.blocks()

    def write(self, layer: int, k: Tensor | None, v: Tensor) -> None:
        """Fill the staged entries of a layer. k, v: [T, kv_heads, head_dim], k normed and rotated."""
        AttentionRows([self], [Share(len(v), 0, True, len(self.kept))]).write(layer, k, v)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """(keys, values) [kv_heads, n, head_dim] of all entries of a layer."""
        i = self.layers.index(layer)
        values = self.kept.read(i, -1)
        if not self.keys_from_values:
            return self.kept.read(i, 0), values
        return self.keys_from_values[i](values, self.kept.where(i)), values

    def entries(self, layer: int) -> Tensor:
        """Positions of all entries: int64 [kv_heads, n]."""
        return self.kept.where(self.layers.index(layer)).cpu()

    def state(self, layer: int) -> dict[str, Tensor]:
        i = self.layers.index(layer)
        parts = {"values": self.kept.read(i, -1).transpose(0, 1)}
        if not self.keys_from_values:
            parts = {"keys": self.kept.read(i, 0).transpose(0, 1), **parts}
        return parts if self.kept.scattered is None else {**parts, "positions": self.kept.scattered[i]}

    def restore(self, length: int, states: Mapping[int, dict[str, Tensor]]) -> None:
        names = ["values"] if self.keys_from_values else ["keys", "values"]
        found = [states[layer] for layer in self.layers]
        scattered = torch.stack([state["positions"] for state in found]) if "positions" in found[0] else None
        self.kept.restore([[state[name] for name in names] for state in found], length, scattered)

    @staticmethod
    def together(groups: Sequence[AttentionGroup], shares: Sequence[Share]) -> AttentionRows:
        """The same layers of several rows in one pass."""
        return AttentionRows(groups, shares)


class AttentionRows:
    """Layers alike of the rows of a batch, in a pass."""

    def __init__(self, groups: Sequence[AttentionGroup], shares: Sequence[Share]):
        self._layers, self._tied = groups[0].layers, groups[0].keys_from_values
        self._table = RowTable([_attended(group, share) for group, share in zip(groups, shares, strict=True)])

    def write(self, layer: int, k: Tensor | None, v: Tensor) -> None:
        """k, v: [all added tokens, kv_heads, head_dim]."""
        write_rows(self._table, self._layers.index(layer), None if self._tied else k, v)

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """q: [all queries, heads, head_dim], returns its shape."""
        i = self._layers.index(layer)
        return attend_rows(q, self._table, i, scale=scale, keys=self._tied[i] if self._tied else None)

    def narrow(self, queries: Sequence[int]) -> None:
        """From now on this many of each row's newest positions ask."""
        self._table.narrow(queries)


def _attended(group: AttentionGroup, share: Share) -> AttendedRow:
    spec = group.spec(0)
    # Sums begin at fixed positions, so that they do not depend on what a window has dropped before them.
    dropped = share.end - len(group.kept) if spec.rounds is None else 0
    window = share.window or spec.window
    return AttendedRow(group.kept.spans, share.queries, share.end, share.added, share.causal, window, max(0, dropped))
