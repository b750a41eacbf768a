"""`sparing perplexity`: how well a model predicts a text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from sparing.cli.options import (
    Count,
    json_option,
    load_model,
    policies_option,
    read_text,
    several_models_options,
    working,
)

__all__ = ["perplexity"]


@click.command()
@click.argument("model")
@click.option(
    "--text",
    "path",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    required=True,
    help="UTF-8 text to predict.",
)
@click.option(
    "--context", type=int, help="Tokens of each passage of the text (default: 1024, or what the model takes)."
)
@policies_option
@click.option("--tokens", type=Count(), help="Most tokens of the text, from its beginning (default: all).")
@json_option
@several_models_options
def perplexity(
    model: str,
    path: Path,
    context: int | None,
    tokens: int | None,
    as_json: bool,
    policies: tuple[str, ...],
    formats: tuple[str, ...],
    **options: Any,
) -> None:
    """Show how well MODEL predicts a text.

    With several memory policies or formats of weights also how far the others' predictions are from those of the first
    format under the first policy (KL divergence), and how often the most likely token is the same. The text is read in
    passages, each from an empty memory. Errors are standard errors over tokens.

    sparing perplexity smollm2 --text book.txt --kv dense --kv turboquant:4
    """
    from sparing.inspection.perplexity import perplexity as measure

    text = read_text(path)
    loaded = [load_model(model, weights=weights, **options) for weights in dict.fromkeys(formats)]
    tokenizer = loaded[0].tokenizer
    if tokenizer is None:
        raise ValueError(f"{model} has no tokenizer: a text cannot be read with it")
    ids = tokenizer.encode(text, add_special_tokens=False)[:tokens]
    with working("reading the text"):
        found = measure(loaded, ids, list(dict.fromkeys(policies)), context=context)
    click.echo(json.dumps(found.to_dict(), indent=2) if as_json else found.table())
