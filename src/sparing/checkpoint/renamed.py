"""A checkpoint under other names, and matrices of experts that it holds in two halves."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from sparing.checkpoint.tensors import TensorSource
from sparing.errors import CheckpointError

if TYPE_CHECKING:
    import torch

__all__ = ["FLOATS", "GATE", "JoinedGates", "Renamed"]

FLOATS = ("F32", "BF16", "F16")
GATE = re.compile(r"(.*\.experts\.\d+)\.gate_proj\.weight")


class Renamed:
    """The tensors of a source under the names of another dialect (a TensorSource). name_of: theirs -> ours.

    Raises CheckpointError where two tensors would have one name.
    """

    def __init__(self, source: TensorSource, name_of: Callable[[str], str]) -> None:
        self._source = source
        self._stored: dict[str, str] = {}
        for stored in source.names():
            name = name_of(stored)
            if name in self._stored:
                raise CheckpointError(
                    f"{source.file(stored).name}: {stored} and {self._stored[name]} are one tensor under two names"
                )
            self._stored[name] = stored

    def names(self) -> list[str]:
        return list(self._stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._source.shape(self._stored[name])

    def dtype(self, name: str) -> str:
        return self._source.dtype(self._stored[name])

    def file(self, name: str) -> Path:
        return self._source.file(self._stored[name])

    def is_mapped(self, name: str) -> bool:
        return self._source.is_mapped(self._stored[name])

    def read(self, name: str) -> "torch.Tensor":
        return self._source.read(self._stored[name])

    def rows(self, name: str) -> "torch.Tensor":
        return self._source.rows(self._stored[name])

    def pieces(self, name: str) -> Iterator["torch.Tensor"]:
        yield from self._source.pieces(self._stored[name])

    def stored(self, name: str) -> Iterator[memoryview]:
        yield from self._source.stored(self._stored[name])

    def release(self, name: str) -> None:
        self._source.release(self._stored[name])


class JoinedGates:
    """Experts one by one whose gate and up are two matrices, as models hold them: the rows of the gate above those of
    up, under `experts.3.gate_up_proj.weight` (a TensorSource). Packed ones are joined where they are read."""

    def __init__(self, source: TensorSource) -> None:
        self._source = source
        present, self._halves, hidden = set(source.names()), dict[str, tuple[str, str]](), set[str]()
        for gate in source.names():
            match = GATE.fullmatch(gate)
            up = f"{match[1]}.up_proj.weight" if match else ""
            if match is None or up not in present or source.dtype(gate) not in FLOATS:
                continue
            if (source.dtype(gate), source.shape(gate)) == (source.dtype(up), source.shape(up)):
                self._halves[f"{match[1]}.gate_up_proj.weight"] = gate, up
                hidden.update((gate, up))
        self._names = [name for name in source.names() if name not in hidden] + list(self._halves)

    def names(self) -> list[str]:
        return self._names

    def _parts(self, name: str) -> tuple[str, ...]:
        return self._halves.get(name, (name,))

    def shape(self, name: str) -> tuple[int, ...]:
        parts = self._parts(name)
        shape = self._source.shape(parts[0])
        return shape if len(parts) == 1 else (2 * shape[0], *shape[1:])

    def dtype(self, name: str) -> str:
        return self._source.dtype(self._parts(name)[0])

    def file(self, name: str) -> Path:
        return self._source.file(self._parts(name)[0])

    def is_mapped(self, name: str) -> bool:
        return name not in self._halves and self._source.is_mapped(name)

    def read(self, name: str) -> "torch.Tensor":
        import torch

        parts = [self._source.read(part) for part in self._parts(name)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def rows(self, name: str) -> "torch.Tensor":
        import torch

        parts = [self._source.rows(part) for part in self._parts(name)]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def pieces(self, name: str) -> Iterator["torch.Tensor"]:
        for part in self._parts(name):
            yield from self._source.pieces(part)

    def stored(self, name: str) -> Iterator[memoryview]:
        for part in self._parts(name):
            yield from self._source.stored(part)

    def release(self, name: str) -> None:
        for part in self._parts(name):
            self._source.release(part)
