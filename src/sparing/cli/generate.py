"""`sparing generate`: one answer per prompt."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from sparing.cli.options import (
    canvas_ids,
    load_model,
    model_options,
    positions,
    read_prompts,
    sampling_options,
    settings,
)

__all__ = ["generate"]


@click.command()
@click.argument("prompt", nargs=-1)
@click.option("-m", "--model", default="tales", show_default=True, help="Folder, GGUF file, hub id or bundled name.")
@click.option(
    "-f", "--file", type=click.Path(exists=True, dir_okay=False, path_type=Path), help="Read the prompt here."
)
@sampling_options
@click.option("--canvas", help="Start from this text instead of noise; <?> is an unknown token, <?5> five of them.")
@click.option("--fix", help="Canvas positions that keep their token: 0-5,9 or 'given'. Needs --canvas.")
@click.option("--logprobs", is_flag=True, default=None, help="Report log-probabilities (with --json).")
@click.option("--json", "as_json", is_flag=True, help="Events as JSON lines.")
@click.option("-q", "--quiet", is_flag=True, help="No statistics.")
@model_options
def generate(
    prompt: tuple[str, ...],
    model: str,
    file: Path | None,
    canvas: str | None,
    fix: str | None,
    as_json: bool,
    quiet: bool,
    dtype: str,
    device: str,
    threads: int | None,
    revision: str | None,
    **options: Any,
) -> None:
    """Answer each PROMPT (or a file, or standard input).

    A block-diffusion model shows its canvas settling: green tokens were kept, yellow ones changed, grey ones are drawn
    afresh. Into a pipe goes the plain text.
    """
    import sparing
    from sparing.cli.render import choose, show, speeds

    if fix is not None and canvas is None:
        raise click.UsageError("--fix needs --canvas")
    prompts = read_prompts(prompt, file)
    loaded = load_model(model, dtype, device, threads, revision)
    chosen = settings(options)
    if canvas is not None:
        chosen["canvas"] = canvas_ids(loaded, canvas)
        if fix is not None:
            chosen["fixed"] = positions(fix, chosen["canvas"])
    events = sparing.generate(loaded, prompts[0] if len(prompts) == 1 else prompts, **chosen)
    done = show(events, choose(as_json, len(prompts), loaded.tokenizer))
    if not quiet and not as_json:
        print(speeds(done), file=sys.stderr)
