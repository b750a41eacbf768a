"""The edges of the command line: signals at any time, streams that are closed or of other encodings, warnings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from sparing.cli import run
from tests.cli.test_process import MAIN, start
from tests.tiny import SUDOKU_RUN


def plain(code: str, **options) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, **options)


PRINTS = """
import sys
import sparing.cli as cli
def run(arguments):
    print("a é 🙂 \\ud800")
    print("b é", file=sys.stderr)
    return 0
cli.run = run
cli.main()
"""


@pytest.mark.parametrize(
    ("encoding", "shown"),
    [
        ("ascii", r"a \u00e9 \ud83d\ude42 \ud800"),
        ("latin-1", "a é \\ud83d\\ude42 \\ud800"),
        ("utf-8", "a é 🙂 \\ud800"),
    ],
)
def test_output_is_whole_in_any_encoding(encoding, shown):
    """And what JSON says in one is what it says in the others."""
    done = subprocess.run(
        [sys.executable, "-c", PRINTS], capture_output=True, env={**os.environ, "PYTHONIOENCODING": encoding}
    )
    assert done.returncode == 0
    assert done.stdout.decode(encoding) == f"{shown}\n"
    assert json.loads(f'"{shown}"') == "a é 🙂 \ud800"
    assert done.stderr.decode(encoding) == ("b \\u00e9\n" if encoding == "ascii" else "b é\n")


READS = """
import sparing.cli as cli
def run(arguments):
    print(ascii(input()))
    return 0
cli.run = run
cli.main()
"""


@pytest.mark.parametrize(
    "environment", [{"PYTHONIOENCODING": "ascii"}, {"PYTHONIOENCODING": "latin-1"}, {"LC_ALL": "C"}]
)
def test_input_is_utf_8_in_any_locale(environment):
    done = subprocess.run(
        [sys.executable, "-c", READS], input="é🙂\n".encode(), capture_output=True, env={**os.environ, **environment}
    )
    assert done.stdout.decode().strip() == ascii("é🙂")


def test_input_and_arguments_that_are_not_utf_8_are_named(refused):
    assert "standard input: not UTF-8 text, byte 1 is 0xe9" in refused("generate", "tales", stdin=b"a\xe9")
    assert r"argument 'a\udce9': not UTF-8 text" in refused("generate", "tales", "a\udce9")
    code = "import sparing.cli.app as a\na.app.main = lambda *x, **y: input()\nfrom sparing.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], input=b"a\xe9\n", capture_output=True)
    assert (done.returncode, done.stderr) == (2, b"sparing: standard input: not utf-8 text, a byte is 0xe9\n")


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (0, 1, 2)])
def test_streams_that_are_closed(closed):
    """A file that is opened later must not take the number of one."""
    code = "import os\n" + "".join(f"os.close({number})\n" for number in closed)
    code += "import sys; sys.argv = ['sparing', 'plan', 'gemma-4-e2b', '--context', '100']\n"
    code += f"os.execv(sys.executable, [sys.executable, '-c', {MAIN[2]!r}, *sys.argv[1:]])"
    done = plain(code)
    assert done.returncode == 0
    assert done.stderr == ""
    assert ("parameters" in done.stdout) == (1 not in closed)


@pytest.mark.parametrize(
    "name", ["generate", "chat", "plan", "inspect", "compare", "calibrate", "quantize", "train", "demo"]
)
def test_help_in_the_poorest_terminal(name, monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "1")
    monkeypatch.setenv("TERM", "dumb")
    monkeypatch.delenv("HOME", raising=False)
    assert run([name, "--help"]) == 0
    words = capsys.readouterr().out.split()
    assert words[:3] == ["Usage:", "sparing", name]
    assert "--help" in words


WARNS = """
import warnings
import sparing.cli as cli
def run(arguments):
    for _ in range(2):
        warnings.warn("about\\n  this")
        warnings.warn("about that", DeprecationWarning, stacklevel=99)
    warnings.simplefilter("always")
    warnings.warn("about\\n  this")
    return 0
cli.run = run
cli.main()
"""


def test_a_warning_is_one_line_once():
    assert plain(WARNS).stderr == "sparing: warning: about this\n"


SLOW_IMPORT = """
import sys, time
class Finder:
    def find_spec(name, path=None, target=None):
        if name == {name!r}:
            print("importing", file=sys.stderr, flush=True)
            try:
                time.sleep(60)
            except BaseException:  # as extension modules do
                raise ImportError("swallowed")
sys.meta_path.insert(0, Finder)
sys.argv = ["sparing", *{arguments!r}]
from sparing.cli import main
main()
"""


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("click", ["plan"]),
        ("torch", ["generate", "tales", "a"]),
        ("sparing.inspection", ["inspect", "tales"]),
        ("torch", ["quantize", "tales", "never-written", "--weights", "int8"]),
        ("torch", ["train", "recipes/sudoku", "--out", "never-written"]),
    ],
)
def test_an_interruption_while_modules_load(name, arguments, tmp_path):
    script = SLOW_IMPORT.format(name=name, arguments=arguments)
    process = subprocess.Popen(
        [sys.executable, "-c", script], stderr=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path, text=True
    )
    assert process.stderr is not None
    assert process.stderr.readline() == "importing\n"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (130, "", "sparing: interrupted\n")
    assert not list(tmp_path.iterdir())


def test_termination_cleans_up(tmp_path):
    code = "import sparing.cli.app as a, time, sys\n"
    code += "def wait(*x, **y):\n    try:\n        print('ready', flush=True)\n        time.sleep(60)\n"
    code += "    finally:\n        print('clean', flush=True)\na.app.main = wait\nfrom sparing.cli import main; main()"
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out, err) == (143, "clean\n", "sparing: terminated\n")


def test_two_trainings_and_an_interruption(refused, tmp_path):
    """The second is told who trains there; the first is saved, and its exit code says that it was interrupted."""
    settings = SUDOKU_RUN | {"validate_every": 9999}
    flags = [part for name, value in settings.items() for part in ("--set", f"{name}={value}")]
    command = ("train", "recipes/sudoku", "--out", tmp_path / "run", "--threads", 1, *flags)
    first = start(*command)
    try:
        assert first.stdout is not None
        assert first.stdout.readline().startswith(b"step ")
        message = refused(*command, "--steps", 1)
        assert message == (
            f"sparing: {tmp_path / 'run'}: process {first.pid} is writing there; wait for it or choose another folder\n"
        )
        first.send_signal(signal.SIGINT)
        out, err = first.communicate(timeout=120)
        assert first.returncode == 130
        assert b"interrupted: step" in out
        assert err.strip() == b"sparing: interrupted"
        assert sorted(os.listdir(tmp_path / "run")) == ["log.jsonl", "state.safetensors"]
    finally:
        first.kill()


def test_a_file_that_cannot_be_written_is_refused_before_the_work(refused, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("Once upon a time. " * 20)
    message = refused("calibrate", "tales", "--text", text, "--out", os.devnull)
    assert message == f"sparing: {os.devnull}: is a device, not a file; nothing was changed. Choose another name\n"
    message = refused("calibrate", "tales", "--text", text, "--out", tmp_path / "no" / "x")
    assert "x: cannot be written: No such file or directory" in message
    assert sorted(os.listdir(tmp_path)) == ["text.txt"]
    assert Path(os.devnull).is_char_device()


@pytest.mark.parametrize("before", [("inspect",), ("plan", "--context", 9), ("generate", "--file", os.devnull)])
def test_a_name_too_long_for_any_file(refused, before):
    assert "cannot be opened: File name too long" in refused(*before, "x" * 5000)
