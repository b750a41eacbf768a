"""What a config states, worked out once: a model of many layers has names by the hundred thousand. No torch."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

from sparing.config.roles import Tensors

__all__ = ["stated_once"]


def stated_once(method: Callable[[Any], Tensors]) -> Callable[[Any], Tensors]:
    """A config's `tensors()`, kept with the config, which is frozen; each call gives a copy of its own."""
    name = f"_{method.__name__}"

    @wraps(method)
    def stated(self: Any) -> Tensors:
        if name not in self.__dict__:
            self.__dict__[name] = method(self)
        return dict(self.__dict__[name])

    return stated
