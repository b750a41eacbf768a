"""`sparing generate`: one answer per prompt."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.chat_options import answer_parts, template_options, template_settings
from sparing.cli.options import (
    LOADING,
    canvas_ids,
    load_drafter,
    load_model,
    memory_options,
    model_options,
    positions,
    read_prompts,
    sampling_options,
    settings,
)

if TYPE_CHECKING:
    from sparing.memory.sequence import Memory
    from sparing.models.base import LanguageModel

__all__ = ["generate"]


@click.command()
@click.argument("model")
@click.argument("prompts", metavar="[PROMPT]...", nargs=-1)
@click.option(
    "-f", "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read the prompt from a file."
)
@click.option("--chat", "as_chat", is_flag=True, help="Ask the prompt as a question in a chat.")
@template_options
@sampling_options
@click.option(
    "--canvas",
    metavar="TEXT",
    help="Block diffusion: start from this text instead of noise; <?> is an unknown token, <?5> five of them.",
)
@click.option(
    "--fix",
    metavar="POSITIONS",
    help="Block diffusion: tokens of --canvas that stay, by position (0-5,9), or 'given' for all but the unknown ones.",
)
@click.option("--logprobs", is_flag=True, default=None, help="Report log-probabilities (not with block diffusion).")
@click.option("--json", "as_json", is_flag=True, help="Print events, each as a line of JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print no statistics.")
@model_options
def generate(
    model: str,
    prompts: tuple[str, ...],
    file: Path | None,
    canvas: str | None,
    fix: str | None,
    as_chat: bool,
    as_json: bool,
    quiet: bool,
    **options: Any,
) -> None:
    """Continue each PROMPT with MODEL. Without one, standard input is read.

    sparing generate tales "Once upon a time"

    On a terminal, a block-diffusion model shows its canvas as it settles: tokens in green are kept for the next step,
    those in grey are drawn again, those in yellow have just changed. A line below the text says how many bytes are
    remembered. A pipe receives the text alone.

    The model "sudoku" takes a puzzle as rows of digits, with 0 or . for an empty cell.
    """
    import sparing
    from sparing.checkpoint.source import names_model
    from sparing.cli.render import JsonView, View, choose, show, speculates

    if fix is not None and canvas is None:
        raise click.UsageError("--fix needs --canvas")
    if not prompts and file is None and not names_model(model):
        text = shlex.quote(model if len(model) <= 60 else f"{model[:57]}...")
        raise click.UsageError(f"{text} is not a model; give one before the prompt: sparing generate tales {text}")
    # A canvas is enough to go on: the text before it may be empty.
    texts = read_prompts(prompts, file) if prompts or file or canvas is None else []
    for_template = template_settings(options)
    if for_template and not as_chat:
        raise click.UsageError("--tools, --thinking and --chat-variable are for questions: add --chat")
    loading = {name: options.pop(name) for name in LOADING}
    loaded = load_model(model, **loading)
    chosen = load_drafter(settings(options), **loading)
    if canvas is not None:
        chosen["canvas"] = canvas_ids(loaded, canvas)
        if fix is not None:
            chosen["fixed"] = positions(fix, chosen["canvas"])
    rows: list[Any] = [_prompt(loaded, model, text) for text in texts or [""]]
    if as_chat:
        rows = [[{"role": "user", "content": text}] for text in rows]
    if not texts:
        rows = [loaded.tokenizer.encode("") if loaded.tokenizer else []]  # the beginning of a text alone
    # One row's memory is made here, to be looked at while it grows; of several, each has its own.
    memory = _memory(loaded, chosen) if len(rows) == 1 else None
    events = sparing.generate(loaded, rows, memory=memory, **chosen, **for_template)
    watched = None if quiet else memory
    view: View = JsonView()
    if not as_json:
        parts = answer_parts(loaded.tokenizer, for_template) if as_chat and loaded.tokenizer else None
        view = choose(len(rows), loaded.tokenizer, canvases=not speculates(chosen), memory=watched, parts=parts)
    outcome = show(events, view)
    if not quiet and not as_json:
        print(outcome.speeds(), file=sys.stderr)


def _memory(model: LanguageModel, options: dict[str, Any]) -> Memory:
    return model.memory(options["kv"], **memory_options(options["kv"], options))


def _prompt(model: LanguageModel, source: str, text: str) -> str:
    if source != "sudoku" or not text:
        return text
    from sparing.cli.sudoku import grid_of
    from sparing.sudoku.text import prompt_text

    return prompt_text(grid_of(model, text))
