"""What the documents say is there: files, links, names, commands and snippets."""

from __future__ import annotations

import re
import shlex
import subprocess
from functools import cache
from pathlib import Path

import click
import pytest

from sparing.cli.app import app

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
CODE = re.compile(r"`([^`\n]+)`")
FILE_NAME = re.compile(r"[\w./-]+\.(?:py|cpp|hpp|md|toml|txt|sh)")
FENCED = re.compile(r"```(\w*)\n(.*?)```", re.DOTALL)
# Files that documents name and the project does not have: those of others, and of the reader.
NOT_OURS = {"book.txt", "corpus/fairy_tales.txt", "modeling_deepseek.py", "expert_bias.py", "merges.txt"}
# Words in `code` that stand for something outside the project's own sources.
PLACEHOLDER = re.compile(r"\b(MODEL|OUT|FILE|FOLDER|PATH|path/[\w/-]+)\b|\.\.\.")


@cache
def tracked() -> tuple[Path, ...]:
    """Files under version control; those of the folders, where there is no repository."""
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        return tuple(p for part in ("src", "tests", "docs", "tools", "benchmarks") for p in (ROOT / part).rglob("*.*"))
    return tuple(path for name in listed.stdout.splitlines() if (path := ROOT / name).is_file())


@cache
def words_of_the_code() -> frozenset[str]:
    """All words and options in the project's code, and the names of its files."""
    kinds = (".py", ".cpp", ".hpp", ".toml", ".json", ".jinja", "")
    texts = (path.read_text() for path in tracked() if path.suffix in kinds and path != Path(__file__))
    words = {word for text in texts for word in re.findall(r"--[a-z][\w-]*|\w+", text)}
    return frozenset(words | {path.stem for path in tracked()})


def prose(document: Path) -> str:
    return FENCED.sub("", document.read_text())


def test_no_merge_was_left_half_done():
    marked = [
        f"{path.relative_to(ROOT)}:{number}"
        for path in tracked()
        if path.suffix in (".py", ".md", ".cpp", ".hpp", ".toml", ".txt", ".json", "") and path.stat().st_size < 2**20
        for number, line in enumerate(path.read_bytes().splitlines(), 1)
        if line.startswith((b"<" * 7 + b" ", b">" * 7 + b" ", b"|" * 7 + b" ")) or line == b"=" * 7
    ]
    assert not marked


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_somewhere(document):
    for target in LINK.findall(prose(document)):
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        name, _, section = target.partition("#")
        path = (document.parent / name) if name else document
        assert path.exists(), f"{document.name}: {target}"
        if section:
            headings = re.findall(r"^#+ (.+)$", path.read_text(), re.MULTILINE)
            assert section in [re.sub(r"[^\w -]", "", h).strip().lower().replace(" ", "-") for h in headings], target


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_are_named_exist(document):
    known = {str(path.relative_to(ROOT)) for path in tracked()}
    for code in CODE.findall(prose(document)):
        for name in FILE_NAME.findall(code) if FILE_NAME.fullmatch(code) else ():
            ending = f"/{name.lstrip('./')}"
            assert name in NOT_OURS or any(f"/{path}".endswith(ending) for path in known), f"{document.name}: {name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_names_exist_in_the_code(document):
    """Every identifier in `code`, and every option of the command line."""
    options = {name for command in app.commands.values() for parameter in command.params for name in parameter.opts}
    options |= {"--help", "--version"}
    for code in CODE.findall(prose(document)):
        if PLACEHOLDER.search(code) or " . " in code or "pip install" in code:  # a formula, another's command
            continue
        for option in re.findall(r"(?<![\w-])--[a-z][\w-]*", code):
            assert option in options or option in words_of_the_code(), f"{document.name}: {option} in `{code}`"
        for name in re.findall(r"(?<![\w.-])[a-z]\w*_\w+(?![\w-])|(?<![\w.-])[a-z]\w+(?=\()", code):
            assert name in words_of_the_code(), f"{document.name}: {name} in `{code}`"


def commands(document: Path) -> list[list[str]]:
    """Commands of our own in indented and fenced blocks, and in `code` that names an option."""
    text = document.read_text().replace("\\\n", " ")
    fenced = "\n".join(block for kind, block in FENCED.findall(text) if kind in ("", "sh", "bash", "console"))
    lines = re.findall(r"^    (.+)$", text, re.MULTILINE) + fenced.splitlines()
    lines += [" ".join(code.split()) for code in re.findall(r"`(sparing [^`]*--[^`]*)`", FENCED.sub("", text))]
    found = []
    for line in lines:
        words = shlex.split(line.strip().removeprefix("$ "), comments=True)
        if words and words[0].removeprefix(".venv/bin/") == "sparing":
            found.append(words[1:])
    return found


ALL = [(document, words) for document in DOCUMENTS for words in commands(document)]


@pytest.mark.parametrize(("document", "words"), ALL, ids=[f"{d.stem} {' '.join(w)[:60]}" for d, w in ALL])
def test_commands_are_parsed(document, words, tmp_path, monkeypatch):
    """Every option exists and takes such a value; what a command names as `...` or N is given one."""
    monkeypatch.chdir(tmp_path)
    for name in words:
        if name.endswith((".txt", ".safetensors", ".pt")) or name == "FILE":
            (tmp_path / name).write_text("x")
    given: list[str] = [{"N": "64", "...": "x", "POLICY": "dense"}.get(word, word) for word in words]
    name, command, rest = app.resolve_command(click.Context(app), given)
    assert command is not None and name is not None
    command.make_context(name, [*rest])


def test_there_are_commands():
    assert len(ALL) > 20
