"""`sparing demo`: a grid that settles everywhere at once, a tale told canvas by canvas, a text repaired."""

from __future__ import annotations

import random
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.options import Count, threads_option

if TYPE_CHECKING:
    from sparing.cli.render import Outcome, View
    from sparing.models.base import LanguageModel
    from sparing.sudoku.puzzle import Grid

__all__ = ["demo"]

OPENING = "Once upon a time there was a king who had three sons"
BEFORE = "The king had a daughter who was so beautiful that her like was not to be found in all the land. "
SENTENCE = "One day she went out into the forest and sat down under a tree by the side of a cool well."
GIVEN = (0.65, 0.8)  # share of cells given; docs/models.md: 97 % solved at 50 of 81, 100 % at 60
GARBLED = 0.2  # share of tokens replaced
MENDING = {"max_denoising_steps": 8}  # the noise after the text, which is cut off, need not settle
PACE = 0.15  # seconds a step is shown when someone watches; the times reported leave it out


@click.command()
@click.option("--puzzles", type=Count(), default=3, show_default=True, help="How many Sudokus to solve.")
@click.option("--puzzle", help="Solve only this Sudoku: rows of digits, with 0 or . for an empty cell.")
@click.option("--fast", is_flag=True, help="Do less of everything, without a pause between steps.")
@click.option("--seed", type=int, default=1, show_default=True, help="The same seed gives the same output.")
@threads_option
def demo(puzzles: int, puzzle: str | None, fast: bool, seed: int, threads: int | None) -> None:
    """Solve Sudokus, tell a fairy tale, repair a text."""
    from sparing.cli.options import load_model
    from sparing.errors import CheckpointError
    from sparing.text import one_line

    missing = None
    parts = {"sudoku": [_solve], "tales": [_tell, _mend]}
    for name in ("sudoku",) if puzzle else parts:
        try:
            model = load_model(name, threads=threads)
        except CheckpointError as error:
            missing = error
            print(f"\n{name}: left out, {one_line(str(error))}", flush=True)
            continue
        for part in parts[name]:
            if part is _solve:
                _solve(model, puzzle, 1 if fast else puzzles, seed, 0.0 if fast else PACE)
            else:
                part(model, seed, fast)
    if missing is not None:
        raise missing


def _run(model: LanguageModel, prompt: Any, view: View, **options: Any) -> Outcome:
    import sparing
    from sparing.cli.render import show

    return show(sparing.generate(model, prompt, **options), view)


def _solve(model: LanguageModel, puzzle: str | None, count: int, seed: int, pace: float) -> None:
    from sparing.cli.sudoku import grid_of, size_of
    from sparing.training.recipes.sudoku import SudokuData

    size = size_of(model)
    if puzzle is not None:
        grids = [grid_of(model, puzzle)]
    else:
        givens = (round(GIVEN[0] * size**2), round(GIVEN[1] * size**2))
        grids = [grid for grid, _ in SudokuData(size, 1, givens, seed).held_out(count)]
    print(f"\nSudoku, {size}x{size}. Every cell at once: no order, no search, only denoising steps.", flush=True)
    at_once = [_solve_at_once(model, grid, seed, pace) for grid in grids]
    print(f"\nThe same weights, left to right, one digit a pass: {_left_to_right(model, grids)}")
    print(f"All at once: {_summary(at_once)}", flush=True)


def _solve_at_once(model: LanguageModel, grid: Grid, seed: int, pace: float) -> tuple[bool, Outcome]:
    from rich.console import Console

    from sparing.cli.render import Silent, has_live_terminal
    from sparing.cli.sudoku import GridView
    from sparing.sudoku.drawing import draw_answer, draw_puzzle
    from sparing.sudoku.puzzle import is_solved
    from sparing.sudoku.text import parse_answer, prompt_text
    from sparing.text import printable

    console = Console(highlight=False)
    print(f"\n{(grid > 0).sum()} of {grid.size} cells given:\n", flush=True)
    console.print(draw_puzzle(grid))
    print(flush=True)
    live = has_live_terminal()
    view = GridView(model.tokenizer, grid, console, pace) if live else Silent()
    outcome = _run(model, prompt_text(grid), view, seed=seed, max_new_tokens=model.config.canvas_length)
    answer = parse_answer(outcome.texts.get(0, ""), len(grid))
    if not live:
        print(printable(outcome.texts.get(0, "")) if answer is None else draw_answer(grid, answer).plain)
    solved = is_solved(grid, answer)
    verdict = "Solved, judged by the rules" if solved else "NOT solved, judged by the rules"
    print(f"\n{verdict}: {outcome.total('denoising_steps')} denoising steps.\n{outcome.speeds()}", flush=True)
    return solved, outcome


def _left_to_right(model: LanguageModel, grids: list[Grid]) -> str:
    from sparing.cli.render import Silent
    from sparing.sudoku.puzzle import is_solved
    from sparing.sudoku.text import parse_answer, prompt_text

    results = []
    for grid in grids:
        options = {"decoder": "autoregressive", "temperature": 0.0, "max_new_tokens": model.config.canvas_length}
        outcome = _run(model, prompt_text(grid), Silent(), **options)
        results.append((is_solved(grid, parse_answer(outcome.texts.get(0, ""), len(grid))), outcome))
    return _summary(results)


def _summary(results: list[tuple[bool, Outcome]]) -> str:
    tokens, forwards = (sum(outcome.total(name) for _, outcome in results) for name in ("new_tokens", "forwards"))
    seconds = sum(outcome.seconds for _, outcome in results)
    return (
        f"{sum(solved for solved, _ in results)} of {len(results)} solved, "
        f"{tokens / forwards:.2f} tokens per forward pass, {tokens / seconds:.0f} tokens/s"
    )


def _tell(model: LanguageModel, seed: int, fast: bool) -> None:
    from sparing.cli.render import choose

    length = 64 if fast else 192
    speeds = {}
    for name, options in (
        ("canvas by canvas", {}),
        ("word by word, the same weights", {"decoder": "autoregressive", "temperature": 0.7, "top_p": 0.95}),
    ):
        print(f"\nA tale told {name}. It begins: {OPENING} ...\n", flush=True)
        outcome = _run(model, OPENING, choose(1, model.tokenizer), seed=seed, max_new_tokens=length, **options)
        speeds[name] = outcome.speeds()
    print()
    for name, speed in speeds.items():
        print(f"{name[0].upper()}{name[1:]}: {speed}", flush=True)


def _mend(model: LanguageModel, seed: int, fast: bool) -> None:
    from sparing.cli.render import choose

    assert model.tokenizer is not None
    rng = random.Random(seed)
    ids = model.tokenizer.encode(SENTENCE, add_special_tokens=False)[: model.config.canvas_length]
    words = [i for i in range(model.config.vocab_size) if i not in model.tokenizer.special_ids]
    places = sorted(rng.sample(range(len(ids)), max(1, round(GARBLED * len(ids)))))
    garbled = [rng.choice(words) if i in places else token for i, token in enumerate(ids)]
    print(f"\nA text repaired. {len(places)} of its {len(ids)} tokens were replaced at random:\n")
    print(_plain(model, garbled) + "\n", flush=True)
    options = {"canvas": garbled, "seed": seed, "max_new_tokens": len(ids), **MENDING}
    outcome = _run(model, BEFORE, choose(1, model.tokenizer), **options)
    got = outcome.ids[0] + [-1] * (len(ids) - len(outcome.ids[0]))  # -1: the text ended early
    restored = sum(got[i] == ids[i] for i in places)
    kept = sum(got[i] == ids[i] for i in range(len(ids)) if i not in places)
    print(f"\n{restored} of {len(places)} restored, {kept} of the other {len(ids) - len(places)} kept.")
    print("Try it: sparing generate tales 'text before' --canvas 'some <?> and <?3> unknown' --fix given", flush=True)


def _plain(model: LanguageModel, ids: list[int]) -> str:
    from sparing.cli.live import pieces

    assert model.tokenizer is not None
    return "".join(pieces(model.tokenizer, ids))
