"""A run is the same to the bit however often it is interrupted, and exports to a checkpoint that loads."""

from __future__ import annotations

import errno
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sparing
from sparing.checkpoint import save_safetensors
from sparing.checkpoint.lock import holding
from sparing.errors import CheckpointError
from sparing.training import RECIPES, export, train
from sparing.training.state import read_run
from tests.tiny import SUDOKU_RUN

SMALL = SUDOKU_RUN | {"batch_size": 4, "validate_every": 5}


def silent(record: dict) -> None:
    pass


def interrupt(record: dict) -> None:
    """As Ctrl-C does, when something is first logged: at the first validation, step 5."""
    if "step" in record:
        signal.raise_signal(signal.SIGINT)


def run(out: Path, steps: int, **options) -> dict[str, torch.Tensor]:
    train(RECIPES["recipes/sudoku"], out, steps=steps, set=SMALL, log=silent, **options)
    return load_file(out / "state.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("whole")
    return out, run(out, 12)


def test_resuming_changes_nothing(whole, tmp_path: Path) -> None:
    train(RECIPES["recipes/sudoku"], tmp_path, steps=12, set=SMALL, log=silent, minutes=0)  # saves at once
    state = run(tmp_path, 12, resume=True)
    assert same(state, whole[1])


def test_a_killed_run_resumes_to_the_same_bits(whole, tmp_path: Path) -> None:
    script = f"""
import sparing.training.run as run
from sparing.training import RECIPES, train
run.SAVE_SECONDS = 0.0  # after every step
train(RECIPES["recipes/sudoku"], {str(tmp_path)!r}, steps=12, set={SMALL!r}, log=lambda record: None)
"""
    child = subprocess.Popen([sys.executable, "-c", script], env={**os.environ, "OMP_NUM_THREADS": "1"})
    deadline = time.monotonic() + 120
    while not (tmp_path / "state.safetensors").exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    child.send_signal(signal.SIGKILL)
    child.wait()
    state = run(tmp_path, 12, resume=True)
    assert same(state, whole[1])
    steps = [line for line in (tmp_path / "log.jsonl").read_text().splitlines() if "validation" in line]
    assert len(steps) == 2  # steps 5 and 10, each once


def test_muon_resumes_to_the_same_bits(whole, tmp_path: Path) -> None:
    recipe, settings = RECIPES["recipes/sudoku"], SMALL | {"optimizer": "muon"}
    train(recipe, tmp_path / "whole", steps=6, set=settings, log=silent)
    expected = load_file(tmp_path / "whole" / "state.safetensors")
    with pytest.raises(KeyboardInterrupt):
        train(recipe, tmp_path / "parts", steps=6, set=settings, log=interrupt)
    assert read_run(tmp_path / "parts")["step"] == 5
    assert same(run(tmp_path / "parts", 6, resume=True), expected)
    matrix, table = "model.decoder.layers.0.self_attn.q_proj.weight", "model.decoder.embed_tokens.weight"
    assert expected[f"momentum/{matrix}"].any() and f"exp_avg/{matrix}" not in expected
    assert expected[f"exp_avg_sq/{table}"].any() and f"momentum/{table}" not in expected
    assert f"exp_avg/{matrix}" in whole[1]
    assert sparing.load(export(tmp_path / "whole", tmp_path / "model")).tokenizer is not None


def test_the_state_of_the_other_optimizer_is_refused(whole, tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    before = {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(ValueError, match="holds a run whose optimizer is adamw, not muon"):
        train(RECIPES["recipes/sudoku"], tmp_path / "run", set={"optimizer": "muon"}, resume=True, log=silent)
    damaged(whole[0], tmp_path / "changed", lambda run, _: run | {"settings": run["settings"] | {"optimizer": "muon"}})
    with pytest.raises(CheckpointError, match=r"state\.safetensors: .* is missing or surplus: this is another run"):
        train(RECIPES["recipes/sudoku"], tmp_path / "changed", resume=True, log=silent)
    assert {path.name: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before


def test_another_seed_is_another_model(whole, tmp_path: Path) -> None:
    assert not same(run(tmp_path, 12, seed=1), whole[1])


def test_a_folder_with_a_run_is_not_overwritten(whole) -> None:
    with pytest.raises(ValueError, match="already holds a run"):
        train(RECIPES["recipes/sudoku"], whole[0], log=silent)


def test_resuming_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(sparing.CheckpointError):
        train(RECIPES["recipes/sudoku"], tmp_path, resume=True, log=silent)


def test_a_disk_that_is_full_from_the_start_leaves_no_folder(monkeypatch, tmp_path: Path) -> None:
    def fsync(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sparing.checkpoint.write.os.fsync", fsync)
    with pytest.raises(CheckpointError, match=r"state\.safetensors: cannot be written: No space left on device"):
        run(tmp_path / "run", 1)
    assert not (tmp_path / "run").exists()
    (tmp_path / "file").touch()
    with pytest.raises(CheckpointError, match="run: cannot be made: Not a directory; choose another folder"):
        run(tmp_path / "file" / "run", 1)


def test_an_unknown_setting_lists_the_known_ones(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no setting 'hidden'"):
        train(RECIPES["recipes/sudoku"], tmp_path, set={"hidden": 3}, log=silent)


def test_export_loads_and_generates(whole, tmp_path: Path) -> None:
    folder = export(whole[0], tmp_path / "model")
    model = sparing.load(folder, dtype="float32")
    assert model.config.canvas_length == 20
    assert model.tokenizer is not None
    events = list(sparing.generate(model, "a1=. b1=2", max_new_tokens=20, seed=0))
    assert isinstance(events[-1], sparing.Done)
    for name, tensor in model.named_parameters():
        assert torch.equal(tensor, whole[1][f"average/{name}"].bfloat16().float()), name


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"size": 4}, "canvas_length is 90, a grid of size 4 needs 20"),
        ({"size": 4, "canvas_length": 20}, "vocab_size is 824, a grid of size 4 needs 89"),
        ({"size": 4, "canvas_length": 20, "vocab_size": 89}, "do not suit a 4x4 grid"),
    ],
)
def test_a_smaller_grid_says_what_else_to_set(settings: dict, message: str, tmp_path: Path) -> None:
    """And leaves nothing behind."""
    with pytest.raises(ValueError, match=message):
        train(RECIPES["recipes/sudoku"], tmp_path / "run", set=settings, log=silent)
    assert not (tmp_path / "run").exists()


def damaged(out: Path, folder: Path, change) -> Path:
    """A copy of a run whose state says, or holds, something else."""
    shutil.copytree(out, folder)
    with safe_open(folder / "state.safetensors", "pt") as file:
        described = json.loads(file.metadata()["run"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (it is no dict)
    described = change(described, tensors) or described
    save_safetensors(folder / "state.safetensors", tensors, {"run": json.dumps(described)})
    return folder


FIRST = "average/model.decoder.embed_tokens.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda run, _: [run], "no run that can be resumed: it must say exactly recipe, seed, settings, step, seconds"),
        (lambda run, _: run.pop("seed") and run, "it must say exactly recipe, seed"),
        (lambda run, _: run | {"step": -1}, "step is -1, must be a whole number >= 0"),
        (lambda run, _: run | {"step": True}, "step is True, must be a whole number >= 0"),
        (lambda run, _: run | {"step": "3"}, "step is '3', must be a whole number >= 0"),
        (lambda run, _: run | {"seconds": math.nan}, "seconds is nan, must be a number >= 0"),
        (lambda run, _: run | {"seed": 1.5}, "seed is 1.5, must be a whole number >= 0"),
        (lambda run, _: run | {"settings": [1]}, "settings is [1], must be an object"),
        (lambda run, _: run | {"settings": run["settings"] | {"steps": "x"}}, "setting steps is 'x', must be a whole"),
        (
            lambda run, _: run | {"settings": run["settings"] | {"clip": math.inf}},
            "setting clip is inf, must be a finite",
        ),
        (lambda _, tensors: bool(tensors.pop(FIRST) is None), f"{FIRST} is missing or surplus: this is another run"),
        (lambda _, tensors: tensors.update(more=torch.zeros(2)), "more is missing or surplus"),
        (lambda _, tensors: tensors.update({FIRST: torch.zeros(2)}), f"{FIRST} is torch.float32 (2,), of this run"),
        (lambda _, tensors: tensors.update({FIRST: tensors[FIRST].bfloat16()}), f"{FIRST} is torch.bfloat16 (89, 16)"),
        (
            lambda _, tensors: tensors.update({FIRST: tensors[FIRST].log()}),
            f"{FIRST} holds numbers that are not finite",
        ),
    ],
)
def test_a_damaged_run_is_named_and_stays_as_it_is(whole, tmp_path: Path, change, message: str) -> None:
    folder = damaged(whole[0], tmp_path / "run", change)
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(ValueError, match=re.escape(message)):
        train(RECIPES["recipes/sudoku"], folder, resume=True, log=silent)
    with pytest.raises(ValueError, match=re.escape(message)):
        export(folder, tmp_path / "model")
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    "line",
    ["{}", "[]", "3", "x", '{"step": "3"}', '{"step": -1}', '{"step": true}', '{"step": 1.5}', "\udcff", "[" * 9999],
)
def test_a_log_of_something_else_is_named_and_stays(whole, tmp_path: Path, line: str) -> None:
    folder = tmp_path / "run"
    shutil.copytree(whole[0], folder)
    (folder / "log.jsonl").write_text(f'{{"step": 1}}\n{line}\n', errors="surrogateescape")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(CheckpointError, match=r"log\.jsonl: line 2 is not a record of a step; move the file away"):
        train(RECIPES["recipes/sudoku"], folder, resume=True, log=silent)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


def test_a_log_that_was_cut_off_and_one_that_is_a_folder(whole, tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    log = tmp_path / "run" / "log.jsonl"
    log.write_bytes(b'{"step": 1}\n{"step": 99}\n{"st')
    run(tmp_path / "run", 12, resume=True)
    assert log.read_bytes() == b'{"step": 1}\n'
    log.unlink()
    log.mkdir()
    with pytest.raises(CheckpointError, match=r"log\.jsonl: cannot be read: Is a directory"):
        run(tmp_path / "run", 12, resume=True)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"steps": 0}, "steps is 0, must be at least 1"),
        ({"batch_size": -1}, "batch_size is -1, must be at least 1"),
        ({"steps": "ten"}, "setting steps is 'ten', must be a whole number"),
        ({"steps": 2.5}, "setting steps is 2.5, must be a whole number"),
        ({"steps": True}, "setting steps is True, must be a whole number"),
        ({"learning_rate": "fast"}, "setting learning_rate is 'fast', must be a finite number"),
        ({"learning_rate": math.nan}, "setting learning_rate is nan, must be a finite number"),
        ({"optimizer": "sgd"}, "optimizer is 'sgd', use adamw or muon"),
        ({"optimizer": 3}, "setting optimizer is 3, must be text"),
        ({"givens_min": None}, "setting givens_min is None, must be a whole number"),
    ],
)
def test_settings_of_another_type_are_refused(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        train(RECIPES["recipes/sudoku"], tmp_path / "run", set=SMALL | settings, log=silent)
    assert not (tmp_path / "run").exists()


def test_numbers_of_a_run_that_make_no_sense(tmp_path: Path) -> None:
    for options, message in (
        ({"seed": -1}, "seed is -1: use at least 0"),
        ({"seed": 1.5}, "seed is 1.5: use a whole number of at least 0"),
        ({"minutes": -1}, "minutes=-1 must be 0 or more"),
        ({"minutes": math.nan}, "minutes=nan must be 0 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            train(RECIPES["recipes/sudoku"], tmp_path / "run", set=SMALL, log=silent, **options)
    assert not (tmp_path / "run").exists()


def test_one_process_trains_in_a_folder(whole, tmp_path: Path) -> None:
    with holding(whole[0]), pytest.raises(CheckpointError, match=f"process {os.getpid()} is writing there"):
        train(RECIPES["recipes/sudoku"], whole[0], resume=True, log=silent)
    with holding(tmp_path), pytest.raises(CheckpointError, match=f"process {os.getpid()} is writing there"):
        export(whole[0], tmp_path)


def test_an_interrupted_run_is_saved_and_says_so(whole, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(RECIPES["recipes/sudoku"], tmp_path, steps=12, set=SMALL, log=interrupt)
    assert sorted(os.listdir(tmp_path)) == ["log.jsonl", "state.safetensors"]
    assert read_run(tmp_path)["step"] == 5
    assert same(run(tmp_path, 12, resume=True), whole[1])
