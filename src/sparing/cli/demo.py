"""`sparing demo`: a grid that settles everywhere at once, a tale told canvas by canvas, a text repaired."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sparing.models.base import LanguageModel

__all__ = ["demo"]

OPENING = "Once upon a time there was a king who had three sons"
REPAIR = ("The king said to his daughter, ", "You zmust marry the wolf prince, and go wgith him to his housse.")


@click.command()
@click.option("--puzzles", type=int, default=3, show_default=True, help="Sudokus to solve.")
@click.option("--puzzle", help="Solve this one: rows of digits, 0 or . for an empty cell.")
@click.option("--seed", type=int, default=1, show_default=True)
@click.option("--threads", type=click.IntRange(1), help="CPU threads (default: all).")
def demo(puzzles: int, puzzle: str | None, seed: int, threads: int | None) -> None:
    """Watch the two models that ship: Sudoku, then a fairy tale."""
    from sparing.cli.options import load_model

    model = load_model("sudoku", "float32", "auto", threads, None)
    _solve(model, puzzles, puzzle, seed)
    if puzzle is None:
        model = load_model("tales", "float32", "auto", threads, None)
        _tell(model, seed)
        _mend(model, seed)


def _say(text: str) -> None:
    print(text, flush=True)


def _run(model: LanguageModel, prompt: str, **options: Any) -> tuple[str, str]:
    """Show one answer; returns (its text, its speeds)."""
    import sparing
    from sparing.cli.render import choose, show, speeds

    text: list[str] = []

    def recorded(events: Any) -> Any:
        for event in events:
            if isinstance(event, sparing.Commit):
                text.append(event.text)
            yield event

    done = show(recorded(sparing.generate(model, prompt, **options)), choose(False, 1, model.tokenizer))
    return "".join(text), speeds(done)


def _solve(model: LanguageModel, count: int, puzzle: str | None, seed: int) -> None:
    from sparing.training.sudoku import SudokuData, is_solved, parse_answer, parse_puzzle, prompt_text

    size = round(((4 * model.config.canvas_length + 1) ** 0.5 - 1) / 2)  # canvas = size * (size + 1)
    givens = (round(0.4 * size**2), round(0.6 * size**2))
    grids = [parse_puzzle(puzzle)] if puzzle else [p for p, _ in SudokuData(size, 1, givens, seed).held_out(count)]
    for i, grid in enumerate(grids):
        if len(grid) != size:
            raise ValueError(f"the bundled model solves {size}x{size} puzzles, this one is {len(grid)}x{len(grid)}")
        _say(f"\nSudoku {i + 1}, {(grid > 0).sum()} of {size**2} cells given:\n")
        _say("\n".join(" ".join(str(v) if v else "." for v in row) for row in grid) + "\n")
        for decoder in ("block_diffusion", "autoregressive"):
            name = "all cells at once" if decoder == "block_diffusion" else "the same weights, left to right"
            _say(f"{name}:")
            answer, speed = _run(
                model, prompt_text(grid), decoder=decoder, seed=seed, max_new_tokens=model.config.canvas_length
            )
            solved = is_solved(grid, parse_answer(answer, size))
            _say(f"{'solved' if solved else 'NOT solved'}: {speed}\n")


def _tell(model: LanguageModel, seed: int) -> None:
    _say(f"\nA tale, canvas by canvas. It begins: {OPENING}\n")
    _, speed = _run(model, OPENING, seed=seed, max_new_tokens=192)
    _say(speed)
    _say("\nThe same weights, word by word:\n")
    options = {"decoder": "autoregressive", "temperature": 0.7, "top_p": 0.95}
    _, speed = _run(model, OPENING, seed=seed, max_new_tokens=192, **options)
    _say(speed)


def _mend(model: LanguageModel, seed: int) -> None:
    from sparing.cli.options import canvas_ids

    prompt, garbled = REPAIR
    canvas = canvas_ids(model, garbled)[: model.config.canvas_length]
    _say(f"\nRepair. Given: {prompt}{garbled}\n")
    _run(model, prompt, canvas=canvas, seed=seed, max_new_tokens=len(canvas))
    if sys.stdout.isatty():
        _say("")
