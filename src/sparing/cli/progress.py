"""How far a long command has come: a bar on a terminal, elsewhere a line every 5 %; both on standard error."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID

__all__ = ["Progress"]


class Progress:
    """To be entered; `show` then takes what is done. doing: the bar's name; unit: what is counted."""

    _bar: Bar | None = None
    _task: TaskID

    def __init__(self, doing: str, unit: str):
        self._doing, self._unit = doing, unit
        self._said = 0

    def __enter__(self) -> Progress:
        if sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import Progress as Bar

            self._bar = Bar(console=Console(stderr=True))
            self._task = self._bar.add_task(self._doing, total=None)
            self._bar.start()
        return self

    def show(self, done: int, total: int, name: str = "") -> None:
        """name: of what has just been done."""
        if self._bar is not None:
            self._bar.update(self._task, completed=done, total=total, description=name or self._doing)
        elif (share := 20 * done // total) > self._said:
            self._said = share
            print(f"{5 * share} % of {total} {self._unit}{name and f': {name}'}", file=sys.stderr, flush=True)

    def __exit__(self, *exception: object) -> None:
        if self._bar is not None:
            self._bar.stop()
