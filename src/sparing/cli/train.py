"""`sparing train`: run a recipe, resume it, make a checkpoint of it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.options import key_values, threads_option
from sparing.training.recipe import OPTIMIZERS

if TYPE_CHECKING:
    from rich.progress import Progress

__all__ = ["train"]


@click.command()
@click.argument("recipe")
@click.option("--out", type=click.Path(file_okay=False, path_type=Path), required=True, help="Folder for the run.")
@click.option("--steps", type=int, help="Length of the whole run; the learning rate falls towards its end.")
@click.option("--minutes", type=float, help="Stop after this long, and save.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same seed gives the same weights.")
@click.option(
    "--set", "changes", metavar="NAME=VALUE", multiple=True, help="Change a setting of the recipe (repeatable)."
)
@click.option(
    "--optimizer",
    type=click.Choice(OPTIMIZERS),
    help="AdamW for all, or Muon for matrices and AdamW for the rest (default: the recipe's).",
)
@click.option("--resume", is_flag=True, help="Go on with the run in --out from where it was saved.")
@click.option(
    "--export",
    type=click.Path(file_okay=False, path_type=Path),
    help="Do not train: write the run in --out as a checkpoint to this folder.",
)
@threads_option
def train(
    recipe: str,
    out: Path,
    steps: int | None,
    minutes: float | None,
    seed: int,
    changes: tuple[str, ...],
    optimizer: str | None,
    resume: bool,
    export: Path | None,
    threads: int | None,
) -> None:
    """Train a small model by RECIPE.

    RECIPE is recipes/sudoku, recipes/tales or recipes/hybrid: how the model of that name was made. recipes/compressed
    makes a small DeepSeek-V4, which does not come with the package.

    A run is saved every few minutes and on Ctrl-C (exit code 130). Resumed, even after a kill -9, it gives the
    same bits as one that was never interrupted. Only one process at a time can train in a folder.
    """
    from sparing import training

    if recipe not in training.RECIPES:
        full = f"recipes/{recipe}"
        hint = f"write {full}" if full in training.RECIPES else f"use {', '.join(training.RECIPES)}"
        raise ValueError(f"recipe {recipe!r} is not known, {hint}")
    if export is not None:
        click.echo(f"written: {training.export(out, export)}")
        return
    from sparing.training.exporting import recipe_of

    settings = key_values(changes) | ({} if optimizer is None else {"optimizer": optimizer})
    planned = recipe_of(out)[0] if resume else training.RECIPES[recipe]
    with _progress(steps or planned.with_settings(settings).steps) as log:
        training.train(
            training.RECIPES[recipe],
            out,
            steps=steps,
            minutes=minutes,
            threads=threads,
            seed=seed,
            set=settings,
            resume=resume,
            log=log,
        )


class _progress:
    """A bar on a terminal, plain lines elsewhere; both show every record."""

    def __init__(self, total: int):
        self.total = total
        self.bar: Progress | None = None

    def __enter__(self):
        from sparing.training.run import print_record

        if not sys.stdout.isatty():
            return print_record
        from rich.progress import Progress

        self.bar = bar = Progress()
        task = bar.add_task("training", total=self.total)
        bar.start()

        def log(record: dict[str, Any]) -> None:
            print_record(record)  # rich prints above the bar
            if "step" in record:
                bar.update(task, completed=record["step"])

        return log

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()
