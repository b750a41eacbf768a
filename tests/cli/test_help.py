"""Help texts: the same option looks the same, and stands in the same order, in every command that has it."""

from __future__ import annotations

from itertools import combinations

import click
import pytest

from sparing.cli.app import app

# Options whose name has a meaning of its own in each command.
OWN_MEANING = {"--out", "--steps", "--text", "--tokens"}


def options(name: str) -> dict[str, str]:
    """{option: what stands for its value} of a command, in the order of its help."""
    command = app.commands[name]
    context = click.Context(command, info_name=name)
    found = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
    return {option.opts[-1]: "" if option.is_flag else option.make_metavar(context) for option in found}


@pytest.mark.parametrize(("one", "other"), combinations(app.commands, 2))
def test_shared_options_look_the_same_and_stand_in_one_order(one, other):
    first, second = options(one), options(other)
    shared = [name for name in first if name in second and name not in OWN_MEANING]
    assert [name for name in second if name in shared] == shared
    assert {name: first[name] for name in shared} == {name: second[name] for name in shared}


@pytest.mark.parametrize("name", app.commands)
def test_every_option_says_what_it_does(name):
    assert all(o.help and o.help.endswith(".") for o in app.commands[name].params if isinstance(o, click.Option))
    assert len(app.commands[name].get_short_help_str(limit=80)) < 76  # one line of `sparing --help`, nothing cut off
    assert not app.commands[name].get_short_help_str(limit=80).endswith("...")
