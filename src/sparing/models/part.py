"""A part of a stack of layers, run on its own: which layers may be one, and what they start from."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparing.config.memory import AttentionSpec, MemorySpec
from sparing.config.numbers import whole
from sparing.errors import shown
from sparing.models.batch import Row

__all__ = ["check_hidden", "owners", "part_of"]


def owners(specs: Sequence[MemorySpec | None]) -> list[int]:
    """Per layer, the one whose entries it reads: itself, unless it shares."""
    shared = [spec.shared_with if isinstance(spec, AttentionSpec) else None for spec in specs]
    return [i if owner is None else owner for i, owner in enumerate(shared)]


def part_of(layers: tuple[int, int], owner_of: Sequence[int]) -> range | None:
    """Layers a to b - 1 of (a, b); None where these are all. owner_of: of every layer of the model, see `owners`.

    Raises ValueError for what is no such pair, and where a layer reads the entries of one before the part.
    """
    count = len(owner_of)
    try:
        first, stop = (whole("a layer", n, 0, count) for n in layers)
    except (TypeError, ValueError):
        first = stop = 0
    if first >= stop:
        raise ValueError(f"layers is {shown(layers)}: give (a, b), 0 <= a < b <= {count}, for the layers a to b - 1")
    if (least := min(owner_of[first:stop])) < first:
        reader = owner_of.index(least, first)
        before = "" if reader == first else f", or stop at {reader}"
        raise ValueError(
            f"layers is {first, stop}: layer {reader} reads the keys and values of layer {least}, which is outside:"
            f" start at {least} or before{before}"
        )
    return None if stop - first == count else range(first, stop)


def check_hidden(row: Row, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> None:
    """Raises ValueError unless the hidden states of a row are [T, *shape], T of its tokens if it has any."""
    sizes = ", ".join(map(str, shape))
    hidden, wanted = row.hidden, f"give {_name(dtype)} [T, {sizes}] on {device}, as the layer before returns them"
    if not isinstance(hidden, Tensor):
        raise ValueError(f"hidden is {shown(hidden)}: {wanted}")
    if hidden.shape[1:] != shape or len(hidden) == 0 or (hidden.dtype, hidden.device) != (dtype, device):
        raise ValueError(f"hidden is {_name(hidden.dtype)} {list(hidden.shape)} on {hidden.device}: {wanted}")
    if row.tokens is not None and len(row.tokens) != len(hidden):
        raise ValueError(f"{len(row.tokens)} tokens stand beside hidden states of {len(hidden)}: give as many")


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
