"""`sparing calibrate`: statistics of a model's queries, which TriAttention needs."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.options import LOADING, load_model, model_options

if TYPE_CHECKING:
    from sparing.memory.triattention.statistics import Statistics

__all__ = ["calibrate"]


@click.command()
@click.argument("model")
@click.option(
    "--text",
    "files",
    multiple=True,
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Any coherent text (repeatable).",
)
@click.option(
    "--tokens",
    type=click.IntRange(1),
    default=50_000,
    show_default=True,
    help="About how many tokens to read at most, the same share of each text from its beginning.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Instead of texts: convert this file of the method's authors (.pt) or a TRIA file.",
)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="File to write.")
@click.option("--length", type=click.IntRange(1), help="Longest sequence read as one (default: 32768 or the context).")
@click.option(
    "--add", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Add to these statistics of MODEL."
)
@model_options
def calibrate(
    model: str,
    files: tuple[Path, ...],
    tokens: int,
    source: Path | None,
    out: Path,
    length: int | None,
    add: Path | None,
    **options: Any,
) -> None:
    """Read texts with MODEL and write the statistics that --kv triattention:N chooses entries by.

    With --from they are those of a file of others, if they fit MODEL. No weights are read then, so the file must be of
    MODEL's own: a fine-tune has other queries.

    Then: sparing generate MODEL PROMPT --kv triattention:2048 --statistics OUT
    """
    if source is not None and files:
        raise click.UsageError("give --text or --from, not both")
    if source is None and not files:
        raise click.UsageError("give texts with --text, or statistics of others with --from")
    from sparing.checkpoint.write import check_writable

    check_writable(out)
    if source is not None:
        if length is not None or add is not None:
            raise click.UsageError("--length and --add go with --text")
        _convert(model, source, out, options["revision"])
        return
    texts = []
    for file in files:
        try:
            texts.append(file.read_text(encoding="utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{file}: not UTF-8 text, byte {error.start}") from error
    loaded = load_model(model, **{name: options.pop(name) for name in LOADING})
    import sparing

    with _Progress() as progress:
        found = sparing.calibrate(loaded, texts, length=length, tokens=tokens, progress=progress)
    if add is not None:
        found = sparing.Statistics.load(add).merge(found)
    found.save(out)
    click.echo(_summary(found, out))


def _convert(model: str, source: Path, out: Path, revision: str | None) -> None:
    """Write the statistics of a foreign file as ours, if they fit the model's config."""
    from sparing import Statistics
    from sparing.checkpoint import open_checkpoint
    from sparing.config import parse_config

    config = parse_config(open_checkpoint(model, revision=revision, weights=False).config)
    # What is named here is wanted; only tensors are read from the pickle.
    foreign = Statistics.load(source, allow_pickle=True)
    try:
        found = foreign.fitted(config)
    except ValueError as error:
        raise ValueError(f"{source} does not fit {model}: {error}") from error
    found.save(out)
    click.echo(_summary(found, out))


def _summary(found: Statistics, out: Path) -> str:
    r = found.concentration()
    tokens = f"{found.tokens} tokens, " if found.tokens else ""  # files of others do not say
    return (
        f"{out}: {tokens}{len(found.layers)} layers of {r.shape[1]} heads; queries of"
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
