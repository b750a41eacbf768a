"""The training loop: one step after another, from wherever the last save was."""

from __future__ import annotations

import copy
import json
import os
import signal
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
from torch import nn

from sparing.checkpoint.lock import holding
from sparing.checkpoint.write import folder_to_fill, remove_leftovers, replacing
from sparing.config import parse_config
from sparing.config.numbers import whole
from sparing.errors import CheckpointError
from sparing.models.base import LanguageModel
from sparing.models.loading import build
from sparing.training.balance import balance_experts, correction_biases
from sparing.training.block_diffusion import Examples
from sparing.training.initialise import initialise
from sparing.training.optimizers import make_optimizer
from sparing.training.recipe import Data, Recipe
from sparing.training.state import FILE, TrainingState, read_run

__all__ = ["train"]

Log = Callable[[dict[str, Any]], None]
SAVE_SECONDS = 180.0
LOG_EVERY = 20  # steps
INIT, NOISE, VALIDATION = 0, 1, 2  # streams of random numbers


def train(
    recipe: Recipe,
    out: str | Path,
    *,
    steps: int | None = None,
    minutes: float | None = None,
    threads: int | None = None,
    seed: int = 0,
    set: Mapping[str, Any] | None = None,
    resume: bool = False,
    log: Log | None = None,
) -> Path:
    """Train a recipe in the folder `out`; returns it. `sparing.training.export` makes a checkpoint of the result.

    steps: length of the whole run (the learning rate falls towards it); minutes: stop and save after that long; set:
    settings of the recipe to change; resume: go on from the last save, with its seed and settings. log: gets each
    record of out/log.jsonl (also "saved" and "interrupted" notices) as it is made; default: a line each.
    The run is saved every few minutes, at its end and on Ctrl-C; a killed one resumes to the same bits.
    Raises ValueError for an unknown setting or a folder that already holds a run, CheckpointError for a full disk, a
    folder in which another process trains, and a run that is damaged; after Ctrl-C, once saved, KeyboardInterrupt.
    """
    out, interruptible = Path(out), Interruptible()
    if resume:
        read_run(out)  # before a folder is made for nothing
    with folder_to_fill(out), holding(out):
        _train(recipe, out, steps, minutes, threads, seed, set, resume, log or print_record, interruptible)
    interruptible.pass_on()
    return out


def _train(
    recipe: Recipe,
    out: Path,
    steps: int | None,
    minutes: float | None,
    threads: int | None,
    seed: int,
    set: Mapping[str, Any] | None,
    resume: bool,
    log: Log,
    interruptible: Interruptible,
) -> None:
    """As `train` does, in a folder that is ours."""
    if resume:
        run = read_run(out)
        if run["recipe"] != recipe.name:
            raise ValueError(f"{out} holds a run of recipe {run['recipe']!r}, not {recipe.name!r}")
        seed, settings = run["seed"], {**run["settings"], **(set or {})}
        held, chosen = (recipe.with_settings(each).optimizer for each in (run["settings"], settings))
        if held != chosen:
            raise ValueError(f"{out} holds a run whose optimizer is {held}, not {chosen}: its state is of no use there")
    else:
        if (out / FILE).exists():
            raise ValueError(f"{out} already holds a run: resume it, or choose another folder")
        settings = dict(set or {})
    if steps is not None:
        settings["steps"] = steps
    if minutes is not None and not minutes >= 0:
        raise ValueError(f"minutes={minutes} must be 0 or more")
    seed = whole("seed", seed, 0)
    recipe = recipe.with_settings(settings)
    for name in ("steps", "batch_size", "draws", "validate_every"):
        if getattr(recipe, name) < 1:
            raise ValueError(f"{name} is {getattr(recipe, name)}, must be at least 1")
    if threads is not None:
        torch.set_num_threads(threads)
    data, state = recipe.data(recipe, seed), new_state(recipe, seed)
    validation = data.validation()
    if resume:
        state.load(out)
    remove_leftovers(out)
    journal = Journal(out / "log.jsonl", state.step, log)
    run = {"recipe": recipe.name, "seed": seed, "settings": settings}
    with interruptible:
        loop(recipe, state, (data, validation), out, run, minutes, journal, interruptible)


def new_state(recipe: Recipe, seed: int) -> TrainingState:
    """A freshly initialised model, its moving average, and the optimizer that the recipe chooses."""
    model = build(parse_config(recipe.config)).to_empty(device="cpu")
    generator = random_numbers(seed, INIT)
    initialise(model, generator)
    recipe.prepare(model, recipe.options, generator)
    betas = recipe.beta1, recipe.beta2
    optimizer = make_optimizer(recipe.optimizer, model, betas=betas, weight_decay=recipe.weight_decay)
    average = copy.deepcopy(model).requires_grad_(False)
    return TrainingState(model, average, optimizer, list(correction_biases(model)))


def random_numbers(seed: int, stream: int, step: int = 0) -> torch.Generator:
    """A generator that depends on its three numbers alone."""
    return torch.Generator().manual_seed(
        int(np.random.SeedSequence((seed, stream, step)).generate_state(1, np.uint64)[0])
    )


def loop(
    recipe: Recipe,
    state: TrainingState,
    examples: tuple[Data, list[Examples]],
    out: Path,
    run: dict[str, Any],
    minutes: float | None,
    journal: Journal,
    interrupted: Interruptible,
) -> None:
    data, validation = examples
    began, saved, seconds = time.monotonic(), time.monotonic(), state.seconds
    deadline = None if minutes is None else began + minutes * 60
    sums: dict[str, torch.Tensor] = {}
    since = 0
    while state.step < recipe.steps and not interrupted and (deadline is None or time.monotonic() < deadline):
        found = training_step(recipe, state, data.batch(state.step), random_numbers(run["seed"], NOISE, state.step))
        sums = {name: sums.get(name, 0.0) + value for name, value in found.items()}
        since += 1
        state.seconds = seconds + time.monotonic() - began
        if state.step % LOG_EVERY == 0:
            means = {name: (value / since).item() for name, value in sums.items()}
            norm = means.pop("gradient_norm")
            journal.write(
                {
                    "step": state.step,
                    "seconds": round(state.seconds, 1),
                    "learning_rate": recipe.learning_rate_at(state.step),
                    **{name: round(value, 4) for name, value in means.items()},
                    "gradient_norm": round(norm, 3),
                }
            )
            sums, since = {}, 0
        if state.step % recipe.validate_every == 0:
            journal.write({"step": state.step, **validate(recipe, state.average, validation, run["seed"])})
        if time.monotonic() - saved > SAVE_SECONDS and state.step < recipe.steps:
            saved = time.monotonic()
            try:
                state.save(out, run)
            except CheckpointError as error:  # the last good save is still there: go on and try again later
                journal.tell({"notice": str(error)})
    state.save(out, run)
    reason = "interrupted" if interrupted else "finished" if state.step >= recipe.steps else "time is up"
    journal.tell({"notice": f"{reason}: step {state.step} of {recipe.steps} saved in {out}"})


def training_step(
    recipe: Recipe, state: TrainingState, examples: Examples, noise: torch.Generator
) -> dict[str, torch.Tensor]:
    """One update; returns the parts of the loss, and the gradient's norm."""
    model = state.model
    for group in state.optimizer.param_groups:
        group["lr"] = recipe.learning_rate_at(state.step)
    losses = recipe.loss(recipe, model, examples, noise)
    losses.total.backward()
    norm = nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
    state.optimizer.step()
    state.optimizer.zero_grad()
    balance_experts(model)
    # Early on, a short memory: the first weights are worth nothing.
    share = 1 - min(recipe.average, (state.step + 1) / (state.step + 10))
    state.average_in(share)
    state.step += 1
    return {**{name: value.detach() for name, value in losses.parts.items()}, "gradient_norm": norm}


@torch.no_grad()
def validate(recipe: Recipe, model: LanguageModel, batches: list[Examples], seed: int) -> dict[str, float]:
    """The losses of held-out examples, always under the same noise, one draw of it."""
    once = replace(recipe, draws=1)
    losses = [once.loss(once, model, b, random_numbers(seed, VALIDATION, i)).parts for i, b in enumerate(batches)]
    return {
        f"validation_{name}": round(sum(parts[name].item() for parts in losses) / len(losses), 4) for name in losses[0]
    }


class Journal:
    """log.jsonl, one record a line. What a killed run wrote after its last save is dropped: it happens again.

    Raises CheckpointError, and changes nothing, where a line of the file is not a record.
    """

    def __init__(self, path: Path, step: int, log: Log):
        self.path, self.log = path, log
        if os.path.lexists(path):
            kept = [line for line, at in _records(path) if at <= step]
            with replacing(path) as file:
                file.write(b"".join(kept))

    def write(self, record: dict[str, Any]) -> None:
        try:
            with self.path.open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            self.tell({"notice": f"{self.path}: cannot be written: {error.strerror}"})
        self.log(record)

    def tell(self, record: dict[str, Any]) -> None:
        self.log(record)


def _records(path: Path) -> Iterator[tuple[bytes, int]]:
    """The lines of a log and the step of each, without a last line that was cut off."""
    try:
        lines = path.read_bytes().splitlines(keepends=True)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            return
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            record = None
        step = record.get("step") if isinstance(record, dict) else None
        if type(step) is not int or step < 0:
            raise CheckpointError(
                f"{path}: line {number} is not a record of a step; move the file away, the run goes on without"
            )
        yield line, step


def print_record(record: dict[str, Any]) -> None:
    """A record as one plain line."""
    text = record.get("notice") or "  ".join(f"{key} {value}" for key, value in record.items())
    print(text, flush=True)


class Interruptible:
    """True after the first Ctrl-C (or SIGTERM), so that a step is never left half done; the second one is final."""

    def __init__(self) -> None:
        self.asked: int | None = None
        self.previous: dict[int, Any] = {}

    def __enter__(self) -> Interruptible:
        try:
            for number in (signal.SIGINT, signal.SIGTERM):
                self.previous[number] = signal.signal(number, self._ask)
        except ValueError:  # not the main thread: whoever runs us deals with signals
            pass
        return self

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = number
        signal.signal(number, self.previous[number])

    def __exit__(self, *exception: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def __bool__(self) -> bool:
        return self.asked is not None

    def pass_on(self) -> None:
        """Let the signal that was asked to wait do what it does elsewhere: Ctrl-C raises KeyboardInterrupt."""
        if self.asked is not None:
            signal.raise_signal(self.asked)
