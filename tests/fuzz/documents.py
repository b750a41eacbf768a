"""Inputs as documents: trees of plain values that a mutation can reach into, and the files they stand for.

A document maps names of files to what is in them: a JSON value, text, or a mapping that stands for a binary file, which
may say things that no honest writer would.
"""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

__all__ = ["decode_gguf", "decode_safetensors", "encode", "write_folder"]

UINT32, FLOAT32, BOOL, STRING, ARRAY = 4, 6, 7, 8, 9
CODES = {0: "B", 1: "b", 2: "H", 3: "h", UINT32: "I", 5: "i", FLOAT32: "f", BOOL: "?", 10: "Q", 11: "q", 12: "d"}


def encode(name: str, content: Any) -> bytes:
    """The bytes of a file, by the ending of its name. Values that a format cannot hold become the nearest bytes."""
    if isinstance(content, bytes):
        return content
    if name.endswith(".safetensors"):
        header = dict(content["header"])
        described = {key: json.dumps(content[key]) for key in ("memory", "run") if key in content}
        if described:  # a JSON text within the JSON of the header
            header["__metadata__"] = {**header.get("__metadata__", {}), **described}
        header = json.dumps(header).encode()
        return struct.pack("<Q", content.get("size", len(header)) % 2**64) + header + content["data"]
    if name.endswith(".gguf"):
        return encode_gguf(content)
    if name.endswith(".bin"):
        return content["data"]
    if name.endswith(".pt"):
        return encode_pickle(content)
    if name.endswith(".jsonl"):
        return "".join(json.dumps(line) + "\n" for line in content).encode()
    if name.endswith(".json"):
        return json.dumps(content).encode()
    return str(content).encode("utf-8", "surrogatepass")


def decode_safetensors(raw: bytes) -> dict[str, Any]:
    (length,) = struct.unpack_from("<Q", raw)
    return {"header": json.loads(raw[8 : 8 + length]), "data": raw[8 + length :]}


def encode_gguf(content: dict[str, Any]) -> bytes:
    """Version, metadata as [key, type, value] (a value of an array: [type, values]), tensors as [name, sizes, type,
    offset], data."""
    metadata, tensors = content["metadata"], content["tensors"]
    parts = [b"GGUF", struct.pack("<IQQ", content["version"], len(tensors), len(metadata))]
    for key, kind, value in metadata:
        parts += [_text(key), struct.pack("<I", kind), _value(kind, value)]
    for name, sizes, kind, offset in tensors:
        parts += [_text(name), struct.pack(f"<I{len(sizes)}Q", len(sizes), *(size % 2**64 for size in sizes))]
        parts.append(struct.pack("<IQ", kind % 2**32, offset % 2**64))
    head = b"".join(parts)
    return head + bytes(-len(head) % 32) + content["data"]


def _text(text: Any) -> bytes:
    raw = str(text).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(raw)) + raw


def _value(kind: int, value: Any) -> bytes:
    if kind == STRING:
        return _text(value)
    if kind == ARRAY:
        inner, values = value
        return struct.pack("<IQ", inner, len(values)) + b"".join(_value(inner, v) for v in values)
    code = CODES[kind]
    if code in "fd":
        return struct.pack(f"<{code}", float(value))
    if code == "?":
        return struct.pack("<?", bool(value))
    bits = 8 * struct.calcsize(code)
    number = int(value) % 2**bits
    return struct.pack(f"<{code}", number - 2**bits if code.islower() and number >= 2 ** (bits - 1) else number)


def decode_gguf(raw: bytes) -> dict[str, Any]:
    """What `encode_gguf` makes such a file of."""
    position = 8

    def number(code: str) -> Any:
        nonlocal position
        (found,) = struct.unpack_from(f"<{code}", raw, position)
        position += struct.calcsize(f"<{code}")
        return found

    def text() -> str:
        nonlocal position
        length = number("Q")
        position += length
        return raw[position - length : position].decode()

    def value(kind: int) -> Any:
        if kind == ARRAY:
            inner, count = number("I"), number("Q")
            return [inner, [value(inner) for _ in range(count)]]
        return text() if kind == STRING else number(CODES[kind])

    tensor_count, metadata_count = number("Q"), number("Q")
    metadata = [[text(), kind := number("I"), value(kind)] for _ in range(metadata_count)]
    tensors = [
        [text(), [number("Q") for _ in range(number("I"))], number("I"), number("Q")] for _ in range(tensor_count)
    ]
    return {"version": 3, "metadata": metadata, "tensors": tensors, "data": raw[position + -position % 32 :]}


def encode_pickle(content: Any) -> bytes:
    """What `torch.save` writes, with {"tensor": shape, "value": number} as a filled tensor."""
    import io

    import torch

    def build(value: Any) -> Any:
        if isinstance(value, dict) and value.keys() == {"tensor", "value"}:
            return torch.full(value["tensor"], float(value["value"]))
        if isinstance(value, dict):
            return {key: build(inner) for key, inner in value.items()}
        return [build(inner) for inner in value] if isinstance(value, list) else value

    buffer = io.BytesIO()
    torch.save(build(content), buffer)
    return buffer.getvalue()


def write_folder(folder: Path, files: dict[str, bytes]) -> None:
    for name, raw in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(raw)
