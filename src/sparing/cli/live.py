"""Text on a terminal while it is made: a canvas settles below what is final, and a line says what is remembered."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.console import Console
from rich.live import Live
from rich.text import Text

from sparing.decoding.events import Commit, Done, Draft, Event
from sparing.decoding.tokenizer import TextStream
from sparing.text import printable, readable_bytes

if TYPE_CHECKING:
    from sparing.checkpoint.tokenizer import Tokenizer
    from sparing.decoding.answer import AnswerParts, Part
    from sparing.memory.sequence import Memory

__all__ = ["LiveView", "pieces"]

ACCEPTED, CHANGED, RENOISED = "green", "bold yellow", "bright_black"
PART_STYLES = {"reasoning": "dim", "content": "", "tool_call": "cyan"}
SPECIAL = "·"  # an end or padding token inside a canvas
FRAMES_PER_SECOND = 25


def pieces(tokenizer: Tokenizer, ids: Sequence[int]) -> list[str]:
    """The text that each token adds. A character of several tokens belongs to the one that completes it."""
    stream = TextStream(tokenizer, skip_special_tokens=False)
    texts = []
    for token in ids:
        if token in tokenizer.special_ids:
            texts.append(printable(stream.flush()) + SPECIAL)
            stream = TextStream(tokenizer, skip_special_tokens=False)
        else:
            texts.append(printable(stream.push([token])))
    if texts:
        texts[-1] += printable(stream.flush())
    return texts


class LiveView:
    """One row of events. Of a decoder that makes no drafts the text simply grows.

    Green: the token drawn was kept for the next step. Grey: it is drawn afresh. Yellow: the most likely token is
    another than a step ago. pace: seconds that a step is shown at least. memory: the row's, whose bytes a line below
    the text then tells. canvases: whether drafts are shown; those of a speculative decoder nobody wants to watch.
    parts: splits the answer; thoughts are dimmed, and an empty line divides them from it.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        console: Console | None = None,
        pace: float = 0.0,
        memory: Memory | None = None,
        canvases: bool = True,
        parts: AnswerParts | None = None,
    ):
        self.console = console or Console(highlight=False)
        self.tokenizer = tokenizer
        self.pace = pace
        self.memory = memory
        self.canvases = canvases
        self.parts = parts
        self._kind = ""  # of the part that was shown last
        self._tail = Text()  # final text of the line that is not complete yet
        self._tokens = 0
        self._draft: Draft | None = None
        self._changed: list[bool] = []
        self._drawn = 0.0
        self._live: Live | None = None

    def event(self, event: Event) -> None:
        if isinstance(event, Draft):
            if not self.canvases:
                return
            before = self._draft.ids if self._draft else event.ids
            self._changed = [token != old for token, old in zip(event.ids, before, strict=True)]
            self._draft = event
            self._draw()
        elif isinstance(event, Commit):
            settled, self._draft = self._draft is not None, None
            self._tokens += len(event.ids)
            self._append(self.final(event), settled)
        elif isinstance(event, Done):
            self.close()

    def close(self) -> None:
        """Leave the text on the terminal; of an interrupted canvas its last state."""
        if self.parts is not None and (late := self._shown(self.parts.close())):
            self._append(late, settled=False)
        rest = self._tail
        if self._draft is not None:
            rest = self._frame_text([RENOISED] * len(self._draft.ids))
        self._tail, self._draft = Text(), None
        if self._live is not None:
            self._live.stop()
            self._live = None
            if rest:
                self.console.print(rest, soft_wrap=True)
        elif rest:  # streamed: only the line end is missing
            self.console.print()

    def _append(self, text: Text, settled: bool) -> None:
        """settled: it ends a canvas that was shown."""
        *lines, tail = Text.assemble(self._tail, text).split("\n", allow_blank=True)
        self._tail = tail
        if self._live is None and self.memory is None:
            self.console.print(text, end="", soft_wrap=True)
            self.console.file.flush()
            return
        live = self._live or self._start()
        if not (lines or settled) and self._is_early():
            return
        # Whole lines go above the live part for good; the terminal wraps them, so that they copy as they are.
        live.update(self.frame(), refresh=not lines)
        for line in lines:
            self.console.print(line, soft_wrap=True)

    def _start(self) -> Live:
        self._live = live = Live(console=self.console, auto_refresh=False, transient=True)
        live.start()
        return live

    def _is_early(self) -> bool:
        """Whether the last frame was just drawn. If not, one is drawn now."""
        now = time.monotonic()
        if now - self._drawn < 1 / FRAMES_PER_SECOND:
            return True
        self._drawn = now
        return False

    def _draw(self) -> None:
        first = self._live is None
        live = self._live or self._start()
        if self._is_early() and not self.pace and not first:
            return
        live.update(self.frame(), refresh=True)
        if self.pace:
            time.sleep(self.pace)

    def frame(self) -> Text:
        """The last lines that fit the terminal, and a line that says how far the canvas is and what is remembered."""
        draft, text = self._draft, self._tail
        facts: list[tuple[str, str]] = []
        if draft is not None:
            styles = [
                CHANGED if changed else ACCEPTED if accepted else RENOISED
                for changed, accepted in zip(self._changed, draft.accepted, strict=True)
            ]
            text = self._frame_text(styles)
            kept = sum(draft.accepted)
            facts = [
                (f"step {draft.step}", "dim"),
                (f"{kept} accepted", ACCEPTED),
                (f"{len(draft.ids) - kept} renoised", RENOISED),
                (f"{sum(self._changed)} changed", CHANGED),
                (f"{sum(draft.entropy) / len(draft.entropy):.3f} nats", "dim"),
            ]
        if self._tokens and (draft is not None or self.memory is not None):
            facts.append((f"{self._tokens} tokens", "dim"))
        if self.memory is not None:
            facts.append((f"{readable_bytes(self.memory.nbytes)} remembered", "dim"))
            if (entries := self.memory.held) is not None:
                facts.append((f"{entries} entries kept", "dim"))
        footer = Text(" · ", "dim").join(Text(*fact) for fact in facts)
        below = footer.wrap(self.console, self.console.width)[: self.console.height // 2] if facts else []
        lines = text.wrap(self.console, self.console.width, overflow="fold")
        return Text("\n").join([*lines[-max(1, self.console.height - len(below) - 1) :], *below])

    def _frame_text(self, styles: Sequence[str]) -> Text:
        assert self._draft is not None
        return Text.assemble(self._tail, self.canvas(self._draft.ids, styles))

    def canvas(self, ids: Sequence[int], styles: Sequence[str]) -> Text:
        """A canvas as text, each token in its style."""
        return Text.assemble(*zip(pieces(self.tokenizer, ids), styles, strict=True))

    def final(self, event: Commit) -> Text:
        """What stays of a finished canvas."""
        return Text(printable(event.text)) if self.parts is None else self._shown(self.parts.push(event))

    def _shown(self, parts: Sequence[Part]) -> Text:
        text = Text()
        for kind, piece in parts:
            between = "\n\n" if self._kind and kind != self._kind else ""
            text.append(between + printable(piece), PART_STYLES[kind])
            self._kind = kind
        return text
