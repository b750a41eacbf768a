"""Sudoku as text: how a model reads a puzzle and writes its answer.

A puzzle names each cell, `a1=5 b1=. c1=3 ...`, one row a line, and a cell with its content is one token; the answer
is bare digits, one row a line. So a cell of the answer stands at a fixed distance from its cell in the prompt, which
says where it is.
"""

from __future__ import annotations

import re

import numpy as np
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import WordLevel

from sparing.sudoku.puzzle import BOXES, Grid

__all__ = [
    "BOS",
    "DIGIT",
    "EOS",
    "NEWLINE",
    "PAD",
    "cell_id",
    "make_tokenizer",
    "parse_answer",
    "parse_puzzle",
    "prompt_text",
]

PAD, EOS, BOS, UNK, NEWLINE, DIGIT = 0, 1, 2, 3, 4, 5  # token ids; the digit d is DIGIT + d - 1


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
