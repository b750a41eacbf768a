"""Writing checkpoints: whole files or none.

Every file is written beside its final place under a temporary name, flushed to the disk and then renamed, so that a
crash, a full disk or Ctrl-C leaves the old file or the new one, never a half.
"""

import json
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sparing.checkpoint.safetensors import BITS, INDEX, SINGLE
from sparing.checkpoint.tensors import TORCH_NAMES
from sparing.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from sparing.checkpoint.tokenizer import Tokenizer

__all__ = [
    "StreamWriter",
    "folder_to_fill",
    "replacing",
    "save_safetensors",
    "save_tokenizer",
    "save_weights",
    "write_config",
    "write_json",
]

INFINITIES = ("inf", "-inf", "Infinity", "-Infinity")


@contextmanager
def replacing(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that takes its place at `path` when the block ends without an exception.

    Raises CheckpointError naming the file and the reason where the disk is full or the folder not writable; the
    temporary file is removed and what was at `path` stays.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        _sync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise CheckpointError(
            f"{path}: cannot be written: {error.strerror or error}; nothing was changed. "
            "Free some space or choose another folder"
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def folder_to_fill(path: Path | str) -> Iterator[Path]:
    """A folder, made where it is missing, and removed again if the block fails before anything is in it.

    So are the folders above it that were made on the way.
    Raises CheckpointError naming the folder and the reason where it cannot be made.
    """
    path = Path(path)
    made = [folder for folder in (path, *path.parents) if not folder.exists()]
    try:
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{path}: cannot be made: {reason}; choose another folder") from error
        yield path
    except BaseException:
        for folder in made:
            with suppress(OSError):  # it holds something, or could not be made
                folder.rmdir()
        raise


def write_json(path: Path | str, value: Any) -> None:
    """Writes a value as indented JSON, atomically.

    Raises ValueError for NaN and infinities, which JSON does not have, and CheckpointError as `replacing` does.
    """
    text = json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    with replacing(path) as file:
        file.write(text.encode("utf-8"))


def write_config(folder: Path | str, config: Mapping[str, Any]) -> None:
    """Writes config.json into a folder, infinite numbers in the one spelling that transformers reads.

    That is `{"__float__": "Infinity"}`; a Python float, or the text "inf" in a list of numbers, becomes it.
    Raises as `write_json` does.
    """
    write_json(Path(folder) / "config.json", _spelled_out(config))


def _spelled_out(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _spelled_out(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        has_numbers = any(isinstance(item, int | float) for item in value)
        return [_spelled_out(float(item) if has_numbers and item in INFINITIES else item) for item in value]
    if isinstance(value, float) and math.isinf(value):
        return {"__float__": "Infinity" if value > 0 else "-Infinity"}
    return value


def save_tokenizer(folder: Path | str, tokenizer: "Tokenizer") -> None:
    """Writes tokenizer.json and tokenizer_config.json into a folder, as `read_tokenizer` reads them.

    Which ids end a text is not in them: that is part of generation_config.json. Raises as `replacing` does.
    """
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    config |= tokenizer.special_tokens
    template = tokenizer.chat_template
    if template is not None:
        config["chat_template"] = template.source
        if template.tool_use is not None:
            named = {"default": template.source, "tool_use": template.tool_use}
            config["chat_template"] = [{"name": name, "template": text} for name, text in named.items()]
    with replacing(Path(folder) / "tokenizer.json") as file:
        file.write(tokenizer.backend.to_str(pretty=True).encode("utf-8"))
    write_json(Path(folder) / "tokenizer_config.json", config)


def save_safetensors(
    path: Path | str, tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes tensors to one safetensors file, atomically; equal tensors give equal bytes whatever their order.

    tensors: any device, one at a time is brought to the CPU. metadata: text to text; `{"format": "pt"}` is added.
    Raises ValueError for a type the format cannot hold, and CheckpointError as `replacing` does.
    """
    with replacing(path) as file:
        _write_tensors(file, tensors, metadata)


def save_weights(
    folder: Path | str,
    tensors: Mapping[str, "torch.Tensor"],
    *,
    max_shard_bytes: int = 5_000_000_000,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Writes a model's weights into a folder: one file if they fit into `max_shard_bytes`, else shards and an index.

    No file takes its place before all are written; weights of an earlier save that were not replaced are removed.
    Raises as `save_safetensors` does.
    """
    folder = Path(folder)
    shards = _split(tensors, max_shard_bytes)
    names = (
        [SINGLE]
        if len(shards) == 1
        else [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    )
    with folder_to_fill(folder), ExitStack() as stack:
        # Opened in reverse: an ExitStack closes the last first, so the index takes its place after all its shards.
        if len(shards) > 1:
            total = sum(tensor.nbytes for tensor in tensors.values())
            where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
            stack.enter_context(replacing(folder / INDEX)).write((json.dumps(index, indent=2) + "\n").encode())
        for name, shard in zip(names, shards, strict=True):
            file = stack.enter_context(replacing(folder / name))
            _write_tensors(file, shard, metadata)
            file.flush()
            os.fsync(file.fileno())  # a full disk shows itself here, before the first rename
    kept = {*names, INDEX} if len(shards) > 1 else set(names)
    for old in [folder / INDEX, folder / SINGLE, *folder.glob("model-*-of-*.safetensors")]:
        if old.name not in kept:
            old.unlink(missing_ok=True)


def _split(tensors: Mapping[str, "torch.Tensor"], limit: int) -> list[dict[str, "torch.Tensor"]]:
    shards: list[dict[str, torch.Tensor]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > limit:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.nbytes
    return shards


def _write_tensors(file: IO[bytes], tensors: Mapping[str, "torch.Tensor"], metadata: Mapping[str, str] | None) -> None:
    import torch

    stored = {getattr(torch, name): stored for stored, name in TORCH_NAMES.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in stored:
            raise ValueError(f"{name}: safetensors cannot hold {tensor.dtype}; convert it first")
    writer = StreamWriter(file, {n: (stored[t.dtype], tuple(t.shape)) for n, t in tensors.items()}, metadata)
    for name in writer.order:
        writer.put(name, tensors[name])


class StreamWriter:
    """A safetensors file whose tensors are written one after the other, or piece by piece, in any order.

    layout: name -> (stored type as of the format, shape) of every tensor; metadata: as of `save_safetensors`.
    """

    def __init__(
        self,
        file: IO[bytes],
        layout: Mapping[str, tuple[str, tuple[int, ...]]],
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        # Wide types first: then every tensor starts at a multiple of its own item size.
        self.order = sorted(layout, key=lambda name: (-BITS[layout[name][0]], name))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        ends, offset = {}, 0
        for name in self.order:
            dtype, shape = layout[name]
            end = offset + math.prod(shape) * BITS[dtype] // 8
            header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
            ends[name], offset = (offset, end), end
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode("utf-8")
        text += b" " * (-len(text) % 8)
        file.write(len(text).to_bytes(8, "little") + text)
        start = 8 + len(text)
        self._file, self._end = file, start + offset
        self._next = {name: (start + begin, start + end) for name, (begin, end) in ends.items()}

    def put(self, name: str, piece: "torch.Tensor") -> None:
        """Write a tensor, or its next piece."""
        import torch

        flat = piece.detach().cpu().contiguous().reshape(-1)
        if flat.stride(0) != 1:  # a lone number counts as contiguous whatever its stride, and cannot be seen as bytes
            flat = flat.clone(memory_format=torch.contiguous_format)
        flat = flat.view(torch.uint8)
        begin, end = self._next[name]
        if begin + len(flat) > end:
            raise ValueError(f"{name}: {begin + len(flat) - end} bytes too many")
        self._file.seek(begin)
        self._file.write(flat.numpy().data)
        self._next[name] = (begin + len(flat), end)

    def close(self) -> None:
        """Check that every tensor is whole. Raises ValueError naming one that is not."""
        for name, (begin, end) in self._next.items():
            if begin != end:
                raise ValueError(f"{name}: {end - begin} bytes are missing")


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut; only POSIX can open a folder."""
    if os.name == "posix":
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
