"""Numbers of a checkpoint that are not finite: refused with the name of their tensor."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

from sparing.errors import CheckpointError

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["check_finite", "copy_checked"]


def check_finite(where: str, numbers: Tensor, stored: Tensor | None = None) -> None:
    """Raises CheckpointError for floating-point numbers among which one is NaN or infinite.

    where: file and tensor; stored: what the numbers were before they changed their type. Costs one pass over them.
    """
    from sparing.kernels.finite import all_finite

    if numbers.is_meta or not numbers.is_floating_point():
        return
    if numbers.itemsize == 1:
        numbers = numbers.float()
    if not all_finite(numbers):
        _refuse(where, numbers, numbers if stored is None else stored)


def copy_checked(where: str, target: Tensor, stored: Tensor) -> None:
    """Copy numbers, of which `check_finite` says the same; in one pass over memory where the types are one."""
    from sparing.kernels.finite import copy_finite

    if target.is_meta or not target.is_floating_point() or target.itemsize == 1:
        check_finite(where, target.copy_(stored), stored)
    elif not copy_finite(target, stored):
        _refuse(where, target, stored)


def _refuse(where: str, numbers: Tensor, stored: Tensor) -> None:
    found = stored[~numbers.isfinite().to(stored.device)][0].item()
    if math.isfinite(found):
        name = str(numbers.dtype).removeprefix("torch.")
        raise CheckpointError(f"{where} holds {found:g}, which {name} cannot hold; load with another dtype")
    raise CheckpointError(
        f"{where} holds numbers that are not finite ({found}); the file is damaged: download it again"
    )
