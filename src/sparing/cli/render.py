"""Events as a person or a program wants to see them: a live canvas, plain text, or JSON lines."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from sparing.decoding.events import Commit, Done, Event
from sparing.text import printable, readable_bytes

if TYPE_CHECKING:
    from sparing.decoding.answer import AnswerParts, Part
    from sparing.memory.sequence import Memory

__all__ = [
    "JsonView",
    "Outcome",
    "PlainView",
    "Silent",
    "View",
    "choose",
    "has_live_terminal",
    "show",
    "speculates",
]

# Control characters and line ends that JSON may leave as they are.
_LEFT_BY_JSON = re.compile("[\x7f-\x9f\u2028\u2029]")


class View(Protocol):
    def event(self, event: Event) -> None: ...

    def close(self) -> None:
        """Called after the last event or an interruption."""
        ...


@dataclass
class Outcome:
    """What came of a stream of events: text and ids of each row, their Done, and the seconds spent on making them."""

    texts: dict[int, str] = field(default_factory=dict)
    ids: dict[int, list[int]] = field(default_factory=dict)
    done: list[Done] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    seconds: float = 0.0

    def total(self, name: str) -> int:
        """The sum of one entry of `Done.stats` over the rows."""
        return sum(event.stats.get(name, 0) for event in self.done)

    def speeds(self) -> str:
        """Useful tokens only (up to the end of the text): per second and per forward pass."""
        tokens, forwards = self.total("new_tokens"), self.total("forwards")
        parts = [
            f"{tokens} tokens in {self.seconds:.2f} s",
            f"{tokens / max(self.seconds, 1e-9):.1f} tokens/s",
            f"{tokens / forwards:.2f} tokens per forward pass ({forwards} passes)",
            f"{readable_bytes(self.total('memory_bytes'))} remembered",
        ]
        if rounds := [round for event in self.done for round in event.stats.get("evictions", ())]:
            evicted, most = sum(round["evicted"] for round in rounds), max(round["held"] for round in rounds)
            parts.append(f"{evicted} entries forgotten in {len(rounds)} rounds (at most {most} held)")
        if proposed := self.total("proposed"):
            parts.append(f"{self.total('accepted')} of {proposed} drafts accepted")
        if self.logprobs:
            parts.append(f"log-probability {sum(self.logprobs) / len(self.logprobs):.3f} a token")
        return ", ".join(parts)


def show(events: Iterator[Event], view: View) -> Outcome:
    """Feed a stream of events to a view, to the end or to an interruption.

    Only the time inside the stream counts as its own: drawing and waiting for someone to watch do not.
    """
    outcome = Outcome()
    try:
        while True:
            began = time.perf_counter()
            event = next(events, None)
            outcome.seconds += time.perf_counter() - began
            if event is None:
                return outcome
            if isinstance(event, Commit):
                outcome.texts[event.row] = outcome.texts.get(event.row, "") + event.text
                outcome.ids[event.row] = outcome.ids.get(event.row, []) + event.ids
                outcome.logprobs += event.logprobs or []
            elif isinstance(event, Done):
                outcome.done.append(event)
            view.event(event)
    finally:
        if isinstance(events, Generator):
            events.close()  # an interruption may have struck outside of it
        view.close()


class Silent:
    """Shows nothing, for those who want the outcome."""

    def event(self, event: Event) -> None:
        pass

    def close(self) -> None:
        pass


class JsonView:
    """One JSON object a line, with the event's name under "event". All control characters are escaped."""

    def event(self, event: Event) -> None:
        line = json.dumps({"event": type(event).__name__.lower(), **asdict(event)}, ensure_ascii=False)
        print(_LEFT_BY_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", line), flush=True)

    def close(self) -> None:
        pass


class PlainView:
    """The text alone, as it becomes final. Several rows are printed one after another, each under its number.

    parts: splits the answer of the only row; its thoughts go to standard error.
    """

    def __init__(self, rows: int = 1, parts: AnswerParts | None = None):
        self.rows = rows
        self.parts = parts if rows == 1 else None
        self._thinks = False
        self._texts: dict[int, str] = {}
        self._last = "\n"

    def event(self, event: Event) -> None:
        if isinstance(event, Commit) and self.parts is not None:
            self._say(self.parts.push(event))
        elif isinstance(event, Commit) and self.rows == 1:
            self._write(event.text)
        elif isinstance(event, Commit):
            self._texts[event.row] = self._texts.get(event.row, "") + event.text
        elif isinstance(event, Done) and self.rows > 1:
            self._row(event.row)

    def close(self) -> None:
        if self.parts is not None:
            self._say(self.parts.close())
            self._end_thought()
        for row in sorted(self._texts):  # those that were interrupted
            self._row(row)
        if self._last != "\n":
            self._write("\n")

    def _say(self, parts: Sequence[Part]) -> None:
        for kind, text in parts:
            if kind == "reasoning":
                sys.stderr.write(printable(text))
                sys.stderr.flush()
                self._thinks = True
                continue
            self._end_thought()
            if kind == "tool_call" and self._last != "\n":
                self._write("\n")
            self._write(text)

    def _end_thought(self) -> None:
        if self._thinks:
            sys.stderr.write("\n")
            self._thinks = False

    def _row(self, row: int) -> None:
        text = self._texts.pop(row, "").removesuffix("\n")
        self._write(f"[{row + 1}]\n{text}\n")

    def _write(self, text: str) -> None:
        if text := printable(text):
            self._last = text[-1]
            sys.stdout.write(text)
            sys.stdout.flush()


def has_live_terminal() -> bool:
    """Whether standard output is a terminal that can redraw."""
    if not sys.stdout.isatty():
        return False
    from rich.console import Console

    return not Console().is_dumb_terminal


def speculates(options: Mapping[str, Any]) -> bool:
    """Whether `sparing.generate` drafts single tokens with these options, which nobody wants to watch."""
    return "draft" in options or options.get("decoder") == "speculative"


def choose(
    rows: int,
    tokenizer: Any,
    *,
    canvases: bool = True,
    memory: Memory | None = None,
    parts: AnswerParts | None = None,
) -> View:
    """The view that suits where the output goes.

    canvases: whether drafts are canvases, to be watched; memory: of the only row, to be counted while it grows;
    parts: splits the answer of the only row, whose thoughts are shown apart.
    """
    if rows > 1 or tokenizer is None or not (canvases or memory) or not has_live_terminal():
        return PlainView(rows, parts)
    from sparing.cli.live import LiveView

    return LiveView(tokenizer, memory=memory, canvases=canvases, parts=parts)
