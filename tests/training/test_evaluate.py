"""What the tables of docs/models.md count: with decoders that are made up, so that the right figure is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from sparing.decoding.events import Commit, Done, Draft
from sparing.sudoku.text import prompt_text
from sparing.training import evaluate
from sparing.training.block_diffusion import Examples
from sparing.training.evaluate import ROWS, repair, solve_sudoku, tell_tales, words_of
from sparing.training.recipes.sudoku import SudokuData


def rows(text: str, size: int) -> str:
    return "\n".join(text[i : i + size] for i in range(0, size * size, size))


def test_solved_puzzles_are_counted_by_the_rules(monkeypatch):
    puzzles = SudokuData(4, 1, (6, 6), seed=1).held_out(ROWS + 2)
    solutions = {prompt_text(puzzle): "".join(map(str, solution.ravel())) for puzzle, solution in puzzles}
    wrong = {prompt_text(puzzle) for puzzle, _ in puzzles[:5]}
    asked = []

    def generate(model, prompts, **options):
        asked.append((len(prompts), options["decoder"], options["seed"], options["max_new_tokens"]))
        for row, prompt in enumerate(prompts):
            text = solutions[prompt][::-1] if prompt in wrong else solutions[prompt]
            yield Commit(row, [3] * 20, rows(text, 4))
            yield Done(row, "eos", {"forwards": 4})

    monkeypatch.setattr(evaluate, "generate", generate)
    found = solve_sudoku(None, puzzles, "block_diffusion")  # type: ignore[arg-type]
    assert asked == [(ROWS, "block_diffusion", 0, 20), (2, "block_diffusion", ROWS, 20)]
    assert found["solved"] == pytest.approx(1 - 5 / len(puzzles))
    assert (found["puzzles"], found["forwards"], found["tokens_per_forward"]) == (ROWS + 2, 4.0, 5.0)


def test_words_at_the_ends_of_an_answer_do_not_count(monkeypatch):
    def generate(model, prompts, **options):
        for row in range(len(prompts)):
            yield Commit(row, [3] * 4, "ng said the ")
            yield Commit(row, [3] * 4, "qwx, don't go")
            yield Done(row, "length", {"forwards": 16})

    monkeypatch.setattr(evaluate, "generate", generate)
    found = tell_tales(None, ["a", "b"], {"said", "the", "don't"}, "autoregressive")  # type: ignore[arg-type]
    assert (found["words"], found["real_words"]) == (8, 0.75)  # said the qwx don't, twice
    assert found["tokens_per_forward"] == 0.5
    assert words_of("The king's 'Oh!' '' 12") == ["the", "king's", "oh"]


@pytest.mark.parametrize(("mends", "restored", "kept"), [(True, 1.0, 1.0), (False, 0.0, 1.0)])
def test_what_is_repaired_is_what_changed_and_came_back(monkeypatch, mends, restored, kept):
    model = SimpleNamespace(config=SimpleNamespace(canvas_length=50, vocab_size=100))
    target = torch.arange(50)
    ids = torch.cat([torch.tensor([7, 8]), target])[None].repeat(3, 1)
    examples = Examples(ids=ids, prefix=2, valid=torch.ones(3, 1, dtype=torch.bool))
    garbled = []

    def generate(model, prompt, *, canvas, **options):
        assert prompt == [7, 8] and options["decoder"] == "block_diffusion"
        garbled.append(sum(a != b for a, b in zip(canvas, target.tolist(), strict=True)))
        draft = target.tolist() if mends else canvas
        yield Draft(0, canvas, [True] * 50, 1, [0.0] * 50)
        yield Draft(0, draft, [True] * 50, 2, [0.0] * 50)
        yield Done(0, "length", {})

    monkeypatch.setattr(evaluate, "generate", generate)
    found = repair(model, [examples], 0.2)  # type: ignore[arg-type]
    assert (found["canvases"], found["passes"], found["changed"]) == (3, 2.0, sum(garbled))
    assert 0 < found["changed"] < 75
    assert (found["restored_first_pass"], found["kept_first_pass"]) == (0.0, 1.0)
    assert (found["restored_end"], found["kept_end"]) == (restored, kept)
