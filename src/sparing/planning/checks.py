"""Numbers that a plan is asked for with. Never imports torch."""

from __future__ import annotations

from numbers import Integral

__all__ = ["check_whole"]


def check_whole(least: int, **numbers: int | None) -> None:
    """Raises ValueError naming the first number that is not whole or is below `least`; None stands for none."""
    for name, value in numbers.items():
        if value is not None and (isinstance(value, bool) or not isinstance(value, Integral) or value < least):
            raise ValueError(f"{name} is {value!r}, expected a whole number of at least {least}")
