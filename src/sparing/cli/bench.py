"""`sparing bench`: how fast a model is on this machine."""

from __future__ import annotations

import json
from typing import Any

import click

from sparing.cli.options import Count, json_option, load_model, policies_option, several_models_options, working

__all__ = ["bench"]


@click.command()
@click.argument("model")
@policies_option
@click.option("--prompt-tokens", type=Count(), default=512, show_default=True, help="Tokens to read.")
@click.option("--new-tokens", type=Count(), default=128, show_default=True, help="Tokens to write.")
@click.option("--repetitions", type=Count(), default=3, show_default=True, help="Runs of each, after one unmeasured.")
@json_option
@several_models_options
def bench(
    model: str,
    prompt_tokens: int,
    new_tokens: int,
    repetitions: int,
    as_json: bool,
    policies: tuple[str, ...],
    formats: tuple[str, ...],
    **options: Any,
) -> None:
    """Measure how fast MODEL reads and writes, and what it holds.

    Every format of weights with every memory policy, one sequence, the median of some runs: tokens a second of a random
    prompt and after the first token, the time to that one, and bytes of weights and memory.

    sparing bench smollm2 --weights stored --weights int4 --kv dense --kv turboquant:4
    """
    from sparing.inspection.speed import measure_speed, speed_table

    found = []
    for weights in dict.fromkeys(formats):  # one after the other: two models may not fit
        loaded = load_model(model, weights=weights, **options)
        with working(f"measuring {weights} weights"):
            sizes = {"prompt_tokens": prompt_tokens, "new_tokens": new_tokens, "repetitions": repetitions}
            found.append(measure_speed(loaded, list(dict.fromkeys(policies)), **sizes))
        del loaded
    click.echo(json.dumps([speed.to_dict() for speed in found], indent=2) if as_json else speed_table(found))
