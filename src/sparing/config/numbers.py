"""What a number given by a user or a file must be: checked in one place, with an error that names it."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping
from typing import Any

from sparing.errors import shown

__all__ = ["flag", "is_count", "number", "token_ids", "whole", "whole_numbers"]


def whole(name: str, value: Any, least: int | None = None, most: int | None = None, hint: str = "") -> int:
    """A whole number of any integer type (of NumPy or PyTorch too), as int.

    Raises ValueError naming the thing for other types (True and 2.0 are none), and outside least ... most.
    """
    bounds = "" if least is None else f"at least {least}" if most is None else f"{least} to {most}"
    found = _index(value)
    if found is None:
        raise ValueError(f"{name} is {shown(value)}: use a whole number{bounds and f' of {bounds}'}{hint}")
    if (least is not None and found < least) or (most is not None and found > most):
        raise ValueError(f"{name} is {shown(found)}: use {bounds}{hint}")
    return found


def is_count(value: Any, most: int) -> bool:
    """Whether this is a whole number as JSON has it, from 0 to `most`."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= most


def whole_numbers(least: int, **numbers: Any) -> list[int]:
    """Several numbers in order, each as `whole` takes it; raises what it raises."""
    return [whole(name, value, least) for name, value in numbers.items()]


def number(name: str, value: Any, wanted: str, low: float = -math.inf, high: float = math.inf) -> float:
    """A number that is not NaN, low <= value <= high, as float. wanted: what to use instead, for the error.

    Raises ValueError naming the thing for anything else; text and truth values are not numbers.
    """
    found = math.nan
    if not _is_flag(value) and not isinstance(value, str | bytes | bytearray | complex):
        try:
            found = float(value)
        except (TypeError, ValueError, OverflowError, RuntimeError):
            found = math.nan
    if not low <= found <= high:
        raise ValueError(f"{name} is {shown(value)}: use {wanted}")
    return found


def flag(name: str, value: Any) -> bool:
    """True or False. Raises ValueError naming the thing for anything else."""
    if not _is_flag(value):
        raise ValueError(f"{name} is {shown(value)}: use True or False")
    return bool(value)


def token_ids(name: str, values: Any, vocab_size: int | None = None) -> tuple[int, ...]:
    """Token ids in order, from a list, tuple, array or tensor [n] of whole numbers of at least 0.

    Raises ValueError naming the thing for anything else, and for ids beyond the vocabulary where its size is given.
    """
    if isinstance(values, str | bytes | bytearray | Mapping) or not isinstance(values, Iterable):
        raise ValueError(f"{name} is {shown(values)}: use a list of token ids")
    try:
        values = list(values)
    except TypeError as error:  # a tensor without dimensions says that it can be iterated over
        raise ValueError(f"{name} is {shown(values)}: use a list of token ids") from error
    ids = tuple(_index(value) for value in values)
    for value, found in zip(values, ids, strict=True):
        if found is None or found < 0:
            raise ValueError(f"{name} holds {shown(value)}: use token ids, whole numbers of at least 0")
        if vocab_size is not None and found >= vocab_size:
            raise ValueError(f"{name} holds {found}: the vocabulary has {vocab_size} entries")
    return ids  # type: ignore[return-value]


def _index(value: Any) -> int | None:
    if _is_flag(value):
        return None
    try:
        return operator.index(value)
    except (TypeError, ValueError, RuntimeError):
        return None


def _is_flag(value: Any) -> bool:
    """Whether a value is a truth value, of NumPy or PyTorch too."""
    return isinstance(value, bool) or "bool" in str(getattr(value, "dtype", ""))
