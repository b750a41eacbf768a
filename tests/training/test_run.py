"""A run is the same to the bit however often it is interrupted, and exports to a checkpoint that loads."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import sparing
from sparing.errors import CheckpointError
from sparing.training import RECIPES, export, train

SMALL = {
    "size": 4,
    "canvas_length": 20,
    "vocab_size": 89,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "global_head_dim": 16,
    "moe_intermediate_size": 16,
    "givens_min": 4,
    "givens_max": 12,
    "batch_size": 4,
    "warmup": 2,
    "validate_every": 5,
}


def silent(record: dict) -> None:
    pass


def run(out: Path, steps: int, **options) -> dict[str, torch.Tensor]:
    train(RECIPES["sudoku"], out, steps=steps, set=SMALL, log=silent, **options)
    return load_file(out / "state.safetensors")


def same(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, torch.Tensor]]:
    out = tmp_path_factory.mktemp("whole")
    return out, run(out, 12)


def test_resuming_changes_nothing(whole, tmp_path: Path) -> None:
    train(RECIPES["sudoku"], tmp_path, steps=12, set=SMALL, log=silent, minutes=0)  # saves at once
    state = run(tmp_path, 12, resume=True)
    assert same(state, whole[1])


def test_a_killed_run_resumes_to_the_same_bits(whole, tmp_path: Path) -> None:
    script = f"""
import sparing.training.run as run
from sparing.training import RECIPES, train
run.SAVE_SECONDS = 0.0  # after every step
train(RECIPES["sudoku"], {str(tmp_path)!r}, steps=12, set={SMALL!r}, log=lambda record: None)
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


def test_another_seed_is_another_model(whole, tmp_path: Path) -> None:
    assert not same(run(tmp_path, 12, seed=1), whole[1])


def test_a_folder_with_a_run_is_not_overwritten(whole) -> None:
    with pytest.raises(ValueError, match="already holds a run"):
        train(RECIPES["sudoku"], whole[0], log=silent)


def test_resuming_nothing_says_so(tmp_path: Path) -> None:
    with pytest.raises(sparing.CheckpointError):
        train(RECIPES["sudoku"], tmp_path, resume=True, log=silent)


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
        train(RECIPES["sudoku"], tmp_path, set={"hidden": 3}, log=silent)


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
        train(RECIPES["sudoku"], tmp_path / "run", set=settings, log=silent)
    assert not (tmp_path / "run").exists()
