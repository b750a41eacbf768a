"""`sparing demo`: as plain text, with a puzzle of one's own, and with a model missing."""

from __future__ import annotations

import shutil

import pytest

import sparing
from sparing.checkpoint import source
from sparing.cli import demo
from sparing.sudoku.puzzle import is_solved, solutions
from sparing.sudoku.text import parse_puzzle
from tests.cli.models import SIZE

PUZZLE = "1.3. .4.2 2.4. .3.1"


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(demo, "OPENING", "Once upon a time")
    monkeypatch.setattr(demo, "BEFORE", "The king")
    monkeypatch.setattr(demo, "SENTENCE", " woman went into the forest")


def test_the_whole_demo_as_plain_text(command):
    result = command("demo", "--fast")
    assert result.code == 0, result
    assert "solved, judged by the rules" in result.out.lower()
    assert (
        "The same weights, left to right, one digit a pass: 0 of 1 solved, 1.00 tokens per forward pass" in result.out
    )
    for name in ("Canvas by canvas", "Word by word, the same weights"):
        line = next(line for line in result.out.splitlines() if line.startswith(f"{name}: "))
        assert "tokens/s" in line
        assert "tokens per forward pass" in line
    assert "restored" in result.out
    assert "\x1b" not in result.out


def test_a_puzzle_of_ones_own(command, monkeypatch):
    puzzle = parse_puzzle(PUZZLE)
    solution = solutions(puzzle.ravel().tolist(), SIZE, 1)[0]
    rows = ["".join(map(str, solution[i : i + SIZE])) for i in range(0, SIZE * SIZE, SIZE)]
    stats = {"new_tokens": 20, "forwards": 4, "memory_bytes": 1, "denoising_steps": 3}
    asked = []

    def solved(model, prompt, **options):
        asked.append((prompt, options.get("decoder", "auto")))
        return iter([sparing.Commit(0, [1] * 20, "\n".join(rows)), sparing.Done(0, "eos", stats)])

    monkeypatch.setattr(sparing, "generate", solved)
    result = command("demo", "--puzzle", PUZZLE)
    assert result.code == 0
    assert "Solved, judged by the rules: 3 denoising steps" in result.out
    assert "All at once: 1 of 1 solved, 5.00 tokens per forward pass" in result.out
    shown = [line for line in result.out.splitlines() if "│" in line and "." not in line]
    assert ["".join(c for c in line if c.isdigit()) for line in shown] == rows
    assert is_solved(puzzle, parse_puzzle(" ".join(rows)))
    assert [decoder for _, decoder in asked] == ["auto", "autoregressive"]
    assert asked[0][0].startswith("a1=1 b1=. c1=3 d1=.\n")


def test_a_missing_model_is_named_and_the_rest_goes_on(command, folders, tmp_path, monkeypatch):
    shutil.copytree(folders / "tales", tmp_path / "tales")
    monkeypatch.setattr(source, "ASSETS", tmp_path)
    result = command("demo", "--fast")
    assert result.code == 2
    assert result.err == "sparing: sudoku: this installation lacks the bundled checkpoint; install it again\n"
    assert "restored" in result.out


def test_refuses(refused):
    assert "solves 4x4 puzzles, the one given is 9x9" in refused("demo", "--puzzle", "." * 81)
    assert "'--puzzles': 0 is less than 1" in refused("demo", "--puzzles", 0)
