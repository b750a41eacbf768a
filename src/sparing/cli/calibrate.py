"""`sparing calibrate`: statistics of a model's queries, which TriAttention needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sparing.cli.options import LOADING, load_model, model_options

__all__ = ["calibrate"]


@click.command()
@click.argument("model")
@click.option(
    "--text",
    "files",
    multiple=True,
    required=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Any coherent text, 50,000 tokens are plenty (repeatable).",
)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
@click.option("--length", type=click.IntRange(1), help="Longest sequence read as one (default: 32768 or the context).")
@click.option(
    "--add", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Add to these statistics of MODEL."
)
@model_options
def calibrate(
    model: str, files: tuple[Path, ...], out: Path, length: int | None, add: Path | None, **options: Any
) -> None:
    """Read texts with MODEL and write the statistics that --kv triattention:N chooses entries by.

    Then: sparing generate -m MODEL --kv triattention:2048 --statistics OUT
    """
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text, byte {error.start}") from error
    loaded = load_model(model, **{name: options.pop(name) for name in LOADING})
    import sparing

    with _Progress() as progress:
        found = sparing.calibrate(loaded, texts, length=length, progress=progress)
    if add is not None:
        found = sparing.Statistics.load(add).merge(found)
    found.save(out)
    r = found.concentration()
    click.echo(
        f"{out}: {found.tokens} tokens, {len(found.layers)} layers of {r.shape[1]} heads; queries of"
        f" {(r > 0.95).float().mean():.0%} of the heads agree in direction (R > 0.95 in their two strongest bands,"
        f" median {r.median():.2f})"
    )


class _Progress:
    """A bar on a terminal, a line every tenth of the way elsewhere."""

    def __enter__(self):
        self.bar: Any = None
        self.said = 0
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress

            self.bar = Progress(console=Console(stderr=True))
            self.task = self.bar.add_task("calibrating", total=None)
            self.bar.start()
        return self.show

    def show(self, done: int, total: int) -> None:
        if self.bar is not None:
            self.bar.update(self.task, completed=done, total=total)
        elif (tenth := 10 * done // total) > self.said:
            self.said = tenth
            print(f"{done} of {total} tokens", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        if self.bar is not None:
            self.bar.stop()
