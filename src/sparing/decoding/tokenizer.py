"""What decoding asks of a model's tokenizer, and the text of ids that arrive one by one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

__all__ = ["ChatTemplate", "TextStream", "Tokenizer"]

UNFINISHED = "\ufffd"
MAX_HELD = 64


class ChatTemplate(Protocol):
    """source: its own text."""

    @property
    def source(self) -> str: ...

    def reads(self, tools: bool = False) -> frozenset[str]:
        """Names of the variables that it asks for. tools: where tools are given."""
        ...


class Tokenizer(Protocol):
    """special_ids: ids that are no text; chat_template: None where there is none."""

    @property
    def special_ids(self) -> frozenset[int]: ...
    @property
    def chat_template(self) -> ChatTemplate | None: ...

    def token_to_id(self, token: str) -> int | None: ...

    def id_to_token(self, token_id: int) -> str | None: ...

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]: ...

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str: ...

    def apply_chat_template(self, messages: Sequence[Mapping[str, Any]], **variables: Any) -> str: ...


class TextStream:
    """Decodes ids as they arrive, without ever showing half a character.

    after: ids that came before, whose continuation this is: a word's blank may lie in its token and is not part of
    the text only where nothing precedes it.
    The pieces that push() and flush() return, joined, are the text that decode() gives for all ids; after others, what
    it gives for both without what it gives for those.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True, after: Sequence[int] = ()) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        # shown already, but needed: how a token reads depends on the one before it
        self._before = list(after[-MAX_HELD:])
        if self._before and not tokenizer.decode(self._before, skip_special_tokens):
            self._before = list(after)  # nothing but tokens that do not show
        self._held: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """Takes more ids and returns the text that is now certain, possibly none."""
        shown = ""
        for token_id in ids:
            self._held.append(token_id)
            shown += self._advance(force=len(self._held) >= MAX_HELD)
        return shown

    def flush(self) -> str:
        """The rest, unfinished characters as U+FFFD."""
        return self._advance(force=True)

    def _advance(self, force: bool) -> str:
        before = self._tokenizer.decode(self._before, self._skip)
        text = self._tokenizer.decode(self._before + self._held, self._skip)
        if text.endswith(UNFINISHED) and not force:
            return ""
        # Skipped tokens must not push out of sight the token that the next one depends on.
        if text != before:
            self._before, self._held = self._held, []
        elif not force:
            return ""
        return text[_shared(before, text) :]


def _shared(before: str, text: str) -> int:
    """How many characters two texts begin with in common: all of the first, unless that ended within a character."""
    if text.startswith(before):
        return len(before)
    return next(i for i in range(len(before)) if text[i : i + 1] != before[i])
