"""The commands and their order in `sparing --help`. Importing this must stay cheap: no PyTorch, no rich."""

from __future__ import annotations

import click

from sparing import __version__
from sparing.cli.calibrate import calibrate
from sparing.cli.chat import chat
from sparing.cli.demo import demo
from sparing.cli.generate import generate
from sparing.cli.inspect import inspect
from sparing.cli.plan import plan
from sparing.cli.quantize import quantize
from sparing.cli.train import train

__all__ = ["app"]


class InOrder(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, message="sparing %(version)s")
def app() -> None:
    """Efficient language models: exact, small and fast.

    MODEL is a folder, a GGUF file, a hub id (org/name), or a model that ships: tales, sudoku, hybrid.
    """


for command in (generate, chat, plan, inspect, calibrate, quantize, train, demo):
    app.add_command(command)
