"""How many held-out Sudokus the bundled model solves, at once and left to right, by number of givens.

    python benchmarks/sudoku.py [--puzzles 1000] [--left-to-right 200] [--givens 60 50 45]

Puzzles have one solution each, and none of their solution grids was trained on. An answer counts if it keeps every
given and holds each digit once in every row, column and box. Writes benchmarks/results/sudoku.json.
"""

from __future__ import annotations

import argparse

import sparing
from harness import write_result
from sparing.training.evaluate import solve_sudoku
from sparing.training.sudoku import SudokuData

GIVENS = (60, 50, 45, 40, 36)
SEED = 20_26  # of the held-out stream; the model was trained with another


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="sudoku")
    parser.add_argument("--puzzles", type=int, default=1000)
    parser.add_argument("--left-to-right", type=int, default=200, help="puzzles for the slower decoder")
    parser.add_argument("--givens", type=int, nargs="+", default=GIVENS, help="cells given")
    arguments = parser.parse_args()
    model = sparing.load(arguments.model, dtype="float32")
    rows = []
    for givens in arguments.givens:
        puzzles = SudokuData(9, 1, (givens, givens), SEED).held_out(arguments.puzzles)
        for decoder, count in (("block_diffusion", len(puzzles)), ("autoregressive", arguments.left_to_right)):
            row = {"givens": givens, "decoder": decoder, **solve_sudoku(model, puzzles[:count], decoder)}
            print(row, flush=True)
            rows.append(row)
    write_result("sudoku", {"rows": rows, "seed": SEED})


if __name__ == "__main__":
    main()
