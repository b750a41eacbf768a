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
    "Count",
    "canvas_ids",
    "json_option",
    "key_values",
    "kv_option",
    "load_drafter",
    "load_model",
    "model_options",
    "policies_option",
    "positions",
    "read_prompts",
    "read_text",
    "revision_option",
    "sampling_options",
    "settings",
    "several_models_options",
    "statistics_option",
    "threads_option",
    "working",
]

LOADING = ("dtype", "weights", "device", "threads", "revision", "map_embeddings")  # what `model_options` adds

MORE = {*RULES, *WARPERS, *CANVAS, "adaptive", "stop"}  # what --set takes

Command = Callable[..., Any]


class Count(click.types.IntParamType):
    """A whole number of at least 1."""

    name = "n"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        number = super().convert(value, param, ctx)
        if number < 1:
            self.fail(f"{number} is less than 1", param, ctx)
        return number


threads_option = click.option("--threads", type=Count(), help="CPU threads to use (default: all).")
revision_option = click.option("--revision", help="Branch, tag or commit, where MODEL is a hub id.")
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")
kv_option = click.option(
    "--kv", metavar="POLICY", default="dense", show_default=True, help=f"How the memory is kept: {SYNTAX}."
)
statistics_option = click.option(
    "--statistics",
    type=click.Path(exists=True, dir_okay=False),
    help="For triattention: the file that 'sparing calibrate' wrote.",
)


weights_option = click.option(
    "--weights",
    metavar="FORMAT",
    default="stored",
    show_default=True,
    help="Pack matrices while loading: int8, int4, nvfp4, mxfp4 or fp8; stored: as they are in the file.",
)
formats_option = click.option(
    "--weights",
    "formats",
    metavar="FORMAT",
    multiple=True,
    default=("stored",),
    show_default=True,
    help="Pack matrices while loading: int8, int4, nvfp4, mxfp4 or fp8; stored: as they are in the file (repeatable).",
)
policies_option = click.option(
    "--kv",
    "policies",
    metavar="POLICY",
    multiple=True,
    default=("dense",),
    show_default=True,
    help=f"How the memory is kept: {SYNTAX} (repeatable).",
)


def model_options(command: Command, weights: Callable[[Command], Command] = weights_option) -> Command:
    """Keyword arguments of `load_model`. weights: the option that says in which format they are."""
    for option in (
        click.option(
            "--map-embeddings", is_flag=True, help="Read the table of per-layer embeddings from its file as needed."
        ),
        revision_option,
        threads_option,
        click.option(
            "--device",
            metavar="DEVICE",
            default="auto",
            show_default=True,
            help="cpu, cuda, ...; auto: a GPU if there is one.",
        ),
        weights,
        click.option(
            "--dtype",
            metavar="DTYPE",
            default="auto",
            show_default=True,
            help="float32, bfloat16 or float16; auto: as the checkpoint says.",
        ),
    ):
        command = option(command)
    return command


def several_models_options(command: Command) -> Command:
    """`formats` of weights, and the other keyword arguments of `load_model`."""
    return model_options(command, formats_option)


def sampling_options(command: Command) -> Command:
    """What `sparing.generate` takes; an option that was not given is left to the checkpoint's generation_config."""
    for option in (
        click.option(
            "--confidence-threshold",
            type=float,
            help="Block diffusion: finish a stable canvas only below this mean entropy, in nats.",
        ),
        click.option(
            "--stability-threshold",
            type=int,
            help="Block diffusion: a canvas is stable after this many steps without change.",
        ),
        click.option("--t-max", type=float, help="Block diffusion: temperature of the first step."),
        click.option("--t-min", type=float, help="Block diffusion: temperature that it falls towards."),
        click.option("--entropy-bound", type=float, help="Block diffusion: entropy that one step may accept, in nats."),
        click.option("--steps", "max_denoising_steps", type=int, help="Block diffusion: most steps for one canvas."),
        click.option(
            "--set",
            "more",
            multiple=True,
            metavar="NAME=VALUE",
            help="Any other setting of a generation_config.json, its value as JSON; stop=[] ignores the checkpoint's"
            " stop_strings (repeatable).",
        ),
        click.option("--suppress-tokens", metavar="ID,ID...", help="Never choose these tokens."),
        click.option(
            "--logit-bias",
            multiple=True,
            metavar="ID=BIAS",
            help="Add BIAS to the logit of a token, named by its id or its text (repeatable).",
        ),
        click.option("--min-new-tokens", type=int, help="Do not end before this many tokens."),
        click.option(
            "--no-repeat-ngram-size", type=int, help="Never repeat a sequence of this many tokens (0: no limit)."
        ),
        click.option(
            "--frequency-penalty",
            type=float,
            help="Subtracted from a token's logit once for each time that it was generated.",
        ),
        click.option(
            "--presence-penalty", type=float, help="Subtracted from a token's logit if it was generated before."
        ),
        click.option("--repetition-penalty", type=float, help="Above 1: tokens seen before become less likely."),
        click.option("--min-p", type=float, help="Drop tokens below this share of the most likely one's probability."),
        click.option(
            "--top-p", type=float, help="Choose among the fewest tokens that have this probability together (1: all)."
        ),
        click.option("--top-k", type=int, help="Choose among this many of the most likely tokens (0: all)."),
        click.option("--temperature", type=float, help="How random the choice is; 0: always the most likely token."),
        click.option("--seed", type=int, help="The same seed gives the same output."),
        click.option("--stop", multiple=True, help="End the answer before this text (repeatable)."),
        click.option(
            "--max-new-tokens", type=int, help="Most tokens to generate (default: as the checkpoint says, else 256)."
        ),
        statistics_option,
        kv_option,
        click.option(
            "--draft-tokens", type=int, help="Speculative decoding: most tokens guessed at a time (default: 3)."
        ),
        click.option(
            "--draft",
            metavar="DRAFTER",
            help="Speculative decoding: what guesses the next tokens. ngram looks them up earlier in the text, mtp is"
            " the model's own drafting head, anything else names a second model as MODEL does.",
        ),
        click.option(
            "--decoder",
            metavar="DECODER",
            default="auto",
            show_default=True,
            help="autoregressive, speculative or block_diffusion; auto: speculative with --draft, else what the model"
            " was made for.",
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
    if twice := sorted(more.keys() & given.keys()):
        raise ValueError(f"--set {twice[0]}: given as an option, too; leave one of them out")
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
        return [read_text(file).removesuffix("\n")]
    if prompts == ("-",) or (not prompts and not sys.stdin.isatty()):
        return [_text(sys.stdin.buffer.read(), "standard input").removesuffix("\n")]
    if not prompts:
        raise click.UsageError("no prompt: give it as an argument, with --file, or on standard input")
    return list(prompts)


def read_text(file: Path) -> str:
    """Raises ValueError for what is not UTF-8."""
    return _text(file.read_bytes(), str(file))


def _text(content: bytes, where: str) -> str:
    try:
        return content.decode("utf-8")
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
