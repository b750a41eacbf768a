"""Training small models: `train`, the `RECIPES`, and `export` to a checkpoint folder."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparing.training.exporting import export
    from sparing.training.recipes import RECIPES
    from sparing.training.run import train

__all__ = ["RECIPES", "export", "train"]

_HOMES = {"RECIPES": "recipes", "export": "exporting", "train": "run"}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"sparing.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sparing.training' has no attribute {name!r}")
