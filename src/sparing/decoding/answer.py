"""What an answer consists of: thoughts, the answer itself and calls of tools, told apart by the marks around them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

from sparing.decoding.events import Commit
from sparing.decoding.tokenizer import Tokenizer

__all__ = ["AnswerParts", "Part", "for_history"]


class _Marks(NamedTuple):
    kind: str
    opening: str
    closing: str | None  # None: it goes to the end of the answer
    label: str = ""  # text that belongs to the opening mark


# As the models in use write them.
MARKS = (
    _Marks("reasoning", "<|channel>", "<channel|>", "thought\n"),  # Gemma 4
    _Marks("reasoning", "<think>", "</think>"),  # Nemotron 3, Qwen, DeepSeek, GLM ...
    _Marks("reasoning", "[THINK]", "[/THINK]"),  # Ministral
    _Marks("reasoning", "<|START_THINKING|>", "<|END_THINKING|>"),
    _Marks("reasoning", "<seed:think>", "</seed:think>"),
    _Marks("tool_call", "<|tool_call>", "<tool_call|>"),
    _Marks("tool_call", "<tool_call>", "</tool_call>"),
    _Marks("tool_call", "<|START_ACTION|>", "<|END_ACTION|>"),
    _Marks("tool_call", "[TOOL_CALLS]", None),
)


class Part(NamedTuple):
    """A piece of an answer. kind: "reasoning", "content" or "tool_call"."""

    kind: str
    text: str


class AnswerParts:
    """Splits the commits of one row as they arrive; texts of a kind concatenate.

    Marks and blanks next to them are left out, special tokens too. Marks count that the tokenizer has as a token or the
    chat template mentions. prompt: the end of what the model answers to, which may begin a thought.
    """

    def __init__(self, tokenizer: Tokenizer, prompt: str = "") -> None:
        source = "" if tokenizer.chat_template is None else tokenizer.chat_template.source
        self._marks = [marks for marks in MARKS if _known(marks.opening, tokenizer, source)]
        end, thoughts = prompt.rstrip(), [marks for marks in self._marks if marks.kind == "reasoning"]
        self._within = next((m for m in thoughts if end.endswith((m.opening + m.label).rstrip())), None)
        self._waiting: list[tuple[str, bool]] = []  # characters, and whether they are shown
        self._begins = self._within is not None  # a mark precedes, and nothing was given since

    def push(self, event: Commit) -> list[Part]:
        """What is now certain, in order."""
        at = 0
        for offset, mark in event.marks:
            self._waiting += [(c, True) for c in event.text[at:offset]] + [(c, False) for c in mark]
            at = offset
        self._waiting += [(c, True) for c in event.text[at:]]
        return [part for part in self._advance() if part.text]

    def close(self) -> list[Part]:
        """The rest, where the answer ended."""
        rest = self._part(len(self._waiting))
        return [rest] if rest.text else []

    def _advance(self) -> Iterator[Part]:
        while True:
            text = "".join(c for c, _ in self._waiting)
            if self._within is not None:
                wanted = [(self._within.closing, None)] if self._within.closing is not None else []
            else:
                wanted = [(marks.opening + marks.label, marks) for marks in self._marks]
            found = [(at, mark, then) for mark, then in wanted if (at := text.find(mark)) >= 0]
            if not found:
                held = max((n for mark, _ in wanted for n in range(1, len(mark)) if text.endswith(mark[:n])), default=0)
                blanks = len(text) - held - len(text[: len(text) - held].rstrip())
                yield self._part(len(text) - held - blanks)  # blanks before a mark belong to it
                return
            at, mark, then = min(found, key=lambda one: one[0])
            yield self._part(len(text[:at].rstrip()))
            rest = "".join(c for c, _ in self._waiting)
            del self._waiting[: rest.index(mark) + len(mark)]
            self._within, self._begins = then, True

    def _part(self, end: int) -> Part:
        text = "".join(c for c, shown in self._waiting[:end] if shown)
        del self._waiting[:end]
        if self._begins:
            text = text.lstrip()
        self._begins = self._begins and not text
        return Part("content" if self._within is None else self._within.kind, text)


def for_history(event: Commit, tokenizer: Tokenizer) -> str:
    """The text of a commit with the marks that a template looks for when it decides what of an old answer to show."""
    source = "" if tokenizer.chat_template is None else tokenizer.chat_template.source
    kept = [(offset, mark) for offset, mark in event.marks if _known(mark, None, source)]
    return replace(event, marks=kept).marked


def _known(mark: str, tokenizer: Tokenizer | None, source: str) -> bool:
    return mark in source or (tokenizer is not None and tokenizer.token_to_id(mark) is not None)
