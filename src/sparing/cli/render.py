"""Events as a person or a program wants to see them: a live canvas, plain text, or JSON lines."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from sparing.decoding.events import Commit, Done, Draft, Event

if TYPE_CHECKING:
    from rich.console import Console
    from rich.text import Text

    from sparing.checkpoint.tokenizer import Tokenizer

__all__ = ["JsonView", "LiveView", "PlainView", "View", "show", "speeds"]

ACCEPTED, CHANGED, RENOISED = "green", "yellow", "bright_black"


class View(Protocol):
    def event(self, event: Event) -> None: ...

    def close(self) -> None: ...


def show(events: Iterable[Event], view: View) -> list[Done]:
    """Feed a stream of events to a view, to the end or to an interruption; returns the Done of each row."""
    done = []
    try:
        for event in events:
            view.event(event)
            if isinstance(event, Done):
                done.append(event)
    finally:
        view.close()
    return done


def speeds(done: Iterable[Done]) -> str:
    """Useful tokens only: per second and per forward pass."""
    stats = [event.stats for event in done]
    tokens, seconds = sum(s["new_tokens"] for s in stats), max(s["seconds"] for s in stats)
    forwards, size = sum(s["forwards"] for s in stats), sum(s["memory_bytes"] for s in stats)
    return (
        f"{tokens} tokens in {seconds:.1f} s: {tokens / max(seconds, 1e-9):.0f} tokens/s,"
        f" {tokens / forwards:.2f} tokens per forward pass ({forwards} passes), {size:,} bytes remembered"
    )


class JsonView:
    """One JSON object a line, with the event's name under "event"."""

    def event(self, event: Event) -> None:
        print(json.dumps({"event": type(event).__name__.lower(), **asdict(event)}, ensure_ascii=False), flush=True)

    def close(self) -> None:
        pass


class PlainView:
    """The text alone, as it becomes final. Several rows are printed one after another, each under a heading."""

    def __init__(self, rows: int = 1) -> None:
        self.rows = rows
        self._text: dict[int, str] = {}
        self._open = False

    def event(self, event: Event) -> None:
        if isinstance(event, Commit):
            if self.rows == 1:
                self._open = True
                print(event.text, end="", flush=True)
            else:
                self._text[event.row] = self._text.get(event.row, "") + event.text
        elif isinstance(event, Done) and self.rows > 1:
            print(f"--- {event.row + 1} ---\n{self._text.get(event.row, '')}", flush=True)

    def close(self) -> None:
        if self._open:
            print(flush=True)


class LiveView:
    """A canvas that settles in place under the text that is already final; left to right, text just grows.

    Green: the sampled token was kept for the next step. Yellow: the most likely token changed. Grey: drawn afresh.
    """

    def __init__(self, tokenizer: Tokenizer, console: Console | None = None) -> None:
        from rich.console import Console
        from rich.live import Live

        self.console = console or Console(highlight=False)
        self._tokenizer = tokenizer
        self._tail = ""  # final text of the line that is not yet complete
        self._previous: list[int] = []
        self._live = Live(console=self.console, auto_refresh=False, transient=True)
        self._is_live = False
        self._streamed = False

    def event(self, event: Event) -> None:
        if isinstance(event, Draft):
            if not self._is_live:
                self._live.start()
                self._is_live = True
            self._live.update(self.frame(event), refresh=True)
            self._previous = event.ids
        elif isinstance(event, Commit) and self._is_live:
            self._previous = []
            *lines, self._tail = (self._tail + event.text).split("\n")
            for line in lines:
                self._print(line)
        elif isinstance(event, Commit):
            self._streamed = True
            self.console.file.write(event.text)
            self.console.file.flush()

    def frame(self, draft: Draft) -> Text:
        """One step: the canvas in colours, and a line that says how far it is."""
        from rich.text import Text

        text = Text(self._tail)
        previous = self._previous or [-1] * len(draft.ids)
        for token, accepted, before in zip(draft.ids, draft.accepted, previous, strict=True):
            style = CHANGED if token != before else ACCEPTED if accepted else RENOISED
            text.append(self._visible(token), style)
        lines = text.split("\n", allow_blank=True)
        room = max(3, self.console.height - 3)
        text = Text("\n").join(lines[-room:])
        mean = sum(draft.entropy) / len(draft.entropy)
        footer = f"step {draft.step}, {sum(draft.accepted)} of {len(draft.ids)} accepted, {mean:.3f} nats a token"
        return Text.assemble(text, "\n", (footer, "dim"))

    def _visible(self, token: int) -> str:
        """A token as it may be drawn: special ones as a dot, without control characters."""
        if token in self._tokenizer.special_ids:
            return "·"
        shown = self._tokenizer.decode([token], skip_special_tokens=False)
        return "".join(c if c == "\n" or c.isprintable() else "·" for c in shown)

    def _print(self, line: str) -> None:
        self.console.print(line, markup=False, highlight=False)

    def close(self) -> None:
        if self._is_live:
            self._live.stop()
            if self._tail:
                self._print(self._tail)
        elif self._streamed:
            self.console.file.write("\n")
        self._tail = ""


def choose(as_json: bool, rows: int, tokenizer: Any) -> View:
    """The view that suits where the output goes."""
    if as_json:
        return JsonView()
    if rows > 1 or tokenizer is None or not sys.stdout.isatty():
        return PlainView(rows)
    return LiveView(tokenizer)
