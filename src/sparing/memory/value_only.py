"""Storage for layers whose keys and values come from one projection: values alone, half the bytes, exact.

Keys are made when they are read, see `kernels/tied_keys.py`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing import kernels
from sparing.kernels import KeysFromValues
from sparing.memory.dense import Buffer, Where

__all__ = ["ValueOnlyStorage"]


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

    def keep(self, index: Tensor) -> None:
        self._values.keep(index)

    def settle(self) -> None:
        pass

    def hold_decoded(self, on: bool) -> None:
        pass

    def attend(self, q: Tensor, where: Where, *, scale: float, causal: bool, window: int | None) -> Tensor:
        values, keys = self._values.view, self._keys_from_values
        return kernels.attention_over_values(q, values, keys, where, scale=scale, causal=causal, window=window)

    def read(self, where: Where) -> tuple[Tensor, Tensor]:
        values = self._values.view
        if isinstance(where, int):
            where = torch.arange(where, where + len(self), device=values.device)
        return self._keys_from_values(values, where), values

    @property
    def nbytes(self) -> int:
        return self._values.nbytes

    def fork(self) -> ValueOnlyStorage:
        return ValueOnlyStorage(self._values.fork(), self._keys_from_values)

    def state(self) -> dict[str, Tensor]:
        return {"values": self._values.view.transpose(0, 1)}

    def restore(self, state: dict[str, Tensor]) -> None:
        self._values.append(state["values"])
