"""The canvas of a Sudoku model as a grid, every cell in the colour of its token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from sparing.cli.live import LiveView
from sparing.decoding.events import Commit
from sparing.sudoku.drawing import draw_grid
from sparing.sudoku.puzzle import BOXES, Grid
from sparing.sudoku.text import parse_puzzle

if TYPE_CHECKING:
    from sparing.models.base import LanguageModel

__all__ = ["GridView", "grid_of", "size_of"]


def size_of(model: LanguageModel) -> int:
    """Size of the grids a model was trained on: its canvas holds `size` rows of `size` digits and a line end."""
    length = model.config.canvas_length
    size = next((size for size in BOXES if size * (size + 1) == length), None)
    if size is None:
        raise ValueError(f"a canvas of {length} tokens does not hold a Sudoku")
    return size


def grid_of(model: LanguageModel, text: str) -> Grid:
    """A puzzle that a person typed. Raises ValueError if it is none, or not of the model's size."""
    grid, size = parse_puzzle(text), size_of(model)
    if len(grid) != size:
        raise ValueError(f"this model solves {size}x{size} puzzles, the one given is {len(grid)}x{len(grid)}")
    return grid


class GridView(LiveView):
    """The canvas of a Sudoku model as a grid."""

    def __init__(self, tokenizer: Any, puzzle: Grid, console: Console | None = None, pace: float = 0.0):
        super().__init__(tokenizer, console, pace)
        self.puzzle = puzzle

    def canvas(self, ids: Sequence[int], styles: Sequence[str]) -> Text:
        size = len(self.puzzle)
        # A canvas is rows of `size` digits, each row with its line end; a token that is not a digit is shown as a dot.
        places = [row * (size + 1) + column for row in range(size) for column in range(size)]
        texts = [self.tokenizer.id_to_token(ids[place]) or "" for place in places]
        given = (self.puzzle > 0).ravel().tolist()
        return draw_grid(
            [text if len(text) == 1 and text.isdigit() else "·" for text in texts],
            [f"bold {styles[place]}" if held else styles[place] for place, held in zip(places, given, strict=True)],
            size,
        )

    def final(self, event: Commit) -> Text:
        size = len(self.puzzle)
        if len(event.ids) != size * (size + 1):
            return super().final(event)  # it ended early: not a grid
        return self.canvas(event.ids, [""] * len(event.ids))
