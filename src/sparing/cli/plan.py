"""`sparing plan`: what a model needs, before anything is downloaded."""

from __future__ import annotations

import json

import click

from sparing.config.policy import SYNTAX

__all__ = ["plan"]


@click.command()
@click.argument("model")
@click.option("--context", type=int, required=True, help="Tokens held per sequence.")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences held at once.")
@click.option("--kv", default="dense", show_default=True, help=f"What is remembered: {SYNTAX}.")
@click.option("--weights", default="stored", show_default=True, help="How weights are kept.")
@click.option("--hardware", help="Device, for times (an unknown name lists the known ones).")
@click.option("--new-tokens", type=int, help="Tokens to generate, for the time of a whole answer.")
@click.option("--steps", type=int, help="Denoising steps per canvas.")
@click.option("--json", "as_json", is_flag=True, help="As JSON.")
def plan(
    model: str,
    context: int,
    batch: int,
    kv: str,
    weights: str,
    hardware: str | None,
    new_tokens: int | None,
    steps: int | None,
    as_json: bool,
) -> None:
    """Bytes, operations and least times of MODEL: a folder, GGUF file, hub id or released name (gemma-4-e2b, ...)."""
    import sparing

    found = sparing.plan(
        model,
        context=context,
        batch=batch,
        kv=kv,
        weights=weights,
        hardware=hardware,
        new_tokens=new_tokens,
        steps=steps,
    )
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.table())
