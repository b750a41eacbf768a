"""The state of a run on disk: one file, replaced as a whole, from which training goes on to the bit."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from sparing.checkpoint.write import save_safetensors
from sparing.errors import CheckpointError

__all__ = ["TrainingState", "read_run"]

FILE = "state.safetensors"


@dataclass
class TrainingState:
    """Everything a run changes. Data and noise of a step follow from seed and step, so no generator is stored.

    model, average: the weights and their moving average (two models of one architecture); buffers: names of those that
    steps change; step: steps taken; seconds: spent on them.
    """

    model: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    buffers: Sequence[str] = ()
    step: int = 0
    seconds: float = 0.0

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        averages = dict(self.average.named_parameters())
        for name, parameter in self.model.named_parameters():
            yield f"weight/{name}", parameter
            yield f"average/{name}", averages[name]
            for moment in ("exp_avg", "exp_avg_sq"):
                yield f"{moment}/{name}", self._moments(parameter)[moment]

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

    def _moments(self, parameter: Tensor) -> dict[str, Tensor]:
        moments = self.optimizer.state[parameter]
        if not moments:
            moments["step"] = torch.tensor(float(self.step))
            moments["exp_avg"], moments["exp_avg_sq"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        return moments

    def save(self, out: Path, run: Mapping[str, Any]) -> None:
        """Write out/state.safetensors; run: what `read_run` gives back. Raises CheckpointError, the old file stays."""
        described = {**run, "step": self.step, "seconds": round(self.seconds, 1)}
        save_safetensors(out / FILE, dict(self.tensors()), {"run": json.dumps(described)})

    @torch.no_grad()
    def load(self, out: Path) -> None:
        """Read out/state.safetensors. Raises CheckpointError for a missing or foreign file."""
        run = read_run(out)
        self.step, self.seconds = run["step"], run["seconds"]
        with safe_open(out / FILE, "pt") as file:
            names = set(file.keys())
            for name, tensor in self.tensors():
                if name not in names or (stored := file.get_tensor(name)).shape != tensor.shape:
                    raise CheckpointError(f"{out / FILE}: {name} is missing or of another shape: this is another run")
                tensor.copy_(stored)


def read_run(out: Path) -> dict[str, Any]:
    """What a run's last save says about it: recipe, seed, settings, step, seconds."""
    try:
        with safe_open(out / FILE, "pt") as file:
            return json.loads(file.metadata()["run"])
    except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{out / FILE}: no run that can be resumed: {error}") from error
