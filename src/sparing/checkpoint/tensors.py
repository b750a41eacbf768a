"""What a file of weights can do for the rest of the library, and the memory map under it.

Reading a tensor of a mapped file costs no memory of its own: the pages belong to the page cache until somebody
touches them, and `release` gives them back. Copying therefore walks through a tensor in small pieces and releases
each, so that loading a model needs hardly more memory than the model itself.
"""

import math
import mmap
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from sparing.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["PIECE_BYTES", "MappedFile", "TensorSource", "torch_dtype"]

PIECE_BYTES = 4 << 20

# safetensors' name of a type -> torch's; the sub-byte types have no plain torch tensor and are absent
TORCH_NAMES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E4M3FNUZ": "float8_e4m3fnuz",
    "F8_E5M2FNUZ": "float8_e5m2fnuz",
    "F8_E8M0": "float8_e8m0fnu",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
}


class TensorSource(Protocol):
    """Named tensors of a checkpoint, under the names and in the layout of a Hugging Face checkpoint."""

    def names(self) -> list[str]:
        """Every tensor name, in file order."""
        ...

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor; reads nothing."""
        ...

    def dtype(self, name: str) -> str:
        """Stored type as the file spells it: `BF16`, `F32`, `I64`, `Q4_1`, ...; reads nothing."""
        ...

    def file(self, name: str) -> Path:
        """The file that holds a tensor, for error messages."""
        ...

    def is_mapped(self, name: str) -> bool:
        """True where `read`, or `rows` of what is quantised, gives a view of the file rather than a copy."""
        ...

    def read(self, name: str) -> "torch.Tensor":
        """The whole tensor on the CPU: a memory-mapped view in the stored type, or float32 where it was quantised.

        Writing into a view changes neither the file nor later reads of other processes; treat it as read-only.
        """
        ...

    def rows(self, name: str) -> "torch.Tensor":
        """The bytes that `read` makes its rows of: uint8 [..., bytes of a row], a view of the file where it can be."""
        ...

    def pieces(self, name: str) -> Iterator["torch.Tensor"]:
        """The flattened tensor as consecutive one-dimensional runs of a few MiB, each released after its turn."""
        ...

    def stored(self, name: str) -> Iterator[memoryview]:
        """The bytes of a tensor as the file holds them, in runs of a few MiB, each released after its turn."""
        ...

    def release(self, name: str) -> None:
        """Tells the kernel that the pages of a tensor are not needed for now; a later read brings them back."""
        ...


def torch_dtype(name: str, where: str = "tensor") -> "torch.dtype":
    """The torch type of a stored type's name.

    Raises CheckpointError where torch has no plain tensor of that type.
    """
    import torch

    if name not in TORCH_NAMES:
        raise CheckpointError(
            f"{where}: stored as {name}, which cannot be read as a tensor; readable: {', '.join(TORCH_NAMES)}"
        )
    return getattr(torch, TORCH_NAMES[name])


class MappedFile:
    """A file mapped into memory, private to this process: writes go to a copy of the page, never to the file."""

    def __init__(self, path: Path) -> None:
        self.path = path
        if path.exists() and not path.is_file():  # a pipe would be waited for without end
            raise CheckpointError(f"{path}: cannot be read: is no regular file")
        try:
            with open(path, "rb") as file:
                self.size = file.seek(0, 2)
                self._map = _map_private(file.fileno()) if self.size else b""
        except OSError as error:
            raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error

    def bytes(self, start: int, stop: int) -> bytes:
        return self._map[start:stop]

    def runs(self, start: int, stop: int) -> Iterator[memoryview]:
        """The bytes between two offsets, a few MiB at a time, each released after its turn."""
        for begin in range(start, stop, PIECE_BYTES):
            end = min(begin + PIECE_BYTES, stop)
            yield memoryview(self._map)[begin:end]
            self.release(begin, end)

    def buffer(self) -> "mmap.mmap | bytes":
        return self._map

    def tensor(self, start: int, shape: tuple[int, ...], dtype: str, where: str) -> "torch.Tensor":
        """A view of the bytes from `start` on; a copy only where the file does not align them to their type."""
        import torch

        kind = torch_dtype(dtype, where)
        count = math.prod(shape)
        if count == 0:
            return torch.empty(shape, dtype=kind)
        source, offset = self._map, start
        if start % kind.itemsize:
            source, offset = bytearray(self._map[start : start + count * kind.itemsize]), 0
        return torch.frombuffer(source, dtype=kind, count=count, offset=offset).reshape(shape)

    def release(self, start: int, stop: int) -> None:
        """Drops the whole pages between two byte offsets from this process; the page cache keeps them."""
        if isinstance(self._map, bytes) or not hasattr(mmap, "MADV_DONTNEED"):
            return
        start -= start % mmap.PAGESIZE
        if stop > start:
            self._map.madvise(mmap.MADV_DONTNEED, start, stop - start)


def _map_private(descriptor: int) -> mmap.mmap:
    if sys.platform == "linux":
        # Without MAP_NORESERVE (0x4000; the mmap module does not name it before 3.13) the kernel refuses a private
        # mapping larger than memory and swap together, although its pages are only ever read.
        flags = mmap.MAP_PRIVATE | 0x4000
        return mmap.mmap(descriptor, 0, flags=flags, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    return mmap.mmap(descriptor, 0, access=mmap.ACCESS_COPY)
