"""Inputs are tried in a process of their own, under limits; one that hangs or dies is reported like any other."""

from __future__ import annotations

import copy
import gc
import multiprocessing
import os
import resource
import signal
import tempfile
import time
import traceback
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.fuzz.mutations import apply_lines, recipe

__all__ = ["KINDS", "Outcome", "Worker", "shortest", "try_one"]

KINDS = [
    *("config", "generation", "tokenizer", "tokenizer-config", "template", "safetensors", "index", "gguf", "memory"),
    *("statistics", "training", "quantise", "policy", "arguments", "command-line"),
]
SECONDS = 4.0  # of computing, for one input
MEBIBYTES = 300  # beyond what the process held before
LOOPING = 20  # seconds of computing after which a process is ended
HANGING = 300.0  # seconds of waiting: where much else runs, a process computes for a fraction of them
ADDRESSES = 4 << 30  # that one input may map; a bigger allocation fails


@dataclass
class Outcome:
    """What became of an input. fault: None where it was used or refused as it should; kind, seed, lines: the recipe."""

    kind: str
    seed: str
    lines: list[str]
    refused: str = ""
    fault: str | None = None
    details: str = ""
    seconds: float = 0.0
    mebibytes: float = 0.0
    number: int | None = field(default=None)

    def __str__(self) -> str:
        where = "" if self.number is None else f" (number {self.number})"
        lines = "".join(f"\n    {line}" for line in self.lines)
        return f"{self.kind}, {self.seed}{where}: {self.fault}{lines}\n{self.details}"


def try_one(
    kind: str, number: int | None, seed: str = "", lines: list[str] | None = None, save: Path | None = None
) -> Outcome:
    """Make an input, by its number or by its recipe, and use it here and now. save: a folder that keeps its files."""
    from tests.fuzz import seeds, targets

    found = seeds.seeds(kind)
    if number is not None:
        seed, lines = recipe(found, seeds.EXTRA_KEYS, number)
    outcome = Outcome(kind, seed, lines or [], number=number)
    document = copy.deepcopy(found[seed][0])
    apply_lines(outcome.lines, doc=document)
    with tempfile.TemporaryDirectory() as root:
        folder = save or Path(root) / "input"
        folder.mkdir(parents=True, exist_ok=True)
        gc.collect()
        gc.freeze()  # what is there already, such as imports, is not searched for garbage on this input's time
        before, start = _peak(reset=True), time.process_time()
        try:
            targets.use(kind, document, folder, lambda files: _mutate_bytes(outcome.lines, files))
        except targets.Unwritable as error:
            outcome.refused = f"not written: {error}"
        except BaseException as error:
            _judge(outcome, error)
        outcome.seconds, outcome.mebibytes = time.process_time() - start, _peak() - before
    if outcome.fault is None and outcome.seconds > SECONDS:
        outcome.fault = f"takes {outcome.seconds:.1f} s"
    if outcome.fault is None and outcome.mebibytes > MEBIBYTES:
        outcome.fault = f"takes {outcome.mebibytes:.0f} MiB"
    return outcome


def _mutate_bytes(lines: list[str], files: dict[str, bytes]) -> None:
    apply_lines(lines, raw=files)


def _judge(outcome: Outcome, error: BaseException) -> None:
    """A fault unless the library itself refused, in words of its own."""
    if isinstance(error, KeyboardInterrupt):
        raise error
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "/sparing/" in frame.filename]
    where = f"{ours[-1].filename.rpartition('/sparing/')[2]}:{ours[-1].lineno}" if ours else "?"
    text = " ".join(str(error).split())[:200]
    if isinstance(error, ValueError | OSError) and text:
        outcome.refused = text
        if isinstance(error, OSError) or frames[-1] in ours:
            return
        if type(error).__module__ != "sparing.errors":
            outcome.fault = f"unclear, from below: {type(error).__name__}: {text} [{where}]"
            return
    outcome.fault = f"{type(error).__name__}: {text} [{where}]"
    outcome.details = "".join(traceback.format_list(frames[-4:]))


def _peak(reset: bool = False) -> float:
    """MiB that the process held at most since the last reset; 0 where the system does not say."""
    try:
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0.0
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def _serve(pipe: Any) -> None:
    os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1", SPARING_TRACEBACK="")
    os.environ.pop("SPARING_TRACEBACK")
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 2)  # panics of the tokenizers say so there
    import warnings

    import torch

    from sparing.checkpoint import source
    from tests.fuzz import targets  # noqa: F401

    source.FETCHED = ()  # real models are large, and no part of any input
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    size = (
        int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize() if os.path.exists("/proc") else 0
    )
    if size:
        resource.setrlimit(resource.RLIMIT_AS, (size + ADDRESSES, resource.RLIM_INFINITY))
    pipe.send("ready")
    while (task := pipe.recv()) is not None:
        _, most = resource.getrlimit(resource.RLIMIT_CPU)
        resource.setrlimit(resource.RLIMIT_CPU, (int(time.process_time()) + LOOPING, most))
        pipe.send(try_one(*task))


class Worker:
    """A process that tries inputs. It is replaced when it dies or hangs."""

    def __init__(self) -> None:
        self.process: Any = None

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception: object) -> None:
        self.stop()

    def stop(self) -> None:
        if self.process is not None:
            self.process.kill()
            self.process.join()
            self.process = None

    def start(self) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(theirs,), daemon=True)
        self.process.start()
        theirs.close()
        self.pipe.recv()

    def run(self, kind: str, number: int | None, *recipe: Any) -> Outcome:
        """As `try_one`; the recipe of an input that ends the process is found without using it."""
        if self.process is None:
            self.start()
        process = self.process
        try:
            self.pipe.send((kind, number, *recipe))
            if self.pipe.poll(HANGING):
                return self.pipe.recv()
            fault = f"does not end within {HANGING:.0f} s"
        except (EOFError, OSError):
            process.join()
            looped = process.exitcode == -signal.SIGXCPU
            fault = f"computes for {LOOPING} s" if looped else f"ends the process: {process.exitcode}"
        self.stop()
        return self._unfinished(kind, number, fault, *recipe)

    def _unfinished(self, kind: str, number: int | None, fault: str, *given: Any) -> Outcome:
        from tests.fuzz import seeds
        from tests.fuzz.mutations import recipe

        seed, lines = recipe(seeds.seeds(kind), seeds.EXTRA_KEYS, number) if number is not None else given[:2]
        return Outcome(kind, seed, lines, fault=fault, number=number)


def shortest(worker: Worker, outcome: Outcome) -> Outcome:
    """The same fault with as few lines as will do."""
    lines = list(outcome.lines)
    for line in outcome.lines:
        fewer = [other for other in lines if other is not line]
        found = worker.run(outcome.kind, None, outcome.seed, fewer)
        if found.fault is not None:
            lines, outcome = fewer, found
    return outcome
