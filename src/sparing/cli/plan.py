"""`sparing plan`: what a model needs, before anything is downloaded."""

from __future__ import annotations

import json

import click

from sparing.cli.options import json_option, kv_option

__all__ = ["plan"]


@click.command()
@click.argument("model")
@click.option("--context", type=int, required=True, help="Tokens that each sequence holds: prompt and answer.")
@click.option("--batch", type=int, default=1, show_default=True, help="Sequences held at once.")
@kv_option
@click.option("--new-tokens", type=int, help="Tokens to generate, for the time of a whole answer.")
@click.option("--steps", type=int, help="Block diffusion: denoising steps for one canvas.")
@click.option(
    "--hardware", metavar="NAME", help="Show the least time on this machine: H100, ... (a wrong name lists them)."
)
@json_option
@click.option(
    "--weights",
    metavar="FORMAT",
    default="stored",
    show_default=True,
    help="int8, int4, nvfp4, mxfp4 or fp8; stored: as they are in the file.",
)
def plan(
    model: str,
    context: int,
    batch: int,
    kv: str,
    new_tokens: int | None,
    steps: int | None,
    hardware: str | None,
    as_json: bool,
    weights: str,
) -> None:
    """Show what MODEL needs: bytes, operations and the least time.

    Nothing is loaded, and of a hub id only small files are downloaded. MODEL may also be the name of a released model,
    such as gemma-4-e2b; an unknown name lists the known ones.

    sparing plan gemma-4-31b --context 131072 --kv turboquant:4 --weights int4
    """
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
