"""Storage for layers whose keys and values come from one projection: values alone, half the bytes, exact.

With u the shared projection, v = rms(u) and k = rope(rms(u) * w, position), so k = rope(v * w, position).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparing.memory.dense import Buffer

__all__ = ["ValueOnlyStorage"]

KeysFromValues = Callable[[Tensor, Tensor], Tensor]  # (values [n, kv_heads, d], positions [n]) -> keys, same shape


class ValueOnlyStorage:
    """Values, and the function that turns them into keys at their positions."""

    def __init__(self, values: Buffer, keys_from_values: KeysFromValues):
        self._values = values
        self._keys_from_values = keys_from_values

    def __len__(self) -> int:
        return len(self._values)

    def append(self, k: Tensor, v: Tensor) -> None:
        self._values.append(v)

    def truncate(self, n: int) -> None:
        self._values.truncate(n)

    def drop_first(self, n: int) -> None:
        self._values.drop_first(n)

    def read(self, first_position: int) -> tuple[Tensor, Tensor]:
        values = self._values.view
        positions = torch.arange(first_position, first_position + len(self), device=values.device)
        keys = self._keys_from_values(values.transpose(0, 1), positions)
        return keys.transpose(0, 1), values

    @property
    def nbytes(self) -> int:
        return self._values.nbytes

    def fork(self) -> ValueOnlyStorage:
        return ValueOnlyStorage(self._values.fork(), self._keys_from_values)

    def state(self) -> dict[str, Tensor]:
        return {"values": self._values.view.transpose(0, 1)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._values.append(state["values"])
