"""Reading safetensors files, one or many shards, without trusting a byte of them.

Layout of a file: 8 bytes, little endian, the length N of the header; N bytes of JSON,
`{"name": {"dtype": "BF16", "shape": [2, 3], "data_offsets": [begin, end]}, ..., "__metadata__": {"key": "text"}}`;
then the data, to which the offsets count. The tensors must fill the data exactly: no gap, no overlap.
Source: the format section of the safetensors README.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.checkpoint.tensors import PIECE_BYTES, MappedFile, torch_dtype
from sparing.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["SafetensorsFile", "SafetensorsTensors", "open_safetensors"]

# Of a header and of an index, whose objects take many times their bytes; that of the largest release is 14 MB.
MAX_HEADER_BYTES = 32_000_000
MAX_RANK = 64
MAX_NAME = 1000
INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
SHARD = re.compile(r"[\w.-]{1,200}\.safetensors")

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "U16": 16, "I16": 16, "U32": 32, "I32": 32, "U64": 64, "I64": 64,
    "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "F16": 16, "BF16": 16, "F32": 32, "F64": 64, "C64": 64,
}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Where one tensor lies; `start` and `stop` are byte offsets into the file."""

    file: MappedFile
    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsTensors:
    """The tensors of one or several safetensors files (a TensorSource)."""

    def __init__(self, entries: dict[str, Entry]) -> None:
        self._entries = entries

    def names(self) -> list[str]:
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._entry(name).shape

    def dtype(self, name: str) -> str:
        return self._entry(name).dtype

    def file(self, name: str) -> Path:
        return self._entry(name).file.path

    def is_mapped(self, name: str) -> bool:
        return name in self._entries

    def read(self, name: str) -> "torch.Tensor":
        entry = self._entry(name)
        return entry.file.tensor(entry.start, entry.shape, entry.dtype, f"{entry.file.path.name}: {name}")

    def rows(self, name: str) -> "torch.Tensor":
        import torch

        return self.read(name).view(torch.uint8)

    def pieces(self, name: str) -> Iterator["torch.Tensor"]:
        entry = self._entry(name)
        where = f"{entry.file.path.name}: {name}"
        size, count = torch_dtype(entry.dtype, where).itemsize, math.prod(entry.shape)
        step = PIECE_BYTES // size
        for begin in range(0, count, step):
            n = min(step, count - begin)
            offset = entry.start + begin * size
            yield entry.file.tensor(offset, (n,), entry.dtype, where)
            entry.file.release(offset, offset + n * size)

    def stored(self, name: str) -> Iterator[memoryview]:
        entry = self._entry(name)
        yield from entry.file.runs(entry.start, entry.stop)

    def release(self, name: str) -> None:
        entry = self._entry(name)
        entry.file.release(entry.start, entry.stop)

    def _entry(self, name: str) -> Entry:
        if name not in self._entries:
            raise CheckpointError(f"{name}: no such tensor; the checkpoint holds {len(self._entries)} others")
        return self._entries[name]


class SafetensorsFile(SafetensorsTensors):
    """The tensors of one file, and its `metadata`, text to text.

    Raises CheckpointError, and nothing else, whatever the bytes are.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._entries, self.metadata = _read_file(MappedFile(self.path))


def open_safetensors(folder: Path) -> SafetensorsTensors:
    """The tensors of a folder: `model.safetensors`, or the shards its index names, or the only safetensors file.

    Raises CheckpointError for a folder without weights, a missing or damaged shard, a hostile header, or an index
    that names a tensor its shard lacks.
    """
    if (folder / SINGLE).is_file():
        return SafetensorsFile(folder / SINGLE)
    if (folder / INDEX).is_file():
        return SafetensorsTensors(_read_shards(folder))
    files = sorted(folder.glob("*.safetensors"))
    if len(files) == 1:
        return SafetensorsFile(files[0])
    if files:
        raise CheckpointError(
            f"{folder}: {len(files)} safetensors files ({files[0].name}, ...) but no {INDEX}; "
            f"add the index, or join them into {SINGLE}"
        )
    pickles = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth", "*.ckpt") for file in folder.glob(pattern))
    if pickles:
        raise CheckpointError(
            f"{folder}: only pickled weights ({pickles[0]}), which run any code they contain when opened; "
            f"convert them to {SINGLE} first"
        )
    raise CheckpointError(f"{folder}: no weights found; expected {SINGLE}, or {INDEX} and its shards")


def _read_file(file: MappedFile) -> tuple[dict[str, Entry], dict[str, str]]:
    """Parses and checks one file's header: its tensors and its metadata."""
    path = file.path
    if file.size < 8:
        raise CheckpointError(f"{path}: {file.size} bytes, too short for a safetensors header; download it again")
    length = int.from_bytes(file.bytes(0, 8), "little")
    if length > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: header length {length} is over {MAX_HEADER_BYTES}; not a safetensors file")
    if 8 + length > file.size:
        raise CheckpointError(
            f"{path}: header length {length} reaches past the end of the file ({file.size} bytes); "
            "the file is truncated: download it again"
        )
    header = _parse_json(file.bytes(8, 8 + length), f"{path}: header")
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise CheckpointError(f"{path}: __metadata__ must map text to text")
    entries = {name: _parse_entry(file, name, value, 8 + length) for name, value in header.items()}
    _check_layout(path, entries, 8 + length, file.size)
    return entries, metadata


def _read_shards(folder: Path) -> dict[str, Entry]:
    """The tensors that an index names. Raises CheckpointError for one that lies in two shards, or in another one."""
    where = f"{folder / INDEX}"
    weight_map = _parse_json(_read_index(folder / INDEX), where).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{where}: no weight_map; it must map each tensor name to the file that holds it")
    for name, shard in weight_map.items():
        # A shard lies beside its index; anything else would let an index point anywhere on the disk.
        if not isinstance(shard, str) or not SHARD.fullmatch(shard):
            raise CheckpointError(f"{where}: {_short(name)} is in {_short(shard)}, which is not a plain file name")
    shards = dict.fromkeys(weight_map.values())
    if missing := sorted(shard for shard in shards if not (folder / shard).is_file()):
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(shards)} shards missing: {', '.join(missing[:3])}; download the rest"
        )
    entries: dict[str, Entry] = {}
    for shard in shards:
        for name, entry in _read_file(MappedFile(folder / shard))[0].items():
            if name in entries:
                raise CheckpointError(
                    f"{folder}: {_short(name)} is both in {entries[name].file.path.name} and in {shard}; "
                    "these shards belong to different models: download them again"
                )
            entries[name] = entry
    for name, shard in weight_map.items():
        if name not in entries or entries[name].file.path.name != shard:
            raise CheckpointError(f"{where}: {_short(name)} should be in {shard}, which does not hold it")
    return {name: entries[name] for name in weight_map}


def _read_index(path: Path) -> bytes:
    with open(path, "rb") as file:
        raw = file.read(MAX_HEADER_BYTES + 1)
    if len(raw) > MAX_HEADER_BYTES:
        raise CheckpointError(f"{path}: over {MAX_HEADER_BYTES} bytes; not an index of shards")
    return raw


def _parse_json(raw: bytes, where: str) -> dict[str, Any]:
    try:
        value = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{where}: not UTF-8 at byte {error.start}") from error
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise CheckpointError(f"{where}: not valid JSON: {reason}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: must be a JSON object, is {type(value).__name__}")
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"key {_short(twice)} appears twice")
    return result


def _no_constant(text: str) -> float:
    raise ValueError(f"{text} is not JSON")


def _parse_entry(file: MappedFile, name: str, value: Any, data: int) -> Entry:
    where = f"{file.path}: {_short(name)}"
    if not name.isprintable() or len(name) > MAX_NAME:
        raise CheckpointError(f"{where}: a tensor name is at most {MAX_NAME} printable characters")
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise CheckpointError(f"{where}: must have exactly dtype, shape and data_offsets")
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    if not isinstance(dtype, str) or dtype not in BITS:
        raise CheckpointError(f"{where}: unknown dtype {_short(dtype)}; known: {', '.join(BITS)}")
    if not _is_sizes(shape) or len(shape) > MAX_RANK:
        raise CheckpointError(f"{where}: shape {_short(shape)} is not a list of at most {MAX_RANK} sizes >= 0")
    # torch computes strides even of an empty tensor: the product of the other sizes must fit int64
    if math.prod(size for size in shape if size) >= 2**63:
        raise CheckpointError(f"{where}: shape {_short(shape)} is too large for any tensor")
    if not _is_sizes(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where}: data_offsets {_short(offsets)} are not [begin, end] with 0 <= begin <= end")
    begin, end = offsets
    if data + end > file.size:
        raise CheckpointError(
            f"{where}: data ends at byte {data + end}, the file at {file.size}; "
            "the file is truncated or its header wrong: download it again"
        )
    bits = math.prod(shape) * BITS[dtype]
    if bits != 8 * (end - begin):
        raise CheckpointError(f"{where}: {dtype} {shape} takes {bits / 8:g} bytes, data_offsets span {end - begin}")
    return Entry(file, dtype, tuple(shape), data + begin, data + end)


def _is_sizes(value: Any) -> bool:
    return isinstance(value, list) and all(type(size) is int and 0 <= size < 2**63 for size in value)


def _check_layout(path: Path, entries: dict[str, Entry], data: int, size: int) -> None:
    reached, before = data, "the header"
    for name, entry in sorted(entries.items(), key=lambda item: (item[1].start, item[1].stop)):
        if entry.start != reached:
            relation = "overlaps" if entry.start < reached else "leaves a gap after"
            raise CheckpointError(
                f"{path}: {_short(name)} starts at byte {entry.start} and {relation} {before}, which ends at {reached}"
            )
        reached, before = entry.stop, _short(name)
    if reached != size:
        raise CheckpointError(
            f"{path}: {size - reached} bytes after the last tensor belong to none; the header is wrong"
        )


def _short(value: object) -> str:
    """A value of a hostile file, safe to print on one line."""
    text = value if isinstance(value, str) and value.isprintable() else ascii(value)
    return text if len(text) <= 100 else text[:97] + "..."
