"""Every command and every snippet in README and docs runs, on tiny models where it names large ones."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import sparing
from sparing.checkpoint import source
from tests.cli.test_commands import TINY
from tests.test_docs import DOCUMENTS, FENCED, commands

STORY = "Once upon a time there was a king's daughter, and nobody knew her name. " * 12
# In place of what stands for a model of the reader's.
ANY_MODEL = {"path/or/hub-id", "path/to/large", "path/to/small", "smollm2", "MODEL", "FOLDER"}
FEW = ("--max-new-tokens", "2")
MORE = {
    **dict.fromkeys(("generate", "compare", "chat"), FEW),
    "calibrate": ("--length", "64"),
    "bench": ("--prompt-tokens", "8", "--new-tokens", "4", "--repetitions", "1"),
    "perplexity": ("--context", "64", "--tokens", "128"),
}
# What the beginning of a command needs that a test does not have.
WHY_NOT = {
    "calibrate MODEL --from": "a file of the method's authors (tests/memory/triattention/test_statistics.py has one)",
    "train recipes/tales": "hours, and a corpus (tests/training runs the recipes)",
    "train recipes/hybrid": "hours, and a corpus (tests/training runs the recipes)",
    "train recipes/compressed": "hours, and a corpus (tests/training runs the recipes)",
    "train recipes/sudoku --out runs/sudoku6": "hours (the first training command runs, with smaller settings)",
    "train recipes/sudoku --out runs/sudoku4": "hours (the first training command runs, with smaller settings)",
    "train recipes/sudoku --out runs/sudoku --seed": "hours (the same without a seed runs, with smaller settings)",
    "train recipes/sudoku --out runs/sudoku --export": "a finished run (tests/cli/test_commands.py exports one)",
}


@pytest.fixture
def place(command, folders, tmp_path, monkeypatch):
    """A folder to be in, with what documents take for granted; models that ship are those that ship."""
    monkeypatch.setattr(source, "ASSETS", Path(sparing.__file__).parent / "assets")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text(STORY)
    sparing.calibrate(sparing.load(folders / "causal"), STORY, length=64).save("queries.safetensors")
    (tmp_path / "path").mkdir()
    return tmp_path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_commands_run(command, place, folders, document):
    for words in commands(document):
        line = " ".join(words)
        if any(line.startswith(beginning) for beginning in WHY_NOT):
            continue
        given = [str(folders / "causal") if word in ANY_MODEL else word for word in words]
        given = ["dense" if word == "..." and given[i - 1] == "--kv" else word for i, word in enumerate(given)]
        given = [{"N": "64", "...": "Once"}.get(word, word) for word in given]
        more = [*TINY, "--steps", "1"] if words[0] == "train" else MORE.get(words[0], ())
        result = command(*given, *more, stdin="Once\n/exit\n")
        assert result.code == 0, (line, result.err)


def test_what_does_not_run_is_still_there():
    lines = [" ".join(words) for document in DOCUMENTS for words in commands(document)]
    for beginning in WHY_NOT:
        assert any(line.startswith(beginning) for line in lines), f"{beginning} is no command of the documents any more"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_snippets_run(command, place, folders, document, monkeypatch):
    """One after another, each seeing what those before it named; answers are cut short."""
    whole = sparing.generate

    def short(*arguments, **options):
        return whole(*arguments, **{"max_new_tokens": 2, **options})

    monkeypatch.setattr(sparing, "generate", short)
    model = sparing.load(folders / "causal")
    names = {"sparing": sparing, "model": model, "prompt": "Once upon", "text": STORY}
    for kind, snippet in FENCED.findall(document.read_text()):
        if kind == "python":
            snippet = re.sub(r'NAME = "[^"]+"', f"NAME = {str(folders / 'causal')!r}", snippet)
            exec(compile(snippet.replace("max_new_tokens=100", "max_new_tokens=3"), str(document), "exec"), names)
