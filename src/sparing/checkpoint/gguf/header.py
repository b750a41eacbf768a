"""The header of a GGUF file: metadata and where its tensors lie, whatever the bytes are.

Layout of a file (little endian, version 2 or 3): `GGUF`, version u32, tensor count u64, metadata count u64; metadata
as key, type u32, value; tensor infos as name, rank u32, sizes u64 (fastest first), type u32, offset u64; padding to
`general.alignment`; data, to which the offsets count. A string is its length u64 and UTF-8 bytes.
Source: the GGUF document of ggml. The header is parsed here rather than by gguf.GGUFReader, which believes every
count it reads and takes seconds for a large vocabulary.
"""

import math
import struct
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

from sparing.checkpoint.tensors import MappedFile
from sparing.errors import CheckpointError

__all__ = ["StoredTensor", "read_header"]

STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MAX_DEPTH = 2
# No released file comes near these; beyond them a header costs many times its own size in objects.
MAX_KEYS = 2**16
MAX_TENSORS = 2**17
MAX_ENTRIES = 2**22  # of all arrays together
MAX_NAME = 2**16


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as its file has it; shape slowest first, `start` a byte offset into the file."""

    file: MappedFile
    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


class Cursor:
    """Reads values from front to back and never past the end."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.position = 0
        self.entries = 0  # of all arrays so far

    def take(self, count: int) -> bytes:
        if count > self.file.size - self.position:
            raise CheckpointError(
                f"{self.file.path}: the header asks for {count} bytes at {self.position}, the file ends at "
                f"{self.file.size}; it is truncated or not GGUF: download it again"
            )
        self.position += count
        return self.file.bytes(self.position - count, self.position)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize(code)))[0]

    def count(self, most: int, what: str) -> int:
        value = self.number("Q")
        if value > most:
            raise CheckpointError(f"{self.file.path}: {value} {what}, no model has more than {most}")
        return value

    def name(self) -> str:
        return self.text(self.count(MAX_NAME, f"bytes of a name at byte {self.position}"))

    def text(self, length: int | None = None) -> str:
        raw = self.take(self.number("Q") if length is None else length)
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.file.path}: text at byte {self.position} is not UTF-8") from error

    def texts(self, count: int) -> list[str]:
        """As many texts one after the other; a vocabulary has hundreds of thousands."""
        data, size, length = self.file.buffer(), self.file.size, struct.Struct("<Q")
        result: list[str] = []
        for _ in range(count):
            begin = self.position + 8
            stop = begin + length.unpack_from(data, self.position)[0] if begin <= size else size + 1
            if stop > size:
                self.text()  # says what is wrong
            try:
                result.append(data[begin:stop].decode("utf-8"))
            except UnicodeDecodeError as error:
                raise CheckpointError(f"{self.file.path}: text at byte {begin} is not UTF-8") from error
            self.position = stop
        return result

    def value(self, kind: int, depth: int = 0) -> Any:
        if kind == STRING:
            return self.text()
        if kind == 6:
            # the shortest decimal that rounds to this float32: 1e-05, not 9.999999747378752e-06
            return float(str(np.float32(self.number("f"))))
        if kind in SCALARS:
            return self.number(SCALARS[kind])
        if kind == ARRAY and depth < MAX_DEPTH:
            inner, count = self.number("I"), self.number("Q")
            self.entries += count * 64 if inner == ARRAY else count
            if self.entries > MAX_ENTRIES:
                raise CheckpointError(
                    f"{self.file.path}: an array of {count} entries at byte {self.position}; no model has that many"
                )
            if inner in SCALARS:
                code = SCALARS[inner]
                raw = self.take(count * struct.calcsize(code))
                return list(struct.unpack(f"<{count}{code}", raw))
            if inner == STRING:
                return self.texts(count)
            # take() ends the loop: every array is at least 12 bytes long
            return [self.value(inner, depth + 1) for _ in range(count)]
        raise CheckpointError(f"{self.file.path}: unknown metadata type {kind} at byte {self.position}")


def read_header(file: MappedFile) -> tuple[dict[str, Any], list[StoredTensor]]:
    """Metadata and tensors of a file. Raises CheckpointError, and nothing else, whatever the bytes are."""
    cursor = Cursor(file)
    if file.size < 4 or cursor.take(4) != b"GGUF":
        raise CheckpointError(f"{file.path}: does not begin with GGUF; not a GGUF file")
    version = cursor.number("I")
    if version in (1 << 24, 2 << 24, 3 << 24):
        raise CheckpointError(f"{file.path}: a big-endian GGUF file; convert it with gguf-convert-endian first")
    if version not in (2, 3):
        raise CheckpointError(f"{file.path}: GGUF version {version}; versions 2 and 3 can be read, convert it anew")
    tensor_count, metadata_count = cursor.count(MAX_TENSORS, "tensors"), cursor.count(MAX_KEYS, "metadata keys")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.name()
        if key in metadata:
            raise CheckpointError(f"{file.path}: metadata key {key[:80]!a} appears twice")
        metadata[key] = cursor.value(cursor.number("I"))
    infos = [_read_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise CheckpointError(f"{file.path}: general.alignment {alignment!a} is not a power of two")
    data = cursor.position + -cursor.position % alignment
    for name, _, _, offset in infos:
        if offset % alignment:
            raise CheckpointError(f"{file.path}: {name[:80]!a} begins at byte {offset}, no multiple of {alignment}")
    stored = [_place(file, info, data) for info in infos]
    for before, after in pairwise(sorted(stored, key=lambda tensor: tensor.start)):
        if after.start < before.start + before.nbytes:
            raise CheckpointError(f"{file.path}: {after.name[:80]!a} overlaps {before.name[:80]!a}")
    if len({tensor.name for tensor in stored}) < len(stored):
        raise CheckpointError(f"{file.path}: a tensor name appears twice")
    return metadata, stored


def _read_info(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, rank = cursor.name(), cursor.number("I")
    if not 1 <= rank <= 4:
        raise CheckpointError(f"{cursor.file.path}: {name[:80]!a} has {rank} dimensions, GGUF allows 1 to 4")
    sizes = tuple(cursor.number("Q") for _ in range(rank))
    return name, sizes[::-1], cursor.number("I"), cursor.number("Q")


def _place(file: MappedFile, info: tuple[str, tuple[int, ...], int, int], data: int) -> StoredTensor:
    name, shape, kind, offset = info
    where = f"{file.path}: {name[:80]!a}"
    if kind not in GGMLQuantizationType._value2member_map_:
        raise CheckpointError(f"{where}: unknown tensor type {kind}; the file is newer than this version of gguf")
    kind = GGMLQuantizationType(kind)
    block, size = GGML_QUANT_SIZES[kind]
    if min(shape) < 1 or shape[-1] % block:
        raise CheckpointError(f"{where}: shape {list(shape)} does not divide into {kind.name} blocks of {block}")
    nbytes = math.prod(shape) // block * size
    if data + offset + nbytes > file.size:
        raise CheckpointError(
            f"{where}: data ends at byte {data + offset + nbytes}, the file at {file.size}; "
            "it is truncated: download it again"
        )
    return StoredTensor(file, name, kind, shape, data + offset, nbytes)
