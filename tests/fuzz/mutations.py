"""Mutations that know how their input is built: each is a line of Python over `doc`, the document, or `raw`, its bytes.

A recipe is a list of such lines, which can be read, shortened, saved and run again.
"""

from __future__ import annotations

import random
from typing import Any

__all__ = ["apply_lines", "recipe"]

# In place of any value; written as they are evaluated. `deep` is a list in a list, two hundred times.
VALUES = [
    *("None", "True", "False", "0", "1", "-1", "2", "3", "7", "64", "2.5", "-0.5", "1e-320", "1e308", "10**30"),
    *("float('nan')", "float('inf')", "-float('inf')", "2**31", "2**32", "2**63", "2**64", "-2**63", "1000", "10**6"),
    *(
        "''",
        "' '",
        "'a'",
        "'\\0'",
        "'\\ud800'",
        "'../x'",
        "'7'",
        "'1e3'",
        "'nan'",
        "'<eos>'",
        "'$A:x'",
        "'a' * 100_000",
    ),
    *("[]", "{}", "[[]]", "[None]", "[0]", "['']", "[-1]", "[1, 2, 3]", "['a', 'b']", "[[1], [2]]", "[0] * 10_000"),
    *("{'': None}", "{'a': {'b': 1}}", "deep(200)"),
]
NUMBERS = ["x + 1", "x - 1", "-x", "2 * x", "x // 2", "x * 1000", "x * 10**6", "x + 0.5", "float(x)", "str(x)", "[x]"]
TEXTS = [
    *("x[:-1]", "x[1:]", "x + x", "x.upper()", "x + '\\0'", "x * 1000", "x[::-1]", "[x]", "x + ' '", "'{' + x + '}'"),
    *("x.replace(' ', '')", "x[: len(x) // 2]", "x.replace('e', '\\u00e9')", "list(x)", "x.swapcase()"),
]
LISTS = ["x * 2", "x * 1000", "x[:-1]", "x[1:]", "x[::-1]", "[x]", "x + [x]", "x + x[:1]", "x[0]", "dict(enumerate(x))"]
DICTS = [
    "list(x)",
    "list(x.items())",
    "{**x, **{k + '_': v for k, v in x.items()}}",
    "dict(reversed(x.items()))",
    "[x]",
]
BYTES = ["x[:-1]", "x[: len(x) // 2]", "b''", "x + b'a'", "b'\\xff' * len(x)", "x[::-1]", "b'\\x7f' * len(x)"]
RAW = [
    *("raw[f] = raw[f][:{at}]", "raw[f] = raw[f][{at}:]", "raw[f] = raw[f][:{at}] + b'{byte}' + raw[f][{at} + 1:]"),
    *("raw[f] = raw[f][:{at}] + b'{byte}' + raw[f][{at}:]", "raw[f] = raw[f][:{at}] + raw[f][{at} // 2:]"),
    *(
        "raw[f] = b''",
        "raw[f] = b'null'",
        "raw[f] = b'[]'",
        "raw[f] = b'[' * 100_000",
        "raw[f] = b'\\xef\\xbb\\xbf' + raw[f]",
    ),
    *("raw[f] = raw[f].replace(b'\"', b'\\'')", "raw[f] = bytes(len(raw[f]))", "raw[f] = raw[f] * 2"),
    *("raw[f] = raw[f].decode('latin-1').encode('utf-16')", "raw.pop(f)"),
]


def recipe(seeds: dict[str, tuple[dict[str, Any], list[str]]], keys: list[str], number: int) -> tuple[str, list[str]]:
    """The name of a seed, and one to three lines. seeds: documents, and the files in them that are mutated; keys: names
    that may be added to a mapping. The same number gives the same recipe."""
    random_ = random.Random(number)
    name = random_.choice(sorted(seeds))
    document, files = seeds[name]
    lines = [_line(random_, document, random_.choice(files), keys) for _ in range(random_.choice((1, 1, 1, 2, 3)))]
    return name, sorted(lines, key=lambda line: line.startswith("f = "))


def apply_lines(lines: list[str], **names: Any) -> None:
    """Run the lines of a recipe that are about these names; one whose place is gone does nothing.

    They may also say `entry(key)`, the metadata of that key in a GGUF file: [key, type, value].
    """
    metadata = names.get("doc", {}).get("model.gguf", {}).get("metadata", [])
    names["entry"] = lambda key: next(each for each in metadata if each[0] == key)
    for line in lines:
        if line.startswith("f = ") == ("raw" in names):
            try:
                exec(line, {"deep": _deep, **names})
            except (KeyError, IndexError, TypeError, ValueError, AttributeError, OverflowError, MemoryError):
                continue


def _deep(count: int) -> Any:
    value: Any = []
    for _ in range(count):
        value = [value]
    return value


def _line(random_: random.Random, document: dict[str, Any], file: str, keys: list[str]) -> str:
    if random_.random() < 0.15 and file.partition("/")[2] != "call":
        size = len(document[file]["data"]) if isinstance(document[file], dict) and "data" in document[file] else 2000
        byte = f"\\x{random_.randrange(256):02x}"
        return f"f = {file!r}; " + random_.choice(RAW).format(at=int(size * random_.random() ** 3), byte=byte)
    value, path = document[file], f"doc[{file!r}]"
    parent: Any = None
    key: Any = None
    while isinstance(value, dict | list) and value and random_.random() < 0.85:
        parent, key = value, random_.choice(list(value) if isinstance(value, dict) else range(len(value)))
        value, path = value[key], f"{path}[{key!r}]"
    choice = random_.random()
    if choice < 0.1 and parent is not None:
        return f"del {path}"
    if choice < 0.25 and isinstance(value, dict):
        return f"{path}[{random_.choice(keys)!r}] = {random_.choice(VALUES)}"
    if choice < 0.3 and isinstance(parent, dict):
        head = path[: -len(repr(key)) - 2]
        other = random_.choice([*parent, *keys])
        return f"{head}[{other!r}] = {path}"
    if choice < 0.35 and isinstance(parent, list):
        head = path[: -len(repr(key)) - 2]
        return f"{head}.insert({random_.randrange(len(parent) + 1)}, {path})"
    own = {bool: VALUES, int: NUMBERS, float: NUMBERS, str: TEXTS, list: LISTS, dict: DICTS, bytes: BYTES}
    if choice < 0.65:
        return f"x = {path}; {path} = {random_.choice(own.get(type(value), VALUES))}"
    if isinstance(value, bytes):
        return f"x = {path}; {path} = {random_.choice(BYTES)}"
    return f"{path} = {random_.choice(VALUES)}"
