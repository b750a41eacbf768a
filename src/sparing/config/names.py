"""Which tensor of a file is which parameter. Never imports torch."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from sparing.config.protocol import HasTensors
from sparing.config.roles import Role, Shape

__all__ = ["HEAD_NAMES", "OWN_HEAD", "Expected", "names_in_file", "stored_head"]

OWN_HEAD = "lm_head.weight"
HEAD_NAMES = re.compile(r"(model\.)?(language_model\.)?lm_head\.weight")
EXPERT = re.compile(r"^(.*\.experts)\.(\d+)\.(\w+)\.weight$")


class Expected(NamedTuple):
    """What a tensor of a file must be. parameter: `experts.up_proj.3` is part 3 of the stack `experts.up_proj`."""

    parameter: str
    shape: Shape
    role: Role


def names_in_file(config: HasTensors, stored: Iterable[str]) -> dict[str, Expected]:
    """Name in the file -> what it holds. A tensor that the file lacks stands under its parameter's name.

    Multimodal files say `model.language_model.layers` where text-only ones say `model.layers`, Nemotron files
    `backbone.layers`, and some write `layers.07`. Where a file holds experts one by one, `experts.3.up_proj.weight` is
    part 3 of the parameter `experts.up_proj`, named `experts.up_proj.3`. A table that is embedding and head may be
    stored as either; where the model looks nothing up in it, the head is what counts.
    """
    stored = list(stored)
    tensors = config.tensors()
    in_file: dict[str, str] = {}
    one_by_one: dict[str, str] = {}  # parameter -> its parts' name in the file, with {} for the index
    parts: Counter[str] = Counter()
    for name in stored:
        for parameter in _spellings(name):
            if parameter in tensors:
                in_file[parameter] = name
                break
            stacked = EXPERT.sub(r"\1.\3", parameter)
            if stacked in tensors:
                parts[stacked] += 1
                one_by_one[stacked] = re.sub(r"\.experts\.\d+\.", ".experts.{}.", name)
                break
    tied = next((name for name, (_, role) in tensors.items() if role.is_tied), None)
    head = None if tied is None else stored_head(stored)
    if tied is not None and head is not None and not (tied in in_file and tensors[tied][1].is_looked_up):
        in_file[tied] = head
    names: dict[str, Expected] = {}
    for parameter, (shape, role) in tensors.items():
        if parameter in one_by_one and parameter not in in_file:
            part, most = one_by_one[parameter], parts[parameter] + 1  # one that is missing is enough to say so
            names |= {part.format(e): Expected(f"{parameter}.{e}", shape[1:], role) for e in range(min(shape[0], most))}
        else:
            names[in_file.get(parameter, parameter)] = Expected(parameter, shape, role)
    return names


def stored_head(stored: Iterable[str]) -> str | None:
    """What a file calls the table of its output head; None where it has none."""
    return next((name for name in stored if HEAD_NAMES.fullmatch(name)), None)


def _spellings(name: str) -> Iterator[str]:
    """What a tensor of a file may be called as a parameter."""
    name = re.sub(r"\blayers\.0+(?=\d)", "layers.", name)
    yield name
    bare = re.sub(r"^(model\.)?(language_model\.)?((model|backbone)\.)?", "", name)
    yield from (f"model.{bare}", f"backbone.{bare}", bare)
