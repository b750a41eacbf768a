"""Messages as a prompt: what a template is told beside them, and whether it listens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparing.decoding.tokenizer import Tokenizer
from sparing.errors import CheckpointError

__all__ = ["chat_ids", "chat_text", "check_variables", "is_chat", "template_variables"]

CONTENTS = ("content", "tool_calls", "reasoning_content", "reasoning", "thinking")
GIVEN = ("messages", "tools", "enable_thinking")  # what has a way of its own to the template


def is_chat(prompt: Any) -> bool:
    """Whether a prompt is a list of messages, and what follows it a message of its own."""
    return isinstance(prompt, Sequence) and not isinstance(prompt, str) and any(isinstance(m, Mapping) for m in prompt)


def template_variables(
    tools: Any = None, enable_thinking: bool | None = None, chat_template_kwargs: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """What was given, by the name that templates know it under.

    Raises ValueError naming the argument that has another type, or is given twice.
    """
    variables: dict[str, Any] = {}
    if chat_template_kwargs is not None:
        if not isinstance(chat_template_kwargs, Mapping) or not all(isinstance(n, str) for n in chat_template_kwargs):
            kind = type(chat_template_kwargs).__name__
            raise ValueError(f"chat_template_kwargs is {kind}: use a mapping of names that the template reads")
        if twice := sorted(set(GIVEN) & set(chat_template_kwargs)):
            raise ValueError(f"chat_template_kwargs names {twice[0]!r}, an argument of its own: give it as that")
        variables |= chat_template_kwargs
    if tools is not None:
        if isinstance(tools, str | Mapping) or not isinstance(tools, Sequence):
            raise ValueError(f"tools is {type(tools).__name__}: use a list of JSON schemas")
        if bad := [tool for tool in tools if not isinstance(tool, Mapping)]:
            raise ValueError(f"tools holds {type(bad[0]).__name__}: use JSON schemas, each a mapping")
        variables["tools"] = list(tools)
    if enable_thinking is not None:
        if not isinstance(enable_thinking, bool):
            raise ValueError(f"enable_thinking is {enable_thinking!r}: use True or False")
        variables["enable_thinking"] = enable_thinking
    return variables


def chat_ids(tokenizer: Tokenizer, messages: Any, variables: Mapping[str, Any]) -> list[int]:
    """Token ids of a conversation, ready for an answer.

    Raises ValueError for what is not a message, and for variables that the template does not read.
    """
    return tokenizer.encode(chat_text(tokenizer, messages, variables), add_special_tokens=False)


def chat_text(tokenizer: Tokenizer, messages: Any, variables: Mapping[str, Any]) -> str:
    """The text of a conversation, as `chat_ids` encodes it."""
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {i}: a chat prompt is a list of messages, each with 'role' and 'content'"
                f" (or 'tool_calls'), not {type(message).__name__}"
            )
        if all(message.get(name) is None for name in CONTENTS):
            raise ValueError(
                f"message {i} has no content: a chat prompt is a list of messages, each with 'role' and 'content'"
                " (or 'tool_calls')"
            )
    check_variables(tokenizer, variables)
    prompted = {"add_generation_prompt": not variables.get("continue_final_message"), **variables}
    return tokenizer.apply_chat_template(messages, **prompted)


def check_variables(tokenizer: Tokenizer, variables: Mapping[str, Any]) -> None:
    """Raises CheckpointError where there is no template, ValueError for a variable that it does not read."""
    if tokenizer.chat_template is None:
        raise CheckpointError("this checkpoint has no chat template; give the prompt as plain text")
    if not variables:
        return
    known = tokenizer.chat_template.reads(variables.get("tools") is not None)
    for name in variables:
        if name not in known and name not in ("continue_final_message", "add_generation_prompt"):
            listed = ", ".join(sorted(known - {"messages", "raise_exception", "strftime_now", "namespace", "range"}))
            raise ValueError(f"{name}: this model's chat template does not read it; it reads {listed or 'nothing'}")
