"""`sparing inspect`: what a checkpoint is, and whether it computes what transformers computes."""

from __future__ import annotations

import json

import click

from sparing.cli.options import Count, json_option, kv_option

__all__ = ["inspect"]


@click.command()
@click.argument("model")
@click.option("--context", type=Count(), default=1024, show_default=True, help="Tokens that the memory holds.")
@kv_option
@click.option(
    "--against",
    metavar="transformers",
    type=click.Choice(["transformers"]),
    help="Run MODEL with transformers too, and name the first layer that differs.",
)
@click.option("--text", help="With --against: run this text (default: random tokens).")
@click.option("--tokens", metavar="ID,ID...", help="With --against: run these tokens.")
@json_option
def inspect(
    model: str, context: int, kv: str, against: str | None, text: str | None, tokens: str | None, as_json: bool
) -> None:
    """Show the architecture of MODEL: layers, memories, tensors.

    Keys of its config that are not known are listed too. Weights are read only with --against transformers: then both
    run in float32, and the exit code is 1 if they differ.
    """
    from sparing import inspection

    if against is None and (text is not None or tokens is not None):
        raise click.UsageError("--text and --tokens need --against transformers")
    if text is not None and tokens is not None:
        raise click.UsageError("give --text or --tokens, not both")
    prompt = text if tokens is None else _ids(tokens)
    if against is None:
        found = inspection.inspect(model, kv=kv, context=context)
    else:
        found = inspection.against_transformers(model, prompt)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.table())
    if isinstance(found, inspection.Comparison) and not found.agrees:
        raise click.exceptions.Exit(1)


def _ids(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise ValueError(f"--tokens {text!r}: write token ids such as 5,6,7") from None
