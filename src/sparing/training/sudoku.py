"""Sudoku as text: puzzles from a seed, their layout, and the judge.

A puzzle names each cell, `a1=5 b1=. c1=3 ...`, one row a line, and a cell with its content is one token; the answer
is bare digits, one row a line. So a cell of the answer stands at a fixed distance from its cell in the prompt, which
says where it is.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel

from sparing.training.block_diffusion import Examples

__all__ = [
    "BOXES",
    "SudokuData",
    "is_solved",
    "make_puzzle",
    "make_tokenizer",
    "parse_answer",
    "parse_puzzle",
    "prompt_text",
    "solutions",
]

BOXES = {4: (2, 2), 6: (2, 3), 9: (3, 3)}  # size of the grid -> rows and columns of a box
PAD, EOS, BOS, UNK, NEWLINE, DIGIT = 0, 1, 2, 3, 4, 5  # token ids; the digit d is DIGIT + d - 1
HELD_OUT_SHARE = 8  # one solution grid in this many is never trained on
VALIDATION_PUZZLES = 64  # of the validation curve
VARIANTS = 8  # symmetric images taken of each puzzle that was searched for

Grid = np.ndarray  # int64 [size, size], 0 for an empty cell


def prompt_text(puzzle: Grid) -> str:
    """The puzzle as the model reads it: columns are letters, rows numbers, an empty cell is a dot."""
    return "".join(
        " ".join(f"{chr(97 + c)}{r + 1}={value or '.'}" for c, value in enumerate(row)) + "\n"
        for r, row in enumerate(puzzle)
    )


def parse_puzzle(text: str) -> Grid:
    """A puzzle from `prompt_text`, or from rows of digits with 0 or . for empty cells. Raises ValueError if neither."""
    named = re.findall(r"[a-i][1-9]=([1-9.])", text)
    cells = named or re.findall(r"[0-9.]", text)
    size = int(len(cells) ** 0.5)
    if size not in BOXES or size * size != len(cells):
        raise ValueError(f"a puzzle has 16, 36 or 81 cells, found {len(cells)}: write 0 or . for an empty one")
    values = [0 if cell == "." else int(cell) for cell in cells]
    if (largest := max(values)) > size:
        raise ValueError(f"the digit {largest} does not belong into a puzzle of size {size}")
    return np.array(values).reshape(size, size)


def parse_answer(text: str, size: int) -> Grid | None:
    """The grid that an answer states, or None if it is not `size` rows of `size` digits."""
    rows = text.strip().split("\n")
    if len(rows) != size or any(len(row) != size or not re.fullmatch("[1-9]+", row) for row in rows):
        return None
    return np.array([[int(cell) for cell in row] for row in rows])


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


def make_tokenizer(size: int) -> Tokenizer:
    """The tokenizer of one grid size: specials, newline, digits, then every cell with every content."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "\n", *map(str, range(1, size + 1))]
    words += [
        f"{chr(97 + c)}{r + 1}={value or '.'}" for r in range(size) for c in range(size) for value in range(size + 1)
    ]
    tokenizer = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.add_special_tokens(words[:4])
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(" ", "removed"),
            pre_tokenizers.Split(Regex(r"\n|[a-i][1-9]=[1-9.]|[1-9]"), "isolated"),
        ]
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


def cell_id(size: int, row: int, column: int, value: int) -> int:
    """Token id of a prompt cell; value 0 is the empty cell."""
    return DIGIT + size + (row * size + column) * (size + 1) + value


class SudokuData:
    """Batches by number: puzzle i of a seed is the same in every run, and never has a held-out solution."""

    def __init__(self, size: int, batch_size: int, givens: tuple[int, int], seed: int):
        """givens: the smallest and largest number of given cells, drawn evenly.

        Raises ValueError for a size that is not 4, 6 or 9, or givens that leave no cell empty.
        """
        if size not in BOXES:
            raise ValueError(f"size is {size}: use {', '.join(map(str, BOXES))}")
        if not 0 <= givens[0] <= givens[1] < size**2:
            raise ValueError(
                f"givens_min {givens[0]} and givens_max {givens[1]} do not suit a {size}x{size} grid:"
                f" use 0 <= givens_min <= givens_max < {size**2}"
            )
        self.size, self.batch_size, self.givens, self.seed = size, batch_size, givens, seed
        self._searched: dict[tuple[int, bool], tuple[Grid, Grid]] = {}  # the last one searched for

    def batch(self, step: int) -> Examples:
        first = step * self.batch_size
        return self.examples([self.puzzle(first + i) for i in range(self.batch_size)])

    def puzzle(self, index: int, held_out: bool = False) -> tuple[Grid, Grid]:
        """(puzzle, solution) number `index` of the training or of the held-out stream."""
        source = (index // VARIANTS, held_out)
        if source not in self._searched:
            rng = random.Random(f"{self.seed} {source}")
            self._searched = {source: make_puzzle(self.size, rng.randint(*self.givens), rng)}
        rng = np.random.default_rng((self.seed, index, held_out))
        while True:
            puzzle, solution = symmetric_image(*self._searched[source], rng)
            if is_held_out(solution) == held_out:
                return puzzle, solution

    def examples(self, puzzles: Sequence[tuple[Grid, Grid]]) -> Examples:
        """Token ids of puzzles and solutions; the last newline of an answer is the end id."""
        size, n = self.size, len(puzzles)
        puzzle, solution = (np.stack(grids) for grids in zip(*puzzles, strict=True))
        ids = np.full((n, 2, size, size + 1), NEWLINE)
        ids[:, 0, :, :size] = DIGIT + size + np.arange(size * size).reshape(size, size) * (size + 1) + puzzle
        ids[:, 1, :, :size] = DIGIT + solution - 1
        ids[:, 1, -1, -1] = EOS
        ids = np.concatenate([np.full((n, 1), BOS), ids.reshape(n, -1)], 1)
        return Examples(torch.from_numpy(ids), 1 + size * (size + 1), torch.ones(n, 1, dtype=torch.bool))

    def held_out(self, count: int) -> list[tuple[Grid, Grid]]:
        """The first held-out puzzles, no two alike, each searched for on its own: none is made as another's image."""
        distinct: dict[bytes, tuple[Grid, Grid]] = {}
        index = 0
        while len(distinct) < count:
            puzzle, solution = self.puzzle(index, held_out=True)
            distinct.setdefault(puzzle.tobytes(), (puzzle, solution))
            index += VARIANTS
        return list(distinct.values())

    @property
    def tokenizer(self) -> Tokenizer:
        return make_tokenizer(self.size)

    def validation(self) -> list[Examples]:
        return [self.examples(self.held_out(VALIDATION_PUZZLES))]
