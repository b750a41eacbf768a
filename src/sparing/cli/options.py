"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from sparing.models.base import LanguageModel

__all__ = ["canvas_ids", "load_model", "model_options", "positions", "read_prompts", "sampling_options", "settings"]

Command = Callable[..., Any]


def model_options(command: Command) -> Command:
    """--dtype, --device, --threads, --revision: keyword arguments of `load_model`."""
    for option in (
        click.option("--revision", help="Branch, tag or commit of a hub id."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads (default: all)."),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, ..."),
        click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16, or as stored."),
    ):
        command = option(command)
    return command


def sampling_options(command: Command) -> Command:
    """What `sparing.generate` takes; an option that was not given is left to the checkpoint's generation_config."""
    for option in (
        click.option("--t-max", type=float, help="Block diffusion: temperature of the first step."),
        click.option("--t-min", type=float, help="Block diffusion: temperature the steps fall towards."),
        click.option("--entropy-bound", type=float, help="Block diffusion: nats accepted per step."),
        click.option("--steps", "max_denoising_steps", type=int, help="Block diffusion: most steps per canvas."),
        click.option("--repetition-penalty", type=float, help="Above 1: tokens already present become less likely."),
        click.option("--min-p", type=float, help="Drop tokens below this share of the most likely one."),
        click.option("--top-p", type=float, help="Keep the smallest set of tokens with this probability."),
        click.option("--top-k", type=int, help="Keep this many tokens."),
        click.option("--temperature", type=float, help="0: always the most likely token."),
        click.option("--seed", type=int, help="Same seed, same output."),
        click.option("--stop", multiple=True, help="End the answer at this text (repeatable)."),
        click.option("--max-new-tokens", type=int, default=256, show_default=True, help="Limit of the answer."),
        click.option("--kv", default="dense", show_default=True, help="What is remembered: dense or window:N."),
        click.option("--decoder", default="auto", show_default=True, help="autoregressive or block_diffusion."),
    ):
        command = option(command)
    return command


def settings(values: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `sparing.generate`: the options that were given."""
    given = {name: value for name, value in values.items() if value is not None and value != ()}
    return given | ({"stop": list(given["stop"])} if "stop" in given else {})


def load_model(source: str | None, dtype: str, device: str, threads: int | None, revision: str | None) -> LanguageModel:
    import torch

    import sparing

    if threads is not None:
        torch.set_num_threads(threads)
    return sparing.load(source, dtype=dtype, device=device, revision=revision)


def read_prompts(prompts: tuple[str, ...], file: Path | None) -> list[str]:
    """From the arguments, from a file, or from standard input (`-`, or no argument and something piped in)."""
    if file is not None:
        if prompts:
            raise click.UsageError("give the prompt as arguments or with --file, not both")
        return [file.read_text(encoding="utf-8")]
    if prompts == ("-",) or (not prompts and not sys.stdin.isatty()):
        return [sys.stdin.read()]
    if not prompts:
        raise click.UsageError("no prompt: give it as an argument, with --file, or on standard input")
    return list(prompts)


def positions(ranges: str, given: list[int | None]) -> list[int]:
    """`0-5,9` -> [0, 1, 2, 3, 4, 5, 9]; `given`: every position of the canvas that has a token."""
    if ranges == "given":
        return [i for i, token in enumerate(given) if token is not None]
    found: list[int] = []
    for part in ranges.split(","):
        if not (match := re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())):
            raise ValueError(f"--fix {ranges!r}: write positions such as 0-5,9 or the word given")
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def canvas_ids(model: LanguageModel, text: str) -> list[int | None]:
    """Ids of a canvas; `<?>` stands for one unknown token, `<?5>` for five (None)."""
    if model.tokenizer is None:
        raise ValueError("--canvas is text, but the model has no tokenizer")
    ids: list[int | None] = []
    for i, part in enumerate(re.split(r"<\?(\d*)>", text)):
        ids += model.tokenizer.encode(part, add_special_tokens=False) if i % 2 == 0 else [None] * int(part or 1)
    return ids


def key_values(pairs: tuple[str, ...]) -> dict[str, Any]:
    """`size=4 name=x` -> {"size": 4, "name": "x"}: numbers and true/false as JSON, the rest as text."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"--set {pair!r}: write name=value")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found
