"""Writing checkpoints: whole files or none.

Every file is written beside its final place under a temporary name, flushed to the disk and then renamed, so that a
crash, a full disk or Ctrl-C leaves the old file or the new one, never a half. A temporary name is nobody else's, and
its file is locked: what a killed process left is recognised by its lock being free, and removed by the next to write.
"""

import errno
import itertools
import json
import math
import os
import re
import stat
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from sparing.checkpoint.lock import holding, is_at, locked
from sparing.checkpoint.safetensors import INDEX, SINGLE
from sparing.checkpoint.stream import StreamWriter
from sparing.checkpoint.tensors import TORCH_NAMES
from sparing.errors import CheckpointError

if TYPE_CHECKING:
    import torch

    from sparing.checkpoint.tokenizer import Tokenizer

__all__ = [
    "check_writable",
    "config_bytes",
    "file_at",
    "folder_to_fill",
    "json_bytes",
    "remove_leftovers",
    "replacing",
    "replacing_together",
    "save_safetensors",
    "save_tokenizer",
    "save_weights",
    "write_config",
    "write_json",
]

INFINITIES = ("inf", "-inf", "Infinity", "-Infinity")
LEFTOVER = re.compile(r"\.(.+)\.[0-9a-f]+\.part", re.DOTALL)  # of a file of this name, the temporary one
KINDS = {stat.S_IFDIR: "a folder", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


@contextmanager
def replacing(path: Path | str) -> Iterator[IO[bytes]]:
    """A binary file that takes its place at `path` when the block ends without an exception.

    The mode of a file that was there is kept, and of a symbolic link the target is written.
    Raises CheckpointError naming the file and the reason where the disk is full, the folder not writable, or something
    at `path` that is not a file, such as a device; the temporary file is removed and what was at `path` stays.
    """
    with replacing_together() as opened:
        yield opened(path)


def check_writable(path: Path | str) -> None:
    """Finds out whether `replacing` could write a file, before long work on what goes into it.

    Raises CheckpointError as that does; changes nothing.
    """
    _Pending(Path(path)).drop()


@contextmanager
def replacing_together(removed: Sequence[Path] = ()) -> Iterator[Callable[[Path | str], IO[bytes]]]:
    """Opens files as `replacing` does, which all take their places when the block ends, in the order of opening.

    All are on the disk before the first takes its place. removed: files that go just before that, such as a
    config.json, without which nobody takes a folder that was left half way for a whole one.
    """
    pending: list[_Pending] = []

    def opened(path: Path | str) -> IO[bytes]:
        pending.append(_Pending(Path(path)))
        return pending[-1].file

    try:
        try:
            yield opened
        except OSError as error:
            # What names a file of its own, or a pipe nobody reads, is not a fault of the file that is being written.
            if not pending or error.filename is not None or isinstance(error, BrokenPipeError):
                raise
            with _explained(pending[-1].path):
                raise
        for each in pending:
            each.settle()
        for path in removed:
            with _explained(path):
                path.unlink(missing_ok=True)
        for each in pending:
            each.place(first=each is pending[0] and not removed)
    finally:
        for each in pending:
            each.drop()


class _Pending:
    """A file on its way to `path`."""

    def __init__(self, path: Path) -> None:
        self.path, self.is_placed = path, False
        with _explained(path):
            old = file_at(path)
            # A link stays a link, and what it points to is replaced.
            self.target = Path(os.path.realpath(path))
            if old is not None and not os.access(self.target, os.W_OK):
                raise PermissionError(errno.EACCES, "it is write-protected")
            remove_leftovers(self.target.parent, self.target.name)
            self.temporary, descriptor = _create(self.target, 0o666 if old is None else 0o600)
            self.file: IO[bytes] = open(descriptor, "wb")  # noqa: SIM115 (closed by drop)
            if old is not None:
                with suppress(OSError):  # only root gives files away, and some disks know no modes
                    os.chown(descriptor, old.st_uid, old.st_gid)
                with suppress(OSError):
                    os.chmod(descriptor, stat.S_IMODE(old.st_mode))

    def settle(self) -> None:
        """Bring everything to the disk."""
        with _explained(self.path):
            self.file.flush()
            os.fsync(self.file.fileno())

    def place(self, first: bool) -> None:
        """Give the file its name. first: whether nothing was changed before."""
        with _explained(self.path, "nothing was changed" if first else "the folder is not complete now"):
            os.replace(self.temporary, self.target)
        self.is_placed = True
        with _explained(self.path, "it may be lost if the power fails"):
            _sync_folder(self.target.parent)

    def drop(self) -> None:
        """Close the file, and remove it if it has not taken its place. Whatever went wrong before is what counts."""
        if not self.is_placed:
            with suppress(OSError):
                self.temporary.unlink()
        with suppress(OSError):
            self.file.close()


@contextmanager
def _explained(path: Path, outcome: str = "nothing was changed") -> Iterator[None]:
    """Turns what the system says about a file into a CheckpointError that says what to do."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or error
        raise CheckpointError(
            f"{path}: cannot be written: {reason}; {outcome}. Free some space or choose another folder"
        ) from error


def file_at(path: Path) -> os.stat_result | None:
    """The file at a path, None where nothing is. Raises CheckpointError for what is not a file."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    if not stat.S_ISREG(found.st_mode):
        kind = KINDS.get(stat.S_IFMT(found.st_mode), "a device")
        raise CheckpointError(f"{path}: is {kind}, not a file; nothing was changed. Choose another name")
    return found


def _create(target: Path, mode: int) -> tuple[Path, int]:
    """A new file beside the target, open for writing and locked."""
    while True:
        temporary = target.with_name(f".{_stem(target.name)}.{os.urandom(8).hex()}.part")
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, mode)
        # Another may take it for a leftover in the instant before it is locked, and hold the lock while it removes it.
        if locked(descriptor) is not False and is_at(descriptor, temporary):
            return temporary, descriptor
        os.close(descriptor)


def _stem(name: str) -> str:
    """As much of a file's name as leaves room for the rest of a temporary one."""
    return os.fsdecode(os.fsencode(name)[:200])


def remove_leftovers(folder: Path, name: str | None = None) -> None:
    """Removes the temporary files that killed processes left in a folder; those of running ones are locked and stay.

    name: only those of a file of this name.
    """
    with os.scandir(folder) as entries:
        found = [entry.path for entry in entries if _is_leftover(entry, name)]
    for path in found:
        with suppress(OSError):
            descriptor = os.open(path, os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
            try:
                if locked(descriptor):
                    os.unlink(path)
            finally:
                os.close(descriptor)


def _is_leftover(entry: "os.DirEntry[str]", name: str | None) -> bool:
    found = LEFTOVER.fullmatch(entry.name)
    return found is not None and (name is None or found[1] == _stem(name)) and entry.is_file(follow_symlinks=False)


@contextmanager
def folder_to_fill(path: Path | str) -> Iterator[Path]:
    """A folder, made where it is missing, and removed again if the block fails before anything is in it.

    So are the folders above it that were made on the way.
    Raises CheckpointError naming the folder and the reason where it cannot be made.
    """
    path = Path(path)
    made = [folder for folder in (path, *path.parents) if not os.path.lexists(folder)]
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


def json_bytes(value: Any) -> bytes:
    """A value as indented JSON. Raises ValueError for NaN and infinities, which JSON does not have."""
    return (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")


def config_bytes(config: Mapping[str, Any]) -> bytes:
    """What config.json holds, infinite numbers in the one spelling that transformers reads.

    That is `{"__float__": "Infinity"}`; a Python float, or the text "inf" in a list of numbers, becomes it.
    Raises as `json_bytes` does.
    """
    return json_bytes(_spelled_out(config))


def write_json(path: Path | str, value: Any) -> None:
    """Writes a value as `json_bytes` spells it, atomically. Raises ValueError as that does, and as `replacing` does."""
    text = json_bytes(value)
    with replacing(path) as file:
        file.write(text)


def write_config(folder: Path | str, config: Mapping[str, Any]) -> None:
    """Writes config.json into a folder as `config_bytes` spells it. Raises as `write_json` does."""
    text = config_bytes(config)
    with replacing(Path(folder) / "config.json") as file:
        file.write(text)


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
    beside: Mapping[str, bytes] | None = None,
) -> None:
    """Writes a model's weights into a folder: one file if they fit into `max_shard_bytes`, else shards and an index.

    beside: other files, by name, which take their places after the weights in this order; config.json should be last,
    and an older one goes before any of them comes, so that the folder is whole or does not load.
    No file takes its place before all are written, and shards none that is in use; weights of an earlier save are
    removed when the index no longer names them.
    Raises as `save_safetensors` does, and CheckpointError naming the process that is writing into the folder.
    """
    folder, beside = Path(folder), beside or {}
    shards = _split(tensors, max_shard_bytes)
    with folder_to_fill(folder), holding(folder):
        remove_leftovers(folder)
        names = _free_names(folder, len(shards))
        removed = [folder / "config.json"] if "config.json" in beside else []
        if removed and len(shards) > 1:
            removed.append(folder / SINGLE)  # which would be read instead of the shards
        with replacing_together(removed) as opened:
            for name, shard in zip(names, shards, strict=True):
                _write_tensors(opened(folder / name), shard, metadata)
            if len(shards) > 1:
                total = sum(tensor.nbytes for tensor in tensors.values())
                where = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
                index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(where.items()))}
                opened(folder / INDEX).write(json_bytes(index))
            for name, content in beside.items():
                opened(folder / name).write(content)
        kept = {*names, INDEX} if len(shards) > 1 else set(names)
        for old in [folder / INDEX, folder / SINGLE, *folder.glob("model-*-of-*.safetensors")]:
            if old.name not in kept:
                old.unlink(missing_ok=True)


def _free_names(folder: Path, count: int) -> list[str]:
    """Names of shards, none of which an index that lies there can be about."""
    if count == 1:
        return [SINGLE]
    for version in itertools.count():
        prefix = f"model-v{version}" if version else "model"
        names = [f"{prefix}-{i + 1:05}-of-{count:05}.safetensors" for i in range(count)]
        if not any(os.path.lexists(folder / name) for name in names):
            return names
    raise AssertionError("unreachable")


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


def _sync_folder(folder: Path) -> None:
    """Makes a rename survive a power cut, where folders can be opened and flushed."""
    if os.name != "posix":
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except PermissionError:  # may be written but not listed
        return
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)
