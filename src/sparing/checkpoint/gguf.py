"""Reading GGUF files: metadata, tensors under Hugging Face names, quantised blocks decoded piece by piece.

Layout of a file (little endian, version 2 or 3): `GGUF`, version u32, tensor count u64, metadata count u64; metadata
as key, type u32, value; tensor infos as name, rank u32, sizes u64 (fastest first), type u32, offset u64; padding to
`general.alignment`; data, to which the offsets count. A string is its length u64 and UTF-8 bytes.
Source: the GGUF document of ggml. The header is parsed here rather than by gguf.GGUFReader, which believes every
count it reads and takes seconds for a large vocabulary; block sizes and decoding are the gguf package's.
"""

import math
import struct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from sparing.checkpoint.gguf_config import ARCHITECTURES, generation_config, hf_config, hf_names
from sparing.checkpoint.source import Checkpoint
from sparing.checkpoint.tensors import PIECE_BYTES, MappedFile
from sparing.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from sparing.checkpoint.tokenizer import Tokenizer

__all__ = ["GGUFTensors", "open_gguf"]

NATIVE = {"F32": "F32", "F16": "F16", "BF16": "BF16"}
STRING, ARRAY = 8, 9
SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
MAX_DEPTH = 2


@dataclass(frozen=True)
class StoredTensor:
    """One tensor as the file has it; shape slowest first, `start` a byte offset into the file."""

    name: str
    kind: GGMLQuantizationType
    shape: tuple[int, ...]
    start: int
    nbytes: int


@dataclass(frozen=True)
class GGUFCheckpoint(Checkpoint):
    """A checkpoint in one GGUF file, its config spelled as Hugging Face would."""

    metadata: dict[str, Any]
    stored: "GGUFTensors"

    @property
    def tensors(self) -> "GGUFTensors":  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.stored

    @cached_property
    def tokenizer(self) -> "Tokenizer | None":
        if "tokenizer.ggml.tokens" not in self.metadata:
            return None
        from sparing.checkpoint.gguf_tokenizer import build_tokenizer

        return build_tokenizer(self.path, self.metadata, self.eos_ids)


def open_gguf(path: Path) -> GGUFCheckpoint:
    """Opens a GGUF file without reading its weights.

    Raises CheckpointError for a damaged or hostile header, an architecture or a quantisation that is not supported,
    and a file that is one part of several.
    """
    file = MappedFile(path)
    metadata, stored = read_header(file)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: GGUF architecture {str(architecture)[:80]!a} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    if (parts := metadata.get("split.count", 1)) not in (0, 1):
        raise CheckpointError(f"{path}: one of {str(parts)[:20]} parts; join them with gguf-split --merge first")
    shapes = {tensor.name: tensor.shape for tensor in stored}
    config = hf_config(path, metadata, file_floats(file, stored), shapes)
    tensors = GGUFTensors(file, stored, hf_names(path, config, shapes), config)
    return GGUFCheckpoint(path, config, generation_config(metadata), metadata, tensors)


class GGUFTensors:
    """The tensors of a GGUF file under Hugging Face names (a TensorSource).

    names: Hugging Face name -> names in the file, whose rows are joined expert by expert where there are two.
    Query and key rows of the llama architecture are stored for interleaved rotary pairs and are put back into the
    half-split order here.
    """

    def __init__(
        self, file: MappedFile, stored: list[StoredTensor], names: dict[str, tuple[str, ...]], config: dict[str, Any]
    ) -> None:
        by_name = {tensor.name: tensor for tensor in stored}
        self._file = file
        self._parts = {name: [by_name[part] for part in parts] for name, parts in names.items()}
        self._heads: dict[str, int] = {}
        if config["model_type"] == "llama":
            counts = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
            self._heads = {name: counts[name.split(".")[-2]] for name in names if name.split(".")[-2] in counts}
        for name, parts in self._parts.items():
            for part in parts:
                _check_decodable(f"{file.path}: {name}", part.kind)

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        first, *rest = self._entry(name)
        return (first.shape[0], first.shape[1] * 2, *first.shape[2:]) if rest else first.shape

    def dtype(self, name: str) -> str:
        return self._entry(name)[0].kind.name

    def file(self, name: str) -> Path:
        return self._file.path

    def is_mapped(self, name: str) -> bool:
        return len(self._entry(name)) == 1 and self.dtype(name) in NATIVE and name not in self._heads

    def read(self, name: str) -> "torch.Tensor":
        import torch

        if self.is_mapped(name):
            part = self._entry(name)[0]
            return self._file.tensor(part.start, part.shape, part.kind.name, f"{self._file.path.name}: {name}")
        pieces = list(self.pieces(name))
        return torch.cat(pieces).reshape(self.shape(name))

    def pieces(self, name: str) -> Iterator["torch.Tensor"]:
        import torch

        parts = self._entry(name)
        if name in self._heads:
            whole = torch.cat(list(self._rows(parts[0], 0, math.prod(parts[0].shape[:-1]))))
            yield half_split(whole.reshape(parts[0].shape), self._heads[name]).reshape(-1)
        elif len(parts) == 1:
            yield from self._rows(parts[0], 0, math.prod(parts[0].shape[:-1]))
        else:
            experts, rows = parts[0].shape[:2]
            for expert in range(experts):
                for part in parts:
                    yield from self._rows(part, expert * rows, (expert + 1) * rows)

    def stored(self, name: str) -> Iterator[memoryview]:
        for part in self._entry(name):
            yield from self._file.runs(part.start, part.start + part.nbytes)

    def release(self, name: str) -> None:
        for part in self._entry(name):
            self._file.release(part.start, part.start + part.nbytes)

    def _rows(self, part: StoredTensor, first: int, last: int) -> Iterator["torch.Tensor"]:
        """Rows [first, last) of a tensor, decoded and flattened, a few MiB at a time."""
        import torch

        width = part.shape[-1]
        row_bytes = part.nbytes // math.prod(part.shape[:-1])
        step = max(1, PIECE_BYTES // (4 * width))
        for begin in range(first, last, step):
            count = min(step, last - begin)
            start = part.start + begin * row_bytes
            if part.kind.name in NATIVE:
                yield self._file.tensor(start, (count * width,), part.kind.name, part.name)
            else:
                raw = np.frombuffer(self._file.buffer(), np.uint8, count * row_bytes, start)
                decoded = quants.dequantize(raw.reshape(count, row_bytes), part.kind)
                yield torch.from_numpy(decoded).reshape(-1)
            self._file.release(start, start + count * row_bytes)

    def _entry(self, name: str) -> list[StoredTensor]:
        if name not in self._parts:
            raise CheckpointError(
                f"{self._file.path}: {name}: no such tensor; the file holds {len(self._parts)} others"
            )
        return self._parts[name]


def half_split(stored: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows of a projection from interleaved rotary pairs (0, 1), (2, 3), ... to pairs (m, m + head_dim / 2).

    stored: [heads * head_dim, ...], a weight or a bias. Source: the permutation of llama.cpp's converter, inverted.
    """
    pairs = stored.reshape(heads, stored.shape[0] // heads // 2, 2, *stored.shape[1:])
    return pairs.transpose(1, 2).reshape(stored.shape)


def file_floats(file: MappedFile, stored: list[StoredTensor]) -> list[float] | None:
    """The factors by which a file stretches its rotary frequencies, None where it does not."""
    for tensor in stored:
        if tensor.name == "rope_freqs.weight" and tensor.kind.name == "F32":
            return np.frombuffer(file.buffer(), "<f4", math.prod(tensor.shape), tensor.start).tolist()
    return None


def _check_decodable(where: str, kind: GGMLQuantizationType) -> None:
    if kind.name in NATIVE:
        return
    _, size = GGML_QUANT_SIZES[kind]
    try:
        quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except (NotImplementedError, KeyError) as error:
        raise CheckpointError(
            f"{where}: quantised as {kind.name}, which the gguf package cannot decode; "
            "use a file of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1 or Q2_K to Q6_K"
        ) from error


class Cursor:
    """Reads values from front to back and never past the end."""

    def __init__(self, file: MappedFile) -> None:
        self.file = file
        self.position = 0

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

    def text(self) -> str:
        raw = self.take(self.number("Q"))
        try:
            return raw.decode("utf-8")
        except UnicodeDecodeError as error:
            raise CheckpointError(f"{self.file.path}: text at byte {self.position} is not UTF-8") from error

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
            if inner in SCALARS:
                code = SCALARS[inner]
                raw = self.take(count * struct.calcsize(code))
                return list(struct.unpack(f"<{count}{code}", raw))
            # take() ends the loop: every text or array is at least 8 bytes long
            return [self.value(inner, depth + 1) for _ in range(count)]
        raise CheckpointError(f"{self.file.path}: unknown metadata type {kind} at byte {self.position}")


def read_header(file: MappedFile) -> tuple[dict[str, Any], list[StoredTensor]]:
    """Metadata and tensors of a file. Raises CheckpointError, and nothing else, whatever the bytes are."""
    cursor = Cursor(file)
    if file.size < 4 or cursor.take(4) != b"GGUF":
        raise CheckpointError(f"{file.path}: does not begin with GGUF; not a GGUF file")
    version = cursor.number("I")
    if version not in (2, 3):
        raise CheckpointError(f"{file.path}: GGUF version {version}; versions 2 and 3, little endian, can be read")
    tensor_count, metadata_count = cursor.number("Q"), cursor.number("Q")
    metadata: dict[str, Any] = {}
    for _ in range(metadata_count):
        key = cursor.text()
        if key in metadata:
            raise CheckpointError(f"{file.path}: metadata key {key[:80]!a} appears twice")
        metadata[key] = cursor.value(cursor.number("I"))
    infos = [_read_info(cursor) for _ in range(tensor_count)]
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment <= 0 or alignment & (alignment - 1):
        raise CheckpointError(f"{file.path}: general.alignment {alignment!a} is not a power of two")
    data = cursor.position + -cursor.position % alignment
    stored = [_place(file, info, data) for info in infos]
    for before, after in pairwise(sorted(stored, key=lambda tensor: tensor.start)):
        if after.start < before.start + before.nbytes:
            raise CheckpointError(f"{file.path}: {after.name[:80]!a} overlaps {before.name[:80]!a}")
    if len({tensor.name for tensor in stored}) < len(stored):
        raise CheckpointError(f"{file.path}: a tensor name appears twice")
    return metadata, stored


def _read_info(cursor: Cursor) -> tuple[str, tuple[int, ...], int, int]:
    name, rank = cursor.text(), cursor.number("I")
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
    return StoredTensor(name, kind, shape, data + offset, nbytes)
