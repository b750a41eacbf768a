"""What only a process of its own shows: signals, pipes, the terminal, the time to start."""

from __future__ import annotations

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparing

MAIN = [sys.executable, "-c", "from sparing.cli import main; main()"]


def start(*arguments: object, **options) -> subprocess.Popen:
    options = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen([*MAIN, *map(str, arguments)], **options)


def endless(folders: Path) -> tuple[object, ...]:
    """A generation that takes long enough to be interrupted: the model has no end that it would write."""
    flags = ("--decoder", "autoregressive", "--temperature", 1, "--max-new-tokens", 100_000, "--seed", 1)
    return ("generate", folders / "causal", "Once upon", *flags)


@pytest.fixture
def long_context(folders, tmp_path) -> Path:
    """The tiny models, with a context that nobody fills and no token that ends a text."""
    for name in ("causal", "tales"):
        shutil.copytree(folders / name, tmp_path / name)
        for file in (tmp_path / name / "config.json", tmp_path / name / "generation_config.json"):
            text = re.sub(r'"max_position_embeddings": \d+', '"max_position_embeddings": 200000', file.read_text())
            file.write_text(re.sub(r'"eos_token_id": (\[\s*1\s*\]|1)', '"eos_token_id": []', text))
        file = tmp_path / name / "tokenizer_config.json"
        file.write_text(json.dumps({k: v for k, v in json.loads(file.read_text()).items() if k != "eos_token"}))
    return tmp_path


@pytest.mark.parametrize(
    ("arguments", "heavy"),
    [
        (["--help"], ("torch", "rich", "numpy", "tokenizers")),
        (["plan", "gemma-4-31b", "--context", "4096"], ("torch", "rich")),
        (["inspect", "TALES"], ("torch", "rich")),
    ],
)
def test_what_loads_nothing_heavy(folders, arguments, heavy):
    arguments = [argument.replace("TALES", str(folders / "tales")) for argument in arguments]
    code = f"import sys\nfrom sparing.cli import run\nrun({arguments})\n"
    code += f"print(*(name for name in {heavy} if name in sys.modules))"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert len(out) > 100
    assert out.splitlines()[-1] == ""


def test_the_version_names_what_runs():
    script = [sys.executable, "-c", "from sparing.cli import run; run(['--version'])"]
    environment = {**os.environ, "SPARING_KERNELS": "reference"}
    lines = subprocess.run(script, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    assert lines[0] == f"sparing {sparing.__version__}"
    assert lines[1] == f"torch {torch.__version__}"
    assert lines[2].split(";")[0] == "kernels reference"


def test_an_interruption_keeps_what_was_written(long_context):
    process = start(*endless(long_context))
    assert process.stdout is not None
    first = process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert len(first + out) > 20
    assert out.endswith(b"\n")
    assert err.strip() == b"sparing: interrupted"


def test_a_reader_that_leaves_is_no_error(long_context):
    process = start(*endless(long_context))
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.read(5)
    process.stdout.close()
    assert process.stderr.read() == b""
    assert process.wait(timeout=60) == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full, a device that is always full")
def test_a_full_disk_under_standard_output():
    with open("/dev/full", "wb") as full:
        process = start("plan", "gemma-4-e2b", "--context", 100, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err == b"sparing: output: No space left on device\n"


def test_an_interrupted_canvas_leaves_a_usable_terminal(long_context):
    ours, theirs = pty.openpty()
    flags = ("--max-new-tokens", 100_000, "--seed", 1, "--quiet")
    environment = {**os.environ, "TERM": "xterm-256color", "COLUMNS": "60", "LINES": "20"}
    process = start("generate", long_context / "tales", "Once", *flags, stdout=theirs, env=environment)
    os.close(theirs)
    seen = b""
    interrupted = False
    while True:
        try:
            seen += os.read(ours, 65536)
        except OSError:  # the other side was closed
            break
        if b"step 3" in seen and not interrupted:
            process.send_signal(signal.SIGINT)
            interrupted = True
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.strip() == b"sparing: interrupted"
    assert b"renoised" in seen
    assert seen.rindex(b"\x1b[?25h") > seen.rindex(b"\x1b[?25l")  # the cursor is visible again
    assert b"Traceback" not in seen


def test_a_defect_gets_one_line_and_a_traceback_on_request():
    code = "import sparing.cli.app as a, sparing\nsparing.plan = lambda *x, **y: 1 / 0\n"
    code += (
        "import sys; sys.argv = ['sparing', 'plan', 'tales', '--context', '9']\nfrom sparing.cli import main; main()"
    )
    environment = {key: value for key, value in os.environ.items() if key != "SPARING_TRACEBACK"}
    plain = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert plain.returncode == 1
    assert plain.stderr == "sparing: ZeroDivisionError: division by zero (SPARING_TRACEBACK=1 shows where)\n"
    environment["SPARING_TRACEBACK"] = "1"
    full = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert "Traceback" in full.stderr
