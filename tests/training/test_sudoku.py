"""Puzzles: one solution each, reproducible by number, held out by solution, judged by the rules."""

from __future__ import annotations

import numpy as np
import pytest

from sparing.sudoku.puzzle import BOXES, is_held_out, is_solved, solutions
from sparing.sudoku.text import make_tokenizer, parse_answer, parse_puzzle, prompt_text
from sparing.training.recipes.sudoku import SudokuData


@pytest.mark.parametrize(("size", "givens"), [(4, (4, 10)), (6, (12, 24)), (9, (36, 60))])
def test_puzzles_have_one_solution_and_it_is_the_stated_one(size: int, givens: tuple[int, int]) -> None:
    data = SudokuData(size, 1, givens, seed=3)
    for index in range(12):
        puzzle, solution = data.puzzle(index)
        assert is_solved(puzzle, solution)
        assert [list(solution.ravel())] == solutions(puzzle.ravel().tolist(), size, 2)
        assert (puzzle > 0).sum() >= givens[0]


def test_four_by_four_has_288_grids() -> None:
    assert len(solutions([0] * 16, 4, 1000)) == 288


def test_a_puzzle_depends_on_its_number_and_seed_alone() -> None:
    a, b = SudokuData(9, 4, (40, 60), 5), SudokuData(9, 7, (40, 60), 5)
    late = a.puzzle(37)
    assert all(np.array_equal(x, y) for x, y in zip(late, b.puzzle(37), strict=True))
    assert not np.array_equal(late[0], SudokuData(9, 4, (40, 60), 6).puzzle(37)[0])


def test_held_out_solutions_are_never_trained_on() -> None:
    data = SudokuData(6, 1, (12, 24), 0)
    assert all(not is_held_out(data.puzzle(i)[1]) for i in range(40))
    held = data.held_out(20)
    assert all(is_held_out(solution) for _, solution in held)
    assert len({puzzle.tobytes() for puzzle, _ in held}) == 20


@pytest.mark.parametrize("size", BOXES)
def test_text_and_ids_agree(size: int) -> None:
    """What the recipe trains on is what the tokenizer makes of the text, and what a decoder prints can be judged."""
    data = SudokuData(size, 2, (size, size * 2), 1)
    puzzles = data.held_out(2)
    examples, tokenizer = data.examples(puzzles), make_tokenizer(size)
    for ids, (puzzle, solution) in zip(examples.ids.tolist(), puzzles, strict=True):
        assert tokenizer.encode(prompt_text(puzzle)).ids == ids[: examples.prefix]
        answer = tokenizer.decode(ids[examples.prefix :])
        assert answer == "\n".join("".join(map(str, row)) for row in solution)
        assert np.array_equal(parse_answer(answer, size), solution)
        assert np.array_equal(parse_puzzle(prompt_text(puzzle)), puzzle)


def test_the_judge_knows_every_rule() -> None:
    puzzle, solution = SudokuData(9, 1, (40, 40), 2).puzzle(0)
    assert is_solved(puzzle, solution)
    assert not is_solved(puzzle, None)
    renamed = np.where(solution == 1, 2, np.where(solution == 2, 1, solution))
    assert not is_solved(puzzle, renamed)  # a proper grid, but not of this puzzle
    empty = np.zeros_like(puzzle)
    assert is_solved(empty, renamed)
    shifted = (np.arange(9)[:, None] + np.arange(9)) % 9 + 1  # rows and columns hold, boxes do not
    assert not is_solved(empty, shifted)


def test_a_plain_grid_can_be_typed() -> None:
    assert np.array_equal(parse_puzzle("1.3. 0000\n.... 4321"), [[1, 0, 3, 0], [0] * 4, [0] * 4, [4, 3, 2, 1]])
    with pytest.raises(ValueError, match="16, 36 or 81 cells, found 5"):
        parse_puzzle("12345")
    with pytest.raises(ValueError, match="digit 9"):
        parse_puzzle("9" + "." * 15)


@pytest.mark.parametrize("text", ["", "1234\n3412\n2143", "1234\n3412\n2143\n432", "1234\n3412\n2143\n43x1"])
def test_a_malformed_answer_is_no_grid(text: str) -> None:
    assert parse_answer(text, 4) is None


def test_held_out_puzzles_are_independent() -> None:
    """Symmetric images of one search would count one puzzle several times; images keep their number of givens."""
    data = SudokuData(9, 1, (30, 70), 4)
    counts = [int((puzzle > 0).sum()) for puzzle, _ in data.held_out(8)]
    assert len(set(counts)) > 4


@pytest.mark.parametrize("givens", [(32, 72), (4, 16), (9, 5), (-1, 3)])
def test_givens_that_do_not_suit_the_grid(givens: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="do not suit a 4x4 grid"):
        SudokuData(4, 1, givens, 0)


def test_an_unknown_size() -> None:
    with pytest.raises(ValueError, match="size is 5: use 4, 6, 9"):
        SudokuData(5, 1, (4, 8), 0)
