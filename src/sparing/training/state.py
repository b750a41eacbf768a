"""The state of a run on disk: one file, replaced as a whole, from which training goes on to the bit."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.checkpoint.safetensors import SafetensorsFile
from sparing.checkpoint.tensors import torch_dtype
from sparing.checkpoint.write import save_safetensors
from sparing.errors import CheckpointError
from sparing.models.base import LanguageModel
from sparing.training.muon import first_state

__all__ = ["TrainingState", "read_run"]

FILE = "state.safetensors"
KEYS = {
    "recipe": (str, "a name"),
    "seed": (int, "a whole number >= 0"),
    "settings": (dict, "an object"),
    "step": (int, "a whole number >= 0"),
    "seconds": ((int, float), "a number >= 0"),
}


@dataclass
class TrainingState:
    """Everything a run changes. Data and noise of a step follow from seed and step, so no generator is stored.

    model, average: the weights and their moving average (two models of one architecture); buffers: names of those that
    steps change; step: steps taken; seconds: spent on them.
    """

    model: LanguageModel
    average: LanguageModel
    optimizer: torch.optim.Optimizer
    buffers: Sequence[str] = ()
    step: int = 0
    seconds: float = 0.0

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        averages = dict(self.average.named_parameters())
        groups = {parameter: group for group in self.optimizer.param_groups for parameter in group["params"]}
        for name, parameter in self.model.named_parameters():
            yield f"weight/{name}", parameter
            yield f"average/{name}", averages[name]
            remembered = self.optimizer.state[parameter]
            if not remembered:
                remembered.update(first_state(groups[parameter], parameter))
            yield from ((f"{key}/{name}", tensor) for key, tensor in remembered.items() if key != "step")
        for name in self.buffers:
            yield f"weight/{name}", self.model.get_buffer(name)
            yield f"average/{name}", self.average.get_buffer(name)

    @torch.no_grad()
    def average_in(self, share: float) -> None:
        """Move the averages towards the weights by `share` of the way."""
        for average, current in zip(self.average.parameters(), self.model.parameters(), strict=True):
            average.lerp_(current, share)
        for name in self.buffers:
            self.average.get_buffer(name).lerp_(self.model.get_buffer(name), share)

    def save(self, out: Path, run: Mapping[str, Any]) -> None:
        """Write out/state.safetensors; run: what `read_run` gives back. Raises CheckpointError, the old file stays."""
        described = {**run, "step": self.step, "seconds": round(self.seconds, 1)}
        save_safetensors(out / FILE, dict(self.tensors()), {"run": json.dumps(described)})

    @torch.no_grad()
    def load(self, out: Path) -> None:
        """Read out/state.safetensors.

        Raises CheckpointError for a file that is missing, damaged or of another run; nothing is changed then.
        """
        run, stored = read_run(out), SafetensorsFile(out / FILE)
        own = dict(self.tensors())
        if unknown := sorted(own.keys() ^ set(stored.names())):
            raise CheckpointError(f"{out / FILE}: {unknown[0]} is missing or surplus: this is another run")
        for name, tensor in own.items():
            kind = torch_dtype(stored.dtype(name), f"{out / FILE}: {name}")
            if stored.shape(name) != tuple(tensor.shape) or kind != tensor.dtype:
                raise CheckpointError(
                    f"{out / FILE}: {name} is {kind} {stored.shape(name)}, of this run it is {tensor.dtype} "
                    f"{tuple(tensor.shape)}: this is another run"
                )
        for name in own:
            if not stored.read(name).isfinite().all():
                raise CheckpointError(
                    f"{out / FILE}: {name} holds numbers that are not finite; train anew, with a smaller learning_rate"
                )
        self.step, self.seconds = run["step"], run["seconds"]
        for name, tensor in own.items():
            tensor.copy_(stored.read(name))
        for remembered in self.optimizer.state.values():
            if "step" in remembered:
                remembered["step"] = torch.tensor(float(self.step))


def read_run(out: Path) -> dict[str, Any]:
    """What a run's last save says about it: recipe, seed, settings, step, seconds.

    Raises CheckpointError where there is no run, or what is there says something else.
    """
    path = out / FILE
    if not path.exists():
        raise CheckpointError(f"{out}: no run that can be resumed: it has no {FILE}, which training writes")
    try:
        run = json.loads(SafetensorsFile(path).metadata["run"])
    except (KeyError, ValueError, RecursionError) as error:
        reason = error if isinstance(error, ValueError) else "it does not say what run it is"
        raise CheckpointError(f"{path}: no run that can be resumed: {reason}") from error
    if not isinstance(run, dict) or run.keys() != KEYS.keys():
        raise CheckpointError(f"{path}: no run that can be resumed: it must say exactly {', '.join(KEYS)}")
    for name, (kinds, what) in KEYS.items():
        value = run[name]
        is_kind = isinstance(value, kinds) and not isinstance(value, bool)
        if not is_kind or (isinstance(value, int | float) and not (0 <= value < math.inf)):
            raise CheckpointError(f"{path}: no run that can be resumed: {name} is {value!r:.60}, must be {what}")
    return run
