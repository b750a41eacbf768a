"""Options that several commands share, and how their values are read."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparing.config.generation import CANVAS, RULES, WARPERS
from sparing.config.policy import SYNTAX, policy_options

if TYPE_CHECKING:
    from sparing.models.base import LanguageModel

__all__ = [
    "LOADING",
    "canvas_ids",
    "key_values",
    "load_drafter",
    "load_model",
    "model_options",
    "positions",
    "read_prompts",
    "sampling_options",
    "settings",
    "statistics_option",
    "working",
]

LOADING = ("dtype", "weights", "device", "threads", "revision", "map_embeddings")  # what `model_options` adds

MORE = {*RULES, *WARPERS, *CANVAS, "adaptive", "stop"}  # what --set takes

Command = Callable[..., Any]


def model_options(command: Command) -> Command:
    """Keyword arguments of `load_model`."""
    for option in (
        click.option("--map-embeddings", is_flag=True, help="Leave the per-layer embedding table in the file."),
        click.option("--revision", help="Branch, tag or commit of a hub id."),
        click.option("--threads", type=click.IntRange(1), help="CPU threads (default: all)."),
        click.option("--device", default="auto", show_default=True, help="cpu, cuda, ..."),
        click.option(
            "--weights", default="stored", show_default=True, help="Pack matrices: int8, int4, nvfp4, mxfp4 or fp8."
        ),
        click.option("--dtype", default="auto", show_default=True, help="float32, bfloat16, float16, or as stored."),
    ):
        command = option(command)
    return command


statistics_option = click.option(
    "--statistics",
    type=click.Path(exists=True, dir_okay=False),
    help="For triattention: statistics of the model's queries, written by 'sparing calibrate'.",
)


def sampling_options(command: Command) -> Command:
    """What `sparing.generate` takes; an option that was not given is left to the checkpoint's generation_config."""
    for option in (
        click.option("--confidence-threshold", type=float, help="Block diffusion: mean nats below which to stop."),
        click.option("--stability-threshold", type=int, help="Block diffusion: steps without change before stopping."),
        click.option("--t-max", type=float, help="Block diffusion: temperature of the first step."),
        click.option("--t-min", type=float, help="Block diffusion: temperature the steps fall towards."),
        click.option("--entropy-bound", type=float, help="Block diffusion: nats accepted per step."),
        click.option("--steps", "max_denoising_steps", type=int, help="Block diffusion: most steps per canvas."),
        click.option(
            "--set",
            "more",
            multiple=True,
            metavar="NAME=VALUE",
            help="Any other setting of a generation_config.json, as JSON; stop=[] ignores its stop_strings.",
        ),
        click.option("--suppress-tokens", metavar="ID,ID...", help="Token ids that are never chosen."),
        click.option(
            "--logit-bias",
            multiple=True,
            metavar="ID=BIAS",
            help="Add to a token's logit (repeatable; ID or its text).",
        ),
        click.option("--min-new-tokens", type=int, help="No end of the answer before."),
        click.option("--no-repeat-ngram-size", type=int, help="No run of this many tokens occurs twice (0: no limit)."),
        click.option(
            "--frequency-penalty", type=float, help="Taken off a token's logit for each time it was generated."
        ),
        click.option("--presence-penalty", type=float, help="Taken off a token's logit once it was generated."),
        click.option("--repetition-penalty", type=float, help="Above 1: tokens already present become less likely."),
        click.option("--min-p", type=float, help="Drop tokens below this share of the most likely one."),
        click.option("--top-p", type=float, help="Keep the smallest set of tokens with this probability (1: all)."),
        click.option("--top-k", type=int, help="Keep this many tokens (0: all)."),
        click.option("--temperature", type=float, help="0: always the most likely token."),
        click.option("--seed", type=int, help="Same seed, same output."),
        click.option("--stop", multiple=True, help="End the answer at this text (repeatable)."),
        click.option("--max-new-tokens", type=int, help="Limit of the answer (default: the checkpoint's, else 256)."),
        statistics_option,
        click.option("--kv", default="dense", show_default=True, help=f"What is remembered: {SYNTAX}."),
        click.option("--draft-tokens", type=int, help="Speculative: most tokens drafted a round (default 3)."),
        click.option("--draft", help="Speculative: who drafts: ngram, mtp, or a model as for MODEL."),
        click.option(
            "--decoder", default="auto", show_default=True, help="autoregressive, speculative or block_diffusion."
        ),
    ):
        command = option(command)
    return command


def settings(values: dict[str, Any]) -> dict[str, Any]:
    """Keyword arguments of `sparing.generate`: the options that were given.

    Raises ValueError for a bias, a list of ids or a setting that is not written as it should be.
    """
    given = {name: value for name, value in values.items() if value is not None and value != ()}
    if "logit_bias" in given:
        given["logit_bias"] = dict(map(_bias, given["logit_bias"]))
    if "suppress_tokens" in given:
        given["suppress_tokens"] = _ids("--suppress-tokens", given["suppress_tokens"])
    if "statistics" in given and "statistics" not in policy_options(given["kv"]):
        raise click.UsageError(f"--statistics is for triattention, which --kv {given['kv']} does not name")
    more = key_values(given.pop("more", ()))
    if unknown := sorted(more.keys() - MORE):
        raise ValueError(f"--set {unknown[0]}: not known, use one of {', '.join(sorted(MORE))}")
    return given | more


def memory_options(kv: str, options: dict[str, Any]) -> dict[str, Any]:
    """Those of the memory among a command's options. `seed` is the sampler's: a rotation's stands in the policy."""
    return {name: options[name] for name in policy_options(kv) if name in options and name != "seed"}


def _bias(pair: str) -> tuple[str, float]:
    """`50=-2.5` -> ("50", -2.5). The token may be text, with an equals sign in it."""
    if not (match := re.fullmatch(r"(.+)=([^=]+)", pair, re.DOTALL)) or (bias := _float(match[2])) is None:
        raise ValueError(f"--logit-bias {pair!r}: write ID=BIAS, such as 50=-2.5 or 50=-inf")
    return match[1], bias


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _ids(option: str, text: str) -> list[int]:
    """`4,7` -> [4, 7]; nothing: no ids."""
    try:
        return [int(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{option} {text!r}: write token ids such as 4,7") from None


def load_model(source: str, *, threads: int | None = None, **options: Any) -> LanguageModel:
    """A model to run, with a sign of life on a terminal meanwhile. options: of `sparing.load`."""
    with working(f"loading {source}"):
        import torch

        import sparing

        if threads is not None:
            torch.set_num_threads(threads)
        return sparing.load(source, **options)


def load_drafter(options: dict[str, Any], **loading: Any) -> dict[str, Any]:
    """`settings` with the drafter itself where --draft names a model. loading: as in `load_model`, for both models."""
    named = options.get("draft", "ngram")
    if named in ("ngram", "mtp"):
        return options
    return {**options, "draft": load_model(named, **{**loading, "revision": None})}


def working(message: str) -> AbstractContextManager[Any]:
    """A sign of life on a terminal while something long goes on."""
    if not sys.stderr.isatty():
        return nullcontext()
    from rich.console import Console

    return Console(stderr=True).status(message)


def read_prompts(prompts: tuple[str, ...], file: Path | None) -> list[str]:
    """From the arguments, from a file, or from standard input (`-`, or no argument and something piped in).

    The newline that ends a file is not part of the prompt.
    """
    if file is not None:
        if prompts:
            raise click.UsageError("give the prompt as arguments or with --file, not both")
        return [_text(file.read_bytes(), str(file))]
    if prompts == ("-",) or (not prompts and not sys.stdin.isatty()):
        return [_text(sys.stdin.buffer.read(), "standard input")]
    if not prompts:
        raise click.UsageError("no prompt: give it as an argument, with --file, or on standard input")
    return list(prompts)


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8").removesuffix("\n")
    except UnicodeDecodeError as error:
        raise ValueError(f"{where}: not UTF-8 text, byte {error.start} is {content[error.start]:#04x}") from error


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
    """Ids of a canvas; `<?>` stands for one unknown token, `<?5>` for five (None).

    Blanks before an unknown token belong to it: most tokenizers keep a word and the blank before it together.
    """
    if model.tokenizer is None:
        raise ValueError("--canvas is text, but the model has no tokenizer")
    ids: list[int | None] = []
    for i, part in enumerate(re.split(r" *<\?(\d*)>", text)):
        if i % 2:
            ids += [None] * int(part or 1)
        elif part:
            ids += model.tokenizer.encode(part, add_special_tokens=False)
    return ids


def key_values(pairs: tuple[str, ...], option: str = "--set") -> dict[str, Any]:
    """`size=4 name=x` -> {"size": 4, "name": "x"}: numbers and true/false as JSON, the rest as text."""
    found = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"{option} {pair!r}: write name=value")
        try:
            found[name] = json.loads(value)
        except json.JSONDecodeError:
            found[name] = value
    return found
