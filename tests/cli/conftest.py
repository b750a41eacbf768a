"""Running commands in this process, on tiny models in place of those that ship."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest

from sparing.checkpoint import source
from sparing.cli import run
from tests.cli import models


@dataclass
class Result:
    code: int
    out: str
    err: str


Command = Callable[..., Result]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that holds `tales`, `sudoku` and `causal`."""
    root = tmp_path_factory.mktemp("assets")
    models.text_folder(root / "tales")
    models.grid_folder(root / "sudoku")
    models.causal_folder(root / "causal")
    return root


@pytest.fixture
def command(folders: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """`command("generate", "text", stdin=...)` runs `sparing generate text`, with tiny models as the bundled ones."""
    monkeypatch.setattr(source, "ASSETS", folders)
    monkeypatch.delenv("SPARING_TRACEBACK", raising=False)

    def call(*arguments: object, stdin: str | bytes = "") -> Result:
        content = stdin.encode() if isinstance(stdin, str) else stdin
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        capsys.readouterr()
        code = run([str(argument) for argument in arguments])
        return Result(code, *capsys.readouterr())

    return call


@pytest.fixture
def refused(command: Command) -> Callable[..., str]:
    """Runs a command that must fail as a mistake of the user; returns its only line."""

    def call(*arguments: object, stdin: str | bytes = "") -> str:
        result = command(*arguments, stdin=stdin)
        assert result.code == 2, result
        assert result.out == ""
        assert result.err.startswith("sparing: ")
        assert result.err.count("\n") == 1
        return result.err

    return call
