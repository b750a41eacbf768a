"""Which tensor of a file is which parameter. Never imports torch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

__all__ = ["names_in_file"]


def names_in_file(config: Any, stored: Iterable[str]) -> dict[str, tuple[str, tuple[int, ...]]]:
    """Name in the file -> (parameter, shape). A tensor that the file lacks stands under its parameter's name.

    Multimodal files say `model.language_model.layers` where text-only ones say `model.layers`, and some write
    `layers.07`.
    """
    shapes = config.tensors()
    in_file = {}
    for name in stored:
        parameter = re.sub(r"\blayers\.0+(?=\d)", "layers.", name)
        if parameter not in shapes:
            parameter = re.sub(r"^(model\.)?language_model\.(model\.)?", "model.", parameter)
        if parameter in shapes:
            in_file[parameter] = name
    return {in_file.get(parameter, parameter): (parameter, shape) for parameter, shape in shapes.items()}
