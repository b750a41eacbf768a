"""A safetensors file written piece by piece."""

import json
import math
from collections.abc import Mapping
from typing import IO, TYPE_CHECKING, Any

from sparing.checkpoint.safetensors import BITS

if TYPE_CHECKING:
    import torch

__all__ = ["StreamWriter"]


class StreamWriter:
    """A safetensors file whose tensors are written one after the other, or piece by piece, in any order.

    layout: name -> (type as the format names it, shape) of every tensor; metadata: as in `save_safetensors`.
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
