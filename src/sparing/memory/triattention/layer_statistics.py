"""Statistics of one layer's queries, and what every file of them must hold."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

__all__ = ["MOST", "PARTS", "LayerStatistics", "expect_parts"]

PARTS = ("q_mean_real", "q_mean_imag", "q_abs_mean")
MOST = 4096  # layers, heads or bands: beyond it a file is nonsense


@dataclass(frozen=True)
class LayerStatistics:
    """Of one layer's query heads, F bands each.

    center: complex64 [heads, F], mean query; norm: float32 [heads, F], mean of |query|, all zero for a head without
    statistics; inv_freq: float32 [<= F] and scaling: the rotation they were made under (None: the file does not say).
    """

    center: Tensor
    norm: Tensor
    inv_freq: Tensor | None = None
    scaling: float = 1.0


def expect_parts(where: str, parts: Sequence[Any], *sizes: int) -> None:
    """Raises ValueError unless these are the parts of statistics as every file holds them.

    parts: mean real, mean imaginary and norm, real tensors of one shape: sizes, then heads (where sizes are given) and
    bands; finite, and the norm not negative.
    """
    shapes: list[Any] = [tuple(part.shape) if isinstance(part, Tensor) else type(part).__name__ for part in parts]
    rank = len(sizes) + (2 if sizes else 1)
    for name, part, shape in zip(PARTS, parts, shapes, strict=True):
        if not isinstance(part, Tensor) or not part.is_floating_point() or part.is_sparse or part.ndim != rank:
            raise ValueError(f"{name} {where} is {shape}, expected real numbers of {rank} dimensions")
        if shape != shapes[0] or shape[: len(sizes)] != sizes or not all(0 < n <= MOST for n in shape):
            raise ValueError(f"{name} {where} has shape {list(shape)}, {PARTS[0]} {list(shapes[0])}")
    if not all(part.isfinite().all() for part in parts) or (parts[2] < 0).any():
        raise ValueError(f"the numbers {where} are not finite, or the norm is negative")
