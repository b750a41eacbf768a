"""What is done with an input of each kind: everything that a user would do next."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Any

import sparing
from sparing.checkpoint import open_checkpoint
from sparing.checkpoint.chat.template import ChatTemplate
from sparing.cli import run
from sparing.inspection import inspect
from sparing.memory.triattention.statistics import Statistics
from sparing.training import RECIPES, train
from sparing.weights.convert import quantize
from tests.fuzz import seeds
from tests.fuzz.documents import encode, write_folder
from tests.tiny import model, random_ids

__all__ = ["TARGETS", "Defect", "Unwritable", "use"]

EVENTS = 40  # of a text, at most: what is asked for may be long


class Defect(Exception):
    """Something wrong that was not raised."""


class Unwritable(Exception):
    """A document that no file can hold, hence no input."""


def use(kind: str, document: dict[str, Any], folder: Path, mutate_bytes: Callable[[dict[str, bytes]], None]) -> None:
    """Write the files of a document, changed by `mutate_bytes`, into an empty folder and use them."""
    if "call" in document or kind == "template":
        TARGETS[kind](document, folder)
        return
    try:
        files = {name: encode(name, content) for name, content in document.items() if name != "policy.json"}
    except Exception as error:
        raise Unwritable(str(error)) from error
    mutate_bytes(files)
    write_folder(folder, files)
    TARGETS[kind](document, folder)


def _model(document: dict[str, Any], folder: Path) -> None:
    """Plan, inspect and load a checkpoint, and write a text with it."""
    source = folder / "model.gguf" if "model.gguf" in document else folder
    problems: list[Exception] = []
    for step in (_plan, _inspect, _load):
        try:
            step(source)
        except (ValueError, OSError) as error:  # each has to refuse by itself
            problems.append(error)
    if problems:
        raise problems[-1]


def _plan(source: Path) -> None:
    sparing.plan(source, context=16, kv="turboquant:4").table()


def _inspect(source: Path) -> None:
    inspect(source).table()


def _load(source: Path) -> None:
    loaded = sparing.load(source)
    loaded.logits([3, 4, 5])
    if loaded.tokenizer is None:
        _read(sparing.generate(loaded, [3, 4], seed=1))
        return
    _tokenize(loaded.tokenizer)
    _read(sparing.generate(loaded, "Once upon", seed=1, max_new_tokens=4))
    if loaded.tokenizer.chat_template is not None:
        _read(sparing.generate(loaded, [{"role": "user", "content": "Once"}], seed=1, max_new_tokens=4))


def _tokenizer(document: dict[str, Any], folder: Path) -> None:
    found = open_checkpoint(folder).tokenizer
    if found is not None:
        _tokenize(found)
    _load(folder)


def _tokenize(tokenizer: Any) -> None:
    for text in ("Once upon a time", "<eos>a<bos> \u00fc\u4f60\U0001f642\n\n  x", ""):
        tokenizer.decode(tokenizer.encode(text))


def _read(events: Iterator[Any]) -> None:
    for _ in islice(events, EVENTS):
        pass


def _template(document: dict[str, Any], folder: Path) -> None:
    pieces = document["pieces.json"]
    source = "".join(map(str, pieces)) if isinstance(pieces, list) else str(pieces)
    special = {"bos_token": "<bos>", "eos_token": "<eos>"}
    template = ChatTemplate(source)
    template.render(
        messages=document["messages.json"], tools=document["tools.json"], add_generation_prompt=True, **special
    )


def _memory(document: dict[str, Any], folder: Path) -> None:
    of, kv, options = seeds.policy_options(document["policy.json"])
    memory = model(of).load_memory(folder / "memory.safetensors", kv, **options)
    before = memory.length
    model(of).logits(random_ids(5), memory)
    if memory.length != before + 5:
        raise Defect(f"length is {memory.length} after {before} + 5 tokens")
    memory.fork().save(folder / "again")


def _statistics(document: dict[str, Any], folder: Path) -> None:
    (name,) = document
    found = Statistics.load(folder / name, allow_pickle=True)
    found.concentration()
    fitted = found.fitted(model("dense").config) if name != "statistics.safetensors" else found
    model("dense").logits(
        random_ids(6), memory := model("dense").memory("triattention:8", statistics=fitted, interval=2)
    )
    for _ in range(6):
        model("dense").logits(random_ids(1), memory)


def _training(document: dict[str, Any], folder: Path) -> None:
    train(RECIPES["recipes/sudoku"], folder / "run", steps=3, resume=True, log=lambda record: None)


def _quantise(document: dict[str, Any], folder: Path) -> None:
    quantize(folder / "in", folder / "out", weights="int8")
    sparing.load(folder / "out").logits([3, 4, 5])


def _policy(document: dict[str, Any], folder: Path) -> None:
    of, call = document["of.json"], document["call"]
    if not isinstance(call, dict) or not isinstance(call.get("options", {}), dict):
        return
    kv = call.get("kv", "dense")
    kv = "".join(map(str, kv)) if isinstance(kv, list) else kv
    options = {str(name): value for name, value in call.get("options", {}).items()}
    if "triattention" in str(kv):
        options.setdefault("statistics", seeds.statistics())
    memory = model(of).memory(kv, **options)
    for length in (7, 1, 1, 5, 1):
        model(of).logits(random_ids(length), memory, prompt=memory.length == 0)


@cache
def _causal(root: Path, family: str) -> Any:
    """A model in a folder that all calls share."""
    document, _ = seeds.seeds("config")[family]
    write_folder(root / family, {name: encode(name, content) for name, content in document.items()})
    return sparing.load(root / family)


def _arguments(document: dict[str, Any], folder: Path) -> None:
    call = document["call"]
    if isinstance(call, dict) and "prompt" in call:
        loaded = _causal(folder.parent, "diffusion_gemma" if "canvas" in call or "fixed" in call else "llama")
        prompt = call.pop("prompt")
        _read(sparing.generate(loaded, prompt, **{str(name): value for name, value in call.items()}))


def _command_line(document: dict[str, Any], folder: Path) -> None:
    call = document["call"]
    if not isinstance(call, list):
        return
    _causal(folder.parent, "llama")
    where = str(folder.parent / "llama")
    line = [where if word == "MODEL" else str(word).replace("\0", "") for word in call]
    long = next((i + 1 for i, word in enumerate(line[:-1]) if word == "--max-new-tokens"), None)
    if long is not None and line[long].isdigit():
        line[long] = str(int(line[long]) % 40)  # a long answer is no defect
    here, stdin = os.getcwd(), sys.stdin
    (folder / "here" / "and" / "there").mkdir(parents=True)
    sys.stdin = io.TextIOWrapper(io.BytesIO(b"Once\n/exit\n"))
    out, err = (io.TextIOWrapper(io.BytesIO(), encoding="utf-8") for _ in range(2))
    try:
        os.chdir(folder / "here" / "and" / "there")
        with redirect_stdout(out), redirect_stderr(err):
            code = run(line)
    finally:
        os.chdir(here)
        sys.stdin = stdin
    err.flush()
    said = err.buffer.getvalue().decode()  # type: ignore[attr-defined]
    if code not in (0, 2) or (code == 2 and (not said.startswith(("sparing: ", "Usage: ")) or "Traceback" in said)):
        raise Defect(f"exit code {code}: {said[:300]}")


TARGETS: dict[str, Callable[[dict[str, Any], Path], None]] = {
    "config": _model,
    "generation": _model,
    "tokenizer": _tokenizer,
    "tokenizer-config": _tokenizer,
    "template": _template,
    "safetensors": _model,
    "index": _model,
    "gguf": _model,
    "memory": _memory,
    "statistics": _statistics,
    "training": _training,
    "quantise": _quantise,
    "policy": _policy,
    "arguments": _arguments,
    "command-line": _command_line,
}
