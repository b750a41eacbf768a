"""Messages as templates take them: plain types, without empty fields, and flattened for templates that want texts."""

import json
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["END_OF_TEXT", "flattened", "fully_shown", "open_ended", "plain", "prepared"]

# Kinds of content parts that are not text, under the names that the APIs in use have for them.
MEDIA = frozenset(
    f"{prefix}{kind}{suffix}"
    for kind in ("image", "audio", "video", "file")
    for prefix in ("", "input_")
    for suffix in ("", "_url")
)
REASONING = ("reasoning_content", "thinking", "reasoning")  # names of the same; templates read the first or the second
END_OF_TEXT = "\ue000END OF TEXT\ue001 "  # the blank tells whether a template trims what it is given


def plain(value: Any, name: str) -> Any:
    """A copy made of JSON types only: methods of richer objects would be doors out of the box."""
    try:
        return _plain(value, name)
    except RecursionError as error:
        raise ValueError(f"{name}: nested too deep for a chat template, or part of itself") from error


def _plain(value: Any, name: str) -> Any:
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):  # subclasses, such as members of an enumeration
        return str.__str__(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value)
    if isinstance(value, Mapping):
        return {_plain(key, name): _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_plain(item, name) for item in value) if type(value) in (list, tuple) else list(value)
    if type(value).__module__ == "numpy" and getattr(value, "shape", None) == ():
        return value.item()
    raise ValueError(f"{name}: a chat template takes text, numbers, lists and mappings, not {type(value).__name__}")


def prepared(messages: Any) -> list[dict[str, Any]]:
    """A conversation without what is None, with reasoning under the names that templates read.

    Raises ValueError naming the message that is no mapping with a role, or holds more than text.
    """
    if isinstance(messages, str | Mapping) or not isinstance(messages, Sequence):
        raise ValueError(f"messages: a conversation is a list of messages, not {type(messages).__name__}")
    ready = []
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise ValueError(f"messages: number {i} is {type(message).__name__}, not a mapping with role and content")
        copy = {key: value for key, value in message.items() if value is not None}
        _check_parts(copy.get("content"), i)
        copy = plain(copy, "messages")
        if (thought := next((copy[name] for name in REASONING if name in copy), None)) is not None:
            copy = {"thinking": thought, **copy, "reasoning_content": thought}
        ready.append(copy)
    return ready


def _check_parts(content: Any, i: int) -> None:
    for part in content if isinstance(content, list | tuple) else ():
        if isinstance(part, Mapping) and (found := MEDIA.intersection([str(part.get("type")), *part.keys()])):
            kind = min(found)
            raise ValueError(f"messages: number {i} holds a part of type {kind!r}: only text can be read, leave it out")


def flattened(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The same conversation in the simplest form: contents are one text, arguments of tool calls mappings."""
    return [_flat(message) for message in messages]


def _flat(message: dict[str, Any]) -> dict[str, Any]:
    content = message.get("content", "")
    if isinstance(content, list | tuple) and all(_text(part) is not None for part in content):
        content = "".join(str(_text(part)) for part in content)
    flat = {**message, "content": content}
    if isinstance(calls := message.get("tool_calls"), list):
        flat["tool_calls"] = [_with_mapping(call) for call in calls]
    return flat


def _text(part: Any) -> str | None:
    if isinstance(part, str):
        return part
    text = part.get("text") if isinstance(part, dict) and part.get("type", "text") in ("text", "input_text") else None
    return text if isinstance(text, str) else None


def _with_mapping(call: Any) -> Any:
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("arguments"), str):
        return call
    try:
        arguments = json.loads(function["arguments"])
    except (ValueError, RecursionError):
        return call
    return {**call, "function": {**function, "arguments": arguments}} if isinstance(arguments, dict) else call


def fully_shown(messages: list[dict[str, Any]], text: str, flat: str) -> bool:
    """Whether a rendering shows the parts of contents as text: each that the flattened one shows, none as a list."""
    for message in messages:
        content = message.get("content")
        for part in content if isinstance(content, list | tuple) else ():
            words = (_text(part) or "").strip()
            if (words in flat and words not in text) or text.count(repr(part)) > flat.count(repr(part)):
                return False
    return True


def open_ended(messages: list[dict[str, Any]], field: str) -> list[dict[str, Any]]:
    """The conversation with a mark at the end of a field of its last message."""
    last = messages[-1] if messages else {}
    text = last.get(field)
    if isinstance(text, list):
        at = max((i for i, part in enumerate(text) if _text(part) is not None), default=-1)
        part = text[at] if text else None
        if isinstance(part, dict):
            marked = [*text[:at], {**part, "text": part["text"] + END_OF_TEXT}, *text[at + 1 :]]
            return [*messages[:-1], {**last, field: marked}]
    if not isinstance(text, str):
        raise ValueError(f"continue_final_message: the last message has no {field!r} to go on with")
    copies = REASONING if field in REASONING else (field,)
    return [*messages[:-1], {**last, **{name: text + END_OF_TEXT for name in copies if last.get(name) == text}}]
