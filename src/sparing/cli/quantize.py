"""`sparing quantize`: a checkpoint in few bits, and what that did to each kind of weight."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import click

from sparing.cli.options import revision_option, threads_option
from sparing.cli.progress import Progress
from sparing.config.formats import FORMATS

if TYPE_CHECKING:
    from sparing.weights.convert import WeightError

__all__ = ["quantize"]


@click.command()
@click.argument("model")
@click.argument("out", type=click.Path(file_okay=False, path_type=Path))
@click.option(
    "--scales",
    metavar="RULE",
    type=click.Choice([name for form in FORMATS.values() for name in form.scales]),
    help="For nvfp4, how the scale of 16 weights is chosen: max, four_over_six or mse (default), from fastest to best,"
    " or 2d for one scale to 16 x 16 weights. For fp8, what has one scale: tensor, row (default), or block of 128 x"
    " 128.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the error of every weight as JSON.")
@click.option("--weights", metavar="FORMAT", required=True, help="int8, int4, nvfp4, mxfp4 or fp8.")
@threads_option
@revision_option
def quantize(
    model: str,
    out: Path,
    scales: str | None,
    as_json: bool,
    weights: str,
    threads: int | None,
    revision: str | None,
) -> None:
    """Write MODEL to the folder OUT with its weights in few bits.

    Matrices are packed; embeddings, output heads, norms and routers stay as they are. This takes little memory. Run the
    same command again after an interruption, even a kill -9, and it goes on where it stopped.

    sparing loads OUT, and so do programs that read ModelOpt (nvfp4) or compressed-tensors (the other formats), except
    that transformers 5.23 cannot read packed experts with gates (Gemma 4), nor any experts in int8 or in FP8 blocks.
    """
    import torch

    from sparing.weights.convert import quantize as convert
    from sparing.weights.dialect import unread

    if threads is not None:
        torch.set_num_threads(threads)
    with Progress("quantising", "numbers") as bar:
        errors = convert(
            model, out, weights, scales=scales, revision=revision, log=lambda at: bar.show(at.done, at.total, at.name)
        )
    if as_json:
        click.echo(json.dumps({name: vars(error) for name, error in errors.items()}, indent=2))
    else:
        click.echo(f"{_table(errors)}\n\nwritten: {out}")
    if lost := unread({name: error.shape for name, error in errors.items()}, weights, scales):
        click.echo(f"sparing loads this; transformers 5.23 reads no {lost}", err=True)


def _table(errors: Mapping[str, WeightError]) -> str:
    """A line for each kind of weight: all layers and experts of the same name."""
    from sparing.text import table

    kinds: dict[str, dict[str, WeightError]] = {}
    for name, error in errors.items():
        kinds.setdefault(re.sub(r"\.\d+(?=\.)", ".*", name), {})[name] = error
    rows: list[tuple[object, ...]] = [("weight", "count", "shape", "SQNR, dB", "worst", "cosine", "worst at")]
    for kind, group in kinds.items():
        decibels = {name: float("inf") if e.sqnr_db is None else e.sqnr_db for name, e in group.items()}
        worst = min(decibels, key=lambda name: decibels[name])
        mean = sum(decibels.values()) / len(group)
        shape = " x ".join(map(str, group[worst].shape))
        where = ".".join(re.findall(r"(?<=\.)\d+(?=\.)", worst))
        row = (kind, len(group), shape, f"{mean:.2f}", f"{decibels[worst]:.2f}", f"{group[worst].cosine:.5f}", where)
        rows.append(row)
    return table(rows)
