"""Entries of a row in extents of their own, as kernels see them."""

from dataclasses import dataclass, field
from typing import Any
from weakref import WeakSet

import torch

from sparing.kernels.rows import Span, places_of

__all__ = ["Held", "spans_of"]


@dataclass
class Held:
    """An extent as kernels see it."""

    data: torch.Tensor
    owner: object = None
    readers: WeakSet[Any] = field(default_factory=WeakSet)

    def __post_init__(self) -> None:
        self.places = places_of(self.data)

    @property
    def capacity(self) -> int:
        return self.data.shape[3]


def spans_of(
    entries: torch.Tensor, cuts: list[int], positions: torch.Tensor | None = None, first: int = 0
) -> list[Span]:
    """Entries [layers, parts, kv_heads, n, size] from number `first` on in extents of their own, cut at these places.

    What surrounds them there is NaN, of bytes 255.
    """
    found = []
    for low, high in zip([0, *cuts], [*cuts, entries.shape[3]], strict=True):
        around = 255 if entries.dtype == torch.uint8 else torch.nan
        room = torch.full((*entries.shape[:3], 5 + high - low, entries.shape[4]), around, dtype=entries.dtype)
        room[..., 3 : 3 + high - low, :] = entries[..., low:high, :]
        scattered = None if positions is None else positions[..., low:high]
        found.append(Span(Held(room), 3, 3 + high - low, first + low, scattered))
    return found
