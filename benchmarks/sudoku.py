"""How many held-out Sudokus the models solve, at once and left to right, by number of givens.

    python benchmarks/sudoku.py [MODEL ...] [--puzzles 1000] [--left-to-right 200]

MODEL: checkpoints of any grid size; the one that ships is "sudoku". Grids of 4x4 and 6x6 come from
`sparing train recipes/sudoku --set size=4 ...` (the exact commands are in docs/models.md).

Puzzles have one solution each, and none of their solution grids was trained on. An answer counts if it keeps every
given and holds each digit once in every row, column and box. Writes benchmarks/results/sudoku.json.
"""

from __future__ import annotations

import argparse
import math

import sparing
from harness import write_result
from sparing.training.evaluate import solve_sudoku
from sparing.training.recipes.sudoku import SudokuData

GIVENS = {4: (8, 6, 5), 6: (20, 16, 14), 9: (60, 50, 45, 40, 36)}  # grid size -> cells given
SEED = 20_26  # of the held-out stream; the model was trained with another


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="*", default=["sudoku"])
    parser.add_argument("--puzzles", type=int, default=1000)
    parser.add_argument("--left-to-right", type=int, default=200, help="puzzles for the slower decoder")
    arguments = parser.parse_args()
    rows = []
    for source in arguments.models:
        model = sparing.load(source, dtype="float32")
        assert model.config.canvas_length is not None
        size = math.isqrt(model.config.canvas_length)  # a canvas holds size rows of size digits and a line end
        for givens in GIVENS[size]:
            puzzles = SudokuData(size, 1, (givens, givens), SEED).held_out(arguments.puzzles)
            for decoder, count in (("block_diffusion", len(puzzles)), ("autoregressive", arguments.left_to_right)):
                row = {"size": size, "givens": givens, "decoder": decoder}
                row |= solve_sudoku(model, puzzles[:count], decoder)
                print(row, flush=True)
                rows.append(row)
    write_result("sudoku", {"rows": rows, "seed": SEED})


if __name__ == "__main__":
    main()
