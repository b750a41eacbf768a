"""`sparing inspect`: what a checkpoint is, and whether it computes what transformers computes."""

from __future__ import annotations

import json

import click

__all__ = ["inspect"]


@click.command()
@click.argument("model")
@click.option("--against", type=click.Choice(["transformers"]), help="Run both, name the first layer that differs.")
@click.option("--text", help="With --against: run this text (default: random tokens).")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def inspect(model: str, against: str | None, text: str | None, as_json: bool) -> None:
    """Architecture, layers, memory per layer, tensors and unknown keys of MODEL; reads no weights."""
    from sparing import inspection

    if text is not None and against is None:
        raise click.UsageError("--text needs --against transformers")
    found = inspection.inspect(model) if against is None else inspection.against_transformers(model, text)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.table())
    if isinstance(found, inspection.Comparison) and not found.agrees:
        raise SystemExit(1)
