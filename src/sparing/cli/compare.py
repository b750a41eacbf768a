"""`sparing compare`: one prompt under several memory policies, side by side."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.options import LOADING, Count, json_option, load_model, model_options, statistics_option, working
from sparing.config.policy import SYNTAX, policy_options

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from sparing.checkpoint.tokenizer import Tokenizer
    from sparing.inspection.memories import MemoryComparison, PolicyResult

__all__ = ["compare"]

DIFFERENT = "bold yellow"  # a token other than the first policy's at its place
NARROWEST = 24  # columns of a terminal that a text needs to be read beside others


@click.command()
@click.argument("model")
@click.argument("prompt")
@click.option(
    "--kv",
    "policies",
    metavar="POLICY",
    multiple=True,
    required=True,
    help=f"How the memory is kept, given twice or more: {SYNTAX}.",
)
@statistics_option
@click.option("--max-new-tokens", type=Count(), default=128, show_default=True, help="Most tokens of each answer.")
@click.option("--seed", type=int, default=0, show_default=True, help="The same for every answer.")
@click.option(
    "--temperature",
    type=float,
    default=0.0,
    show_default=True,
    help="How random the choice is; 0: always the most likely token.",
)
@json_option
@model_options
def compare(
    model: str,
    prompt: str,
    policies: tuple[str, ...],
    statistics: str | None,
    max_new_tokens: int,
    seed: int,
    temperature: float,
    as_json: bool,
    **options: Any,
) -> None:
    """Continue PROMPT with MODEL under several memory policies.

    Each policy continues it from left to right. On a terminal the texts stand side by side, with the tokens in yellow
    that differ from the first policy's at the same place. For the KL divergence, all policies read the first one's text
    and their predictions are compared token by token.

    sparing compare smollm2 "Once upon a time" --kv dense --kv turboquant:3
    """
    if len(policies) < 2:
        raise click.UsageError("one policy compares with nothing: give --kv at least twice")
    pruned = {kv for kv in policies if "statistics" in policy_options(kv)}
    if statistics is not None and not pruned:
        raise click.UsageError("--statistics is for triattention, which no --kv names")
    given = {} if statistics is None else {"statistics": statistics}
    loaded = load_model(model, **{name: options.pop(name) for name in LOADING})
    from sparing.inspection.memories import compare_memories

    with working("comparing"):
        found = compare_memories(
            loaded,
            prompt,
            [(kv, given if kv in pruned else {}) for kv in policies],
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            seed=seed,
        )
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=2))
        return
    assert loaded.tokenizer is not None  # the prompt is text
    from rich.console import Console

    _show(found, loaded.tokenizer, Console(highlight=False))
    click.echo(f"\n{found.table()}")


def _show(found: MemoryComparison, tokenizer: Tokenizer, console: Console) -> None:
    """Side by side where a terminal has the room, else one after another."""
    from rich.table import Table

    texts = [_coloured(result, found.results[0], tokenizer) for result in found.results]
    if not console.is_terminal or console.width < NARROWEST * len(texts):
        for result, text in zip(found.results, texts, strict=True):
            console.print(f"[{result.kv}]", style="bold", markup=False, soft_wrap=True)
            console.print(text, soft_wrap=True)
        return
    columns = Table(expand=True, padding=(0, 1))
    for result in found.results:
        columns.add_column(result.kv, ratio=1, overflow="fold")
    columns.add_row(*texts)
    console.print(columns)


def _coloured(result: PolicyResult, first: PolicyResult, tokenizer: Tokenizer) -> Text:
    """The output, with tokens in colour that the first policy's does not have at the same place."""
    from rich.text import Text

    from sparing.cli.live import pieces

    there = [*first.ids, *[None] * len(result.ids)]
    styles = [DIFFERENT if token != other else "" for token, other in zip(result.ids, there, strict=False)]
    return Text.assemble(*zip(pieces(tokenizer, result.ids), styles, strict=True))
