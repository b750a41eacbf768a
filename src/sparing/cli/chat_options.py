"""Options for the template of a conversation, and how its answers are shown."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.options import key_values

if TYPE_CHECKING:
    from sparing.checkpoint.tokenizer import Tokenizer
    from sparing.decoding.answer import AnswerParts

__all__ = ["TEMPLATE_OPTIONS", "answer_parts", "template_options", "template_settings"]

TEMPLATE_OPTIONS = ("tools", "enable_thinking", "chat_template_kwargs")  # of `sparing.generate`

Command = Callable[..., Any]


def template_options(command: Command) -> Command:
    """What the chat template of a model may read beside the messages."""
    for option in (
        click.option(
            "--chat-variable",
            "chat_template_kwargs",
            multiple=True,
            metavar="NAME=VALUE",
            help="Set another variable that the chat template reads, such as reasoning_effort=high (repeatable).",
        ),
        click.option(
            "--thinking/--no-thinking",
            "enable_thinking",
            default=None,
            help="Whether the model thinks before it answers, if its chat template lets one choose.",
        ),
        click.option(
            "--tools",
            type=click.Path(exists=True, dir_okay=False, path_type=Path),
            help="Functions that the model may call: a file with a JSON list of their schemas.",
        ),
    ):
        command = option(command)
    return command


def template_settings(options: dict[str, Any]) -> dict[str, Any]:
    """Takes those options out of all and returns them as `sparing.generate` wants them, if they were given."""
    tools, thinking, pairs = (options.pop(name) for name in ("tools", "enable_thinking", "chat_template_kwargs"))
    given: dict[str, Any] = {}
    if tools is not None:
        given["tools"] = _read_tools(tools)
    if thinking is not None:
        given["enable_thinking"] = thinking
    if pairs:
        given["chat_template_kwargs"] = key_values(pairs, "--chat-variable")
    return given


def _read_tools(path: Path) -> list[Any]:
    try:
        tools = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(tools, list):
        raise ValueError(f"{path}: must be a list of JSON schemas, is {type(tools).__name__}")
    return tools


def answer_parts(tokenizer: Tokenizer, given: Mapping[str, Any]) -> AnswerParts:
    """What splits an answer; some templates begin its thought themselves. given: as in `template_settings`."""
    from sparing.decoding.answer import AnswerParts
    from sparing.decoding.chat_prompt import chat_text, template_variables

    try:
        prompt = chat_text(tokenizer, [{"role": "user", "content": "?"}], template_variables(**given))
    except ValueError:  # a conversation of its kind must begin otherwise
        prompt = ""
    return AnswerParts(tokenizer, prompt)
