"""The recipes by name, `recipes/tales` and so on: each is a run that can be made again."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparing.training.recipe import Recipe

    RECIPES: dict[str, Recipe]

__all__ = ["RECIPES"]


def __getattr__(name: str) -> Any:
    if name == "RECIPES":
        names = "sudoku", "tales", "hybrid", "compressed"
        found = [import_module(f"sparing.training.recipes.{name}").RECIPE for name in names]
        return {recipe.name: recipe for recipe in found}
    raise AttributeError(f"module 'sparing.training.recipes' has no attribute {name!r}")
