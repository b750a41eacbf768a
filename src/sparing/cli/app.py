"""The commands and their order in `sparing --help`. Importing this must stay cheap: no PyTorch, no rich."""

from __future__ import annotations

import click

from sparing import __version__
from sparing.cli.bench import bench
from sparing.cli.calibrate import calibrate
from sparing.cli.chat import chat
from sparing.cli.compare import compare
from sparing.cli.demo import demo
from sparing.cli.generate import generate
from sparing.cli.inspect import inspect
from sparing.cli.perplexity import perplexity
from sparing.cli.plan import plan
from sparing.cli.quantize import quantize
from sparing.cli.train import train

__all__ = ["app"]


class InOrder(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


def _version(context: click.Context, _: click.Parameter, asked: bool) -> None:
    """What a report of a fault should name: versions, and which kernels run."""
    if not asked or context.resilient_parsing:
        return
    import torch

    from sparing.kernels import dispatch

    others = [name for name in dispatch.available() if name != dispatch.active()]
    choice = f"; SPARING_KERNELS chooses {', '.join(others)}" if others else ""
    click.echo(f"sparing {__version__}\ntorch {torch.__version__}\nkernels {dispatch.active()}{choice}")
    context.exit()


@click.group(cls=InOrder, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.option(
    "--version",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=_version,
    help="Show versions, and which kernels run.",
)
def app() -> None:
    """Efficient language models: exact, small and fast.

    MODEL is a folder, a GGUF file, a hub id (org/name), or a model that ships: tales, sudoku, hybrid.
    """


METAVARS = {"integer": "N", "float": "NUMBER", "directory": "FOLDER"}  # what stands for a value in a help text

for command in (generate, chat, plan, inspect, bench, perplexity, compare, calibrate, quantize, train, demo):
    app.add_command(command)
    for parameter in command.params:
        if not (parameter.metavar or getattr(parameter, "is_flag", True)):
            parameter.metavar = METAVARS.get(parameter.type.name)
