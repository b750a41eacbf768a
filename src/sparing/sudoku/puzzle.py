"""Sudoku: the rules, puzzles from random numbers, and the judge. Nothing here knows of a model."""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

__all__ = ["BOXES", "Grid", "is_held_out", "is_solved", "make_puzzle", "solutions", "symmetric_image"]

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size of the grid -> rows and columns of a box
HELD_OUT_SHARE = 8  # one solution grid in this many is never trained on

Grid = np.ndarray  # int64 [size, size], 0 for an empty cell


def is_solved(puzzle: Grid, answer: Grid | None) -> bool:
    """Whether the answer keeps every given and holds each digit once in every row, column and box."""
    size = len(puzzle)
    if answer is None or answer.shape != puzzle.shape or (answer != puzzle)[puzzle > 0].any():
        return False
    digits = np.arange(1, size + 1)
    return all((np.sort(unit) == digits).all() for unit in (*answer, *answer.T, *_boxes(answer)))


def _boxes(grid: Grid) -> Grid:
    """[boxes, cells]"""
    size = len(grid)
    height, width = BOXES[size]
    return grid.reshape(size // height, height, size // width, width).swapaxes(1, 2).reshape(size, size)


def solutions(puzzle: Sequence[int], size: int, limit: int, rng: random.Random | None = None) -> list[list[int]]:
    """Up to `limit` solutions of a puzzle, as flat lists; the emptiest choice is branched first.

    puzzle: flat, 0 for empty. rng: order in which digits are tried (None: rising), so that an empty puzzle gives a
    random grid.
    """
    units = _units(size)
    used = [0] * (3 * size)  # digits as bits, per row, column and box
    grid = list(puzzle)
    for cell, value in enumerate(grid):
        for unit in units[cell] if value else ():
            used[unit] |= 1 << value
    empty = [cell for cell, value in enumerate(grid) if not value]
    everything = (2 << size) - 2
    found: list[list[int]] = []

    def search() -> bool:
        # Branch where fewest digits are free. A cell without any has an empty loop below, which goes back at once.
        best, options, fewest = -1, 0, size + 1
        for cell in empty:
            if not grid[cell]:
                row, column, box = units[cell]
                free = everything & ~(used[row] | used[column] | used[box])
                if (count := free.bit_count()) < fewest:
                    best, options, fewest = cell, free, count
                    if count <= 1:
                        break
        if best < 0:
            found.append(grid.copy())
            return len(found) >= limit
        digits = [d for d in range(1, size + 1) if options >> d & 1]
        if rng is not None:
            rng.shuffle(digits)
        row, column, box = units[best]
        for digit in digits:
            bit = 1 << digit
            grid[best] = digit
            used[row], used[column], used[box] = used[row] | bit, used[column] | bit, used[box] | bit
            if search():
                return True
            used[row], used[column], used[box] = used[row] ^ bit, used[column] ^ bit, used[box] ^ bit
        grid[best] = 0
        return False

    search()
    return found


@lru_cache
def _units(size: int) -> list[tuple[int, int, int]]:
    """Per cell, the indices of its row, column and box among all units."""
    height, width = BOXES[size]
    return [
        (r, size + c, 2 * size + r // height * (size // width) + c // width) for r in range(size) for c in range(size)
    ]


def make_puzzle(size: int, givens: int, rng: random.Random) -> tuple[Grid, Grid]:
    """(puzzle, solution): a random grid with about `givens` cells left at random, and exactly one solution.

    Where the chosen cells leave a second solution, a cell that tells the two apart is given as well, and another
    given is taken back if that does no harm.
    """
    (solution,) = solutions([0] * size**2, size, 1, rng)
    cells = list(range(size**2))
    rng.shuffle(cells)
    given = set(cells[:givens])
    puzzle = [solution[cell] if cell in given else 0 for cell in range(size**2)]
    while len(both := solutions(puzzle, size, 2)) > 1:
        other = both[0] if both[0] != solution else both[1]
        cell = rng.choice([c for c in range(size**2) if other[c] != solution[c]])
        puzzle[cell] = solution[cell]
    for cell in cells[:givens]:
        if sum(map(bool, puzzle)) <= givens:
            break
        without = puzzle.copy()
        without[cell] = 0
        if len(solutions(without, size, 2)) == 1:
            puzzle = without
    return np.array(puzzle).reshape(size, size), np.array(solution).reshape(size, size)


def symmetric_image(puzzle: Grid, solution: Grid, rng: np.random.Generator) -> tuple[Grid, Grid]:
    """The same puzzle with digits renamed and rows, columns, bands and stacks reordered, perhaps transposed."""
    size = len(puzzle)
    height, width = BOXES[size]
    names = np.concatenate([[0], rng.permutation(size) + 1])
    rows = (rng.permutation(size // height)[:, None] * height + _orders(size // height, height, rng)).ravel()
    columns = (rng.permutation(size // width)[:, None] * width + _orders(size // width, width, rng)).ravel()
    images = [names[grid[rows][:, columns]] for grid in (puzzle, solution)]
    if height == width and rng.random() < 0.5:
        images = [image.T for image in images]
    return images[0], images[1]


def _orders(count: int, size: int, rng: np.random.Generator) -> np.ndarray:
    return rng.random((count, size)).argsort(1)


def is_held_out(solution: Grid) -> bool:
    return zlib.crc32(solution.astype(np.uint8).tobytes()) % HELD_OUT_SHARE == 0
