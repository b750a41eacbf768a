"""`sparing calibrate`: statistics of a model's queries, which TriAttention needs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.options import LOADING, Count, load_model, model_options
from sparing.cli.progress import Progress

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
    help="A text to read, any coherent one (repeatable).",
)
@click.option(
    "--tokens",
    type=Count(),
    default=50_000,
    show_default=True,
    help="Read at most about this many tokens: the same share of each text, from its beginning.",
)
@click.option(
    "--from",
    "source",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Read no text, but convert statistics: a file of the method's authors (.pt) or a TRIA file.",
)
@click.option("--out", required=True, type=click.Path(dir_okay=False, path_type=Path), help="The file to write.")
@click.option(
    "--length", type=Count(), help="Cut texts into sequences of this length (default: 32768, or the context)."
)
@click.option(
    "--add",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    help="Earlier statistics of MODEL, to which these are added.",
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
    """Collect the statistics of MODEL that triattention needs.

    MODEL reads texts, and statistics of its queries are written to a file, by which --kv triattention:N chooses the
    entries that a memory keeps:

    sparing generate MODEL PROMPT --kv triattention:2048 --statistics FILE

    With --from they come from a file that others made, if it fits MODEL. The weights are not read then, so make sure
    that it was made from the same ones: a fine-tuned model has other queries.
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

    with Progress("calibrating", "tokens") as bar:
        found = sparing.calibrate(loaded, texts, length=length, tokens=tokens, progress=bar.show)
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
