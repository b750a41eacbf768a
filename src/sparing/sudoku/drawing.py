"""A Sudoku on a terminal: boxes ruled, givens bold."""

from __future__ import annotations

from collections.abc import Sequence

from rich.text import Text

from sparing.sudoku.puzzle import BOXES, Grid

__all__ = ["draw_answer", "draw_grid", "draw_puzzle"]


def draw_grid(cells: Sequence[str], styles: Sequence[str], size: int) -> Text:
    """cells, styles: one per cell, row by row."""
    height, width = BOXES[size]
    rule = "┼".join(["─" * (2 * width + 1)] * (size // width))
    text = Text()
    for row in range(size):
        if row and row % height == 0:
            text.append(f"{rule}\n", "dim")
        for column in range(size):
            if column % width == 0:
                text.append("│ " if column else " ", "dim")
            cell = row * size + column
            text.append(cells[cell], styles[cell]).append(" ")
        text.append("\n")
    text.right_crop(1)
    return text


def draw_puzzle(puzzle: Grid) -> Text:
    flat = [str(value) if value else "." for value in puzzle.ravel().tolist()]
    return draw_grid(flat, ["bold" if value != "." else "dim" for value in flat], len(puzzle))


def draw_answer(puzzle: Grid, answer: Grid) -> Text:
    """A filled grid in which the givens of the puzzle stand out."""
    given = (puzzle > 0).ravel().tolist()
    return draw_grid([str(v) for v in answer.ravel().tolist()], ["bold" if g else "" for g in given], len(puzzle))
