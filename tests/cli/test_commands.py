"""`plan`, `inspect` and `train`: thin, so what is tested is that the right thing is called and shown."""

from __future__ import annotations

import errno
import json

import sparing
from sparing import inspection
from sparing.checkpoint import write
from sparing.cli.options import key_values
from tests.tiny import SUDOKU_RUN


def test_plan(command):
    expected = sparing.plan(
        "gemma-4-e2b", context=4096, batch=2, kv="window:512", weights="int8", hardware="H100", new_tokens=100
    )
    flags = ["--context", "4096", "--batch", "2", "--kv", "window:512", "--weights", "int8"]
    flags += ["--hardware", "H100", "--new-tokens", "100"]
    assert command("plan", "gemma-4-e2b", *flags).out == expected.table() + "\n"
    assert json.loads(command("plan", "gemma-4-e2b", *flags, "--json").out) == json.loads(
        json.dumps(expected.to_dict())
    )
    assert command("plan", "tales", "--context", 64, "--steps", 4).code == 0


def test_plan_refuses(refused):
    assert "gemma-4-e4b" in refused("plan", "gemma-5", "--context", 10)
    assert "Missing option '--context'" in refused("plan", "tales")
    assert "hardware='abacus' is not known, use A100" in refused(
        "plan", "tales", "--context", 10, "--hardware", "abacus"
    )
    assert "takes no denoising steps" in refused("plan", "qwen3-8b", "--context", 10, "--steps", 3)


def test_inspect(command, folders):
    expected = inspection.inspect(folders / "tales")
    assert command("inspect", "tales").out == expected.table() + "\n"
    coded = inspection.inspect(folders / "tales", kv="turboquant:4", context=300)
    assert command("inspect", "tales", "--kv", "turboquant:4", "--context", 300).out == coded.table() + "\n"
    assert json.loads(command("inspect", "tales", "--json").out)["architecture"] == "diffusion_gemma"


def test_inspect_against_transformers(command, monkeypatch):
    stage = inspection.comparison.Stage("layer 3", 0.5, 0.5, 2)
    asked = []

    def compared(source, prompt):
        asked.append((source, prompt))
        return inspection.Comparison("tales", 4, 1e-4, (stage,))

    monkeypatch.setattr(inspection, "against_transformers", compared)
    result = command("inspect", "tales", "--against", "transformers", "--text", "Once")
    assert result.code == 1
    assert "first difference from transformers is in layer 3" in result.out
    assert command("inspect", "tales", "--against", "transformers", "--tokens", "3,4 5").code == 1
    assert asked == [("tales", "Once"), ("tales", [3, 4, 5])]


def test_inspect_refuses(refused, tmp_path):
    assert "no config.json" in refused("inspect", tmp_path)
    assert "kv='codes' is not a memory policy" in refused("inspect", "tales", "--kv", "codes")
    assert "--against transformers" in refused("inspect", "tales", "--text", "x")
    assert "'llama.cpp' is not 'transformers'" in refused("inspect", "tales", "--against", "llama.cpp")
    assert "write token ids such as 5,6,7" in refused("inspect", "tales", "--against", "transformers", "--tokens", "a")


TINY = [f"--set={name}={value}" for name, value in SUDOKU_RUN.items()]


def test_train_resume_and_export(command, tmp_path):
    run, folder = tmp_path / "run", tmp_path / "model"
    result = command("train", "recipes/sudoku", "--out", run, "--steps", 4, *TINY, "--seed", 3)
    assert result.code == 0, result
    assert f"finished: step 4 of 4 saved in {run}" in result.out
    assert "already holds a run" in command("train", "recipes/sudoku", "--out", run, "--steps", 4, *TINY).err
    result = command("train", "recipes/sudoku", "--out", run, "--resume", "--steps", 6)
    assert "step 6 of 6 saved" in result.out
    assert command("train", "recipes/sudoku", "--out", run, "--export", folder).out == f"written: {folder}\n"
    assert command("generate", folder, "a1=1", "--max-new-tokens", 5).code == 0


def test_train_with_muon(command, tmp_path):
    run = tmp_path / "run"
    assert command("train", "recipes/sudoku", "--out", run, "--steps", 2, *TINY, "--optimizer", "muon").code == 0
    assert command("train", "recipes/sudoku", "--out", run, "--resume", "--steps", 3).code == 0
    other = command("train", "recipes/sudoku", "--out", run, "--resume", "--optimizer", "adamw")
    assert other.code != 0 and "holds a run whose optimizer is muon, not adamw" in other.err


def test_train_refuses(refused, tmp_path):
    assert "recipe 'chess' is not known, use recipes/sudoku" in refused("train", "chess", "--out", tmp_path)
    assert "recipe 'tales' is not known, write recipes/tales" in refused("train", "tales", "--out", tmp_path)
    assert "no setting 'colour'" in refused("train", "recipes/sudoku", "--out", tmp_path / "a", "--set", "colour=3")
    assert "write name=value" in refused("train", "recipes/sudoku", "--out", tmp_path / "a", "--set", "colour")
    assert "no run that can be resumed" in refused("train", "recipes/sudoku", "--out", tmp_path / "a", "--resume")
    assert "no run that can be resumed" in refused(
        "train", "recipes/sudoku", "--out", tmp_path, "--export", tmp_path / "b"
    )
    assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing_half_written(command, refused, tmp_path, monkeypatch):
    run, folder = tmp_path / "run", tmp_path / "model"
    assert command("train", "recipes/sudoku", "--out", run, "--steps", 1, *TINY).code == 0
    before = {file: file.read_bytes() for file in run.iterdir()}

    def full(*arguments: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(write, "_write_tensors", full)
    line = refused("train", "recipes/sudoku", "--out", run, "--export", folder)
    assert "No space left on device" in line
    assert "Free some space" in line
    assert not folder.exists()
    result = command("train", "recipes/sudoku", "--out", run, "--resume", "--steps", 2)
    assert result.code == 2
    assert result.err.count("\n") == 1
    assert (run / "state.safetensors").read_bytes() == before[run / "state.safetensors"]
    assert not [file for file in run.iterdir() if file.name.endswith(".part")]


def test_settings_are_numbers_where_they_can_be():
    assert key_values(("a=3", "b=0.5", "c=text", "d=true", "e=x=y")) == {
        "a": 3,
        "b": 0.5,
        "c": "text",
        "d": True,
        "e": "x=y",
    }
