"""`sparing inspect`: what a checkpoint is, and whether it computes what transformers computes."""

from __future__ import annotations

import json

import click

from sparing.config.policy import SYNTAX

__all__ = ["inspect"]


@click.command()
@click.argument("model")
@click.option("--against", type=click.Choice(["transformers"]), help="Run both, name the first layer that differs.")
@click.option("--text", help="With --against: run this text (default: random tokens).")
@click.option("--tokens", help="With --against: run these token ids, such as 5,6,7.")
@click.option("--kv", default="dense", show_default=True, help=f"What is remembered: {SYNTAX}.")
@click.option("--context", type=click.IntRange(1), default=1024, show_default=True, help="Tokens remembered.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def inspect(
    model: str, against: str | None, text: str | None, tokens: str | None, kv: str, context: int, as_json: bool
) -> None:
    """Architecture, layers, memory per layer, tensors and unknown keys of MODEL; reads no weights.

    With --against transformers both run in float32; the exit code is 1 if they differ.
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
