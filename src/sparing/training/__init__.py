"""Training small models: `train`, the `RECIPES`, and `export` to a checkpoint folder."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparing.training.exporting import export
    from sparing.training.recipe import Recipe
    from sparing.training.run import train

    RECIPES: dict[str, Recipe]

__all__ = ["RECIPES", "export", "train"]

_HOMES = {"export": "exporting", "train": "run"}


def __getattr__(name: str) -> Any:
    if name == "RECIPES":
        names = ("sudoku", "tales", "hybrid")
        return {name: import_module(f"sparing.training.recipes.{name}").RECIPE for name in names}
    if name in _HOMES:
        return getattr(import_module(f"sparing.training.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'sparing.training' has no attribute {name!r}")
