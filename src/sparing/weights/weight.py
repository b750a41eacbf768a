"""A weight in few bits that knows how to multiply: what a `Linear` or a stack of experts holds in place of a matrix.

It stays packed: products with few rows decode it in registers (`kernels/cpu/packed.hpp`, `kernels/gpu/packed.py`),
products with many dequantise it tile by tile. Formats differ in `pack` and `unpack`, or `encode` and `decode` where
rows share more; blocks of GGUF files are only ever read.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sparing.config.formats import BLOCKS, FORMATS
from sparing.kernels import dispatch
from sparing.kernels.products import arithmetic_dtype, linear
from sparing.kernels.shapes import expect, misfit

__all__ = ["PackedWeight", "empty_packed", "largest_magnitudes", "packed_class"]

NATIVE_TILE_BYTES = 4 << 20
TILE_BYTES = 1 << 20  # of dequantised rows: stays in cache between its making and its use
GPU_TILE_BYTES = 64 << 20  # where launches are what costs
TILE_ROWS = 128  # tiles start at multiples of it, as the blocks of two-dimensional scales do

Empty = Callable[..., Tensor]  # called as torch.empty

CLASSES = {
    "int8": ("integer", "Int8Weight"),
    "int4": ("integer", "Int4Weight"),
    "nvfp4": ("nvfp4", "NVFP4Weight"),
    "mxfp4": ("mxfp4", "MXFP4Weight"),
    "fp8": ("fp8", "FP8Weight"),
}


class PackedWeight(nn.Module):
    """A matrix [out, in], or a stack of them [experts, out, in], in few bits.

    Its tensors are buffers named as in `formats.FORMATS`; `shape` is that of the matrix they stand for, `dtype` the
    type of rows that are looked up. Products are of the type of what is multiplied.
    """

    format: ClassVar[str]
    pack: ClassVar[Callable[[Tensor], tuple[Tensor, Tensor]]]  # float32 rows [n, in] -> codes, scale
    unpack: ClassVar[Callable[[Tensor, Tensor], Tensor]]  # and back
    per_byte: ClassVar[int] = 1  # numbers in an element of `codes`
    native_rows: ClassVar[int] = 8  # of x; above it products of dequantised tiles are faster
    whole_parts: ClassVar[tuple[str, ...]] = ()  # parts that all rows of a matrix share
    has_gpu_kernel: ClassVar[bool] = True

    codes: Tensor
    scale: Tensor

    def __init__(self, **parts: Tensor):
        super().__init__()
        self.dtype = torch.float32
        for name, part in parts.items():
            self.register_buffer(name, part)
        self._matrices: list[PackedWeight] | None = None
        self._stacks: dict[int, PackedWeight | Tensor] = {}
        self._native: dict[str, Any] | None = None

    def fill(
        self,
        tiles: Callable[[], Iterator[Tensor]],
        watch: Callable[[Tensor, Tensor], None] | None = None,
        amax: Callable[[], Tensor] | None = None,
        scales: str | None = None,
    ) -> None:
        """Quantise all rows, tile by tile.

        tiles: called once or twice, yields the rows in order as float32 [n, in]; where rows share a scale, a tile
        starts at a multiple of as many. watch: called with every tile of a matrix and what it became. amax: called
        where all rows of a matrix share a scale, finds [matrices] magnitudes to scale by; None: the rows' largest.
        scales: of `Format.scales`, as the weight was made with.
        """
        *stack, out, _ = self.shape
        count = math.prod(stack)
        whole = self.whole(amax or (lambda: largest_magnitudes(tiles, count)), scales)
        for name, value in whole.items():
            self.get_buffer(name).view(-1).copy_(value)
        row = 0
        for tile in tiles():
            for rows in tile.tensor_split(tuple(range(out - row % out, len(tile), out))):
                matrix, start = divmod(row, out)
                shared = {name: value[matrix] for name, value in whole.items()}
                encoded = self.encode(rows, scales, **shared)
                target = (self[matrix] if stack else self).rows(start, start + len(rows))
                for name, value in encoded.items():
                    target[name].copy_(value)
                if watch is not None:
                    watch(rows, self.decode({**encoded, **shared}))
                row += len(rows)

    def empty_like(
        self, device: torch.device | str, count: int | None = None, empty: Empty = torch.empty
    ) -> PackedWeight:
        """Room for a weight like this one, or for a stack of `count`; empty: makes its tensors."""
        stack = () if count is None else (count,)
        parts = self.named_buffers()
        return type(self)(**{n: empty((*stack, *b.shape), dtype=b.dtype, device=device) for n, b in parts})

    def copy_(self, other: PackedWeight) -> bool:
        """Take over another's numbers; False, and nothing done, where its tensors are not of the same kind."""
        parts = list(zip(self.named_buffers(), other.named_buffers(), strict=True))
        if type(self) is not type(other) or any(a.shape != b.shape or a.dtype != b.dtype for (_, a), (_, b) in parts):
            return False
        for (_, mine), (_, theirs) in parts:
            mine.copy_(theirs)
        return True

    @classmethod
    def encode(cls, rows: Tensor, scales: str | None = None, **whole: Tensor) -> dict[str, Tensor]:
        """The parts of float32 rows [n, in], except those that all rows share, which are given as []."""
        codes, scale = cls.pack(rows)
        return {"codes": codes, "scale": scale}

    @classmethod
    def decode(cls, parts: Mapping[str, Tensor]) -> Tensor:
        """float32 [n, in] of the parts of n rows."""
        return cls.unpack(parts["codes"], parts["scale"])

    @classmethod
    def whole(cls, amax: Callable[[], Tensor], scales: str | None = None) -> dict[str, Tensor]:
        """The parts that all rows of a matrix share, [matrices]; amax: finds the matrices' largest magnitudes."""
        return {}

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] * self.per_byte))

    @property
    def device(self) -> torch.device:
        return self.codes.device

    @property
    def ndim(self) -> int:
        return self.codes.ndim

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.buffers())

    def __len__(self) -> int:
        return len(self.codes)

    def __getitem__(self, index: int) -> PackedWeight:
        """One matrix of a stack, without a copy."""
        if self._matrices is None:
            parts = dict(self.named_buffers())
            self._matrices = [type(self)(**{n: part[i] for n, part in parts.items()}) for i in range(len(self))]
        return self._matrices[index]

    def stacked(self, groups: int) -> PackedWeight | Tensor:
        """A matrix as a stack [groups, out / groups, in] of its rows, without a copy.

        Where rows of two groups share a scale it is dense, in the weight's dtype.
        """
        if (found := self._stacks.get(groups)) is None:
            out = self.shape[0]
            parts: dict[str, Tensor] = {}
            for name, part in self.named_buffers():
                if part.ndim == 0:  # one for all rows
                    parts[name] = part.expand(groups).contiguous()
                elif len(part) == out or (out // groups) % TILE_ROWS == 0:
                    parts[name] = part.unflatten(0, (groups, -1))
            if len(parts) == len(dict(self.named_buffers())):
                found = type(self)(**parts)
                found.dtype = self.dtype
            else:
                found = self.dequantize().to(self.dtype).unflatten(0, (groups, -1))
            self._stacks[groups] = found
        return found

    def rows(self, start: int, stop: int) -> dict[str, Tensor]:
        """The parts of some rows of a matrix, as views; start is a multiple of the rows that share a scale."""
        return {n: part if n in self.whole_parts else part[start:stop] for n, part in self.named_buffers()}

    def look_up(self, ids: Tensor) -> Tensor:
        """The rows of these ids in the weight's dtype: [..., in] for int64 [...]."""
        flat = ids.flatten()
        parts = {n: part if n in self.whole_parts else part[flat] for n, part in self.named_buffers()}
        return self.decode(parts).to(self.dtype).view(*ids.shape, -1)

    def dequantize(self) -> Tensor:
        """float32, in the weight's shape."""
        return torch.cat(list(self.tiles(self.codes.numel() * 8))).view(self.shape)

    def tiles(self, nbytes: int = TILE_BYTES) -> Iterator[Tensor]:
        """All rows in order as float32 [n, in], of about `nbytes` bytes."""
        if self.ndim > 2:
            for i in range(len(self)):
                yield from self[i].tiles(nbytes)
            return
        out, size = self.shape
        step = max(1, nbytes // (4 * size * TILE_ROWS)) * TILE_ROWS
        for start in range(0, out, step):
            yield self.decode(self.rows(start, min(start + step, out)))

    def matmul(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """`x @ weight^T + bias` in x's type: [..., out] for x [..., in]; memory grows by one tile.

        Raises ValueError for other shapes.
        """
        out, size = self.shape
        if size != x.shape[-1]:
            raise misfit("weight", self, out, x.shape[-1])
        if bias is not None:
            expect("bias", bias, out)
        gpu = dispatch.on_gpu("packed", x, bias) if self.has_gpu_kernel else None
        if gpu is not None and gpu.takes(x):
            return gpu.matmul(self.format, self.codes, self.scale, self._buffers.get("scale_2"), x, bias)
        native = self.is_native and dispatch.takes(x, bias)
        if native and 0 < x.numel() <= self.native_rows * size:
            return self._few_rows(x, bias, out, size)
        wide = arithmetic_dtype(x)
        x_wide, result, start = x.to(wide), x.new_empty(*x.shape[:-1], out), 0
        tiles = self._native_tiles(wide) if native else self.tiles(TILE_BYTES if x.is_cpu else GPU_TILE_BYTES)
        for tile in tiles:
            part = slice(start, start + len(tile))
            result[..., part] = linear(x_wide, tile.to(wide), None if bias is None else bias[part].to(wide))
            start = part.stop
        return result

    @property
    def is_native(self) -> bool:
        """Whether the native kernels know this layout."""
        return True

    def _few_rows(self, x: Tensor, bias: Tensor | None, out: int, size: int) -> Tensor:
        x, bias = x.contiguous(), None if bias is None else bias.contiguous()
        y, rows, bfloat16 = x.new_empty((*x.shape[:-1], out)), x.numel() // size, x.dtype is torch.bfloat16
        dispatch.native.packed(x=x, bias=bias, y=y, rows=rows, bfloat16=bfloat16, **self._operands())
        return y

    def matmul_each(self, x: Tensor) -> Tensor:
        """`x[:, g] @ self[g]^T` in x's type: [tokens, G, out] for x [tokens, G, in], of a stack of G matrices."""
        groups, out, _ = self.shape
        if not (self.is_native and dispatch.takes(x) and 0 < len(x) <= self.native_rows):
            return torch.stack([self[g].matmul(x[:, g]) for g in range(groups)], 1)
        x, y = x.transpose(0, 1).contiguous(), x.new_empty(groups, len(x), out)
        dispatch.native.packed(
            **self._operands(), x=x, y=y, rows=x.shape[1], groups=groups, bfloat16=x.dtype is torch.bfloat16
        )
        return y.transpose(0, 1)

    def expert_operands(self, down: Any) -> tuple[dict[str, Any], dict[str, Any]] | None:
        """What the native kernel of experts reads, with this as `up`: see `kernels.products.Weight`."""
        if not self.multiplies_beside(down) or not (self.is_native and down.is_native):
            return None
        return self._operands(), down._operands()

    def multiplies_beside(self, other: Any) -> bool:
        """Whether one native call of experts takes both."""
        return type(other) is type(self)

    def _operands(self) -> dict[str, Any]:
        """`native_operands`, made once."""
        if self._native is None:
            self._native = self.native_operands()
        return self._native

    def native_operands(self) -> dict[str, Any]:
        """The fields of a native Packed that hold the weight; a single matrix is a stack of one."""
        codes, scale = self.codes, self.scale
        return {
            "codes": codes,
            "scale": scale,
            "scale_2": self._buffers.get("scale_2"),
            "inputs": codes.shape[-1] * self.per_byte,
            "outputs": codes.shape[-2],
            "codes_bytes": codes.nbytes // max(1, len(codes)),
            "scale_bytes": scale.nbytes // max(1, len(scale)) if scale.ndim else 0,
            "packing": self.format,
            "scales": scale.ndim - codes.ndim + 2,  # 0, 1, 2: the matrix has one, each row, or each block
        }

    def _native_tiles(self, dtype: torch.dtype) -> Iterator[Tensor]:
        """All rows in order as [n, in], one after the other in the same memory."""
        out, size = self.shape
        step = max(1, NATIVE_TILE_BYTES // (dtype.itemsize * size))
        tile, bfloat16 = torch.empty(min(step, out), size, dtype=dtype), dtype is torch.bfloat16
        for start in range(0, out, step):
            n = min(step, out - start)
            dispatch.native.unpack(**self._operands() | {"first": start, "outputs": n, "y": tile, "bfloat16": bfloat16})
            yield tile[:n]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedWeight:
        """Moves to another device; a change of type, as in `model.bfloat16()`, leaves packed numbers alone."""
        like = fn(torch.empty(0, dtype=self.dtype, device=self.device))
        for name, part in self.named_buffers():
            self._buffers[name] = part.to(like.device)
        self.dtype = like.dtype
        self._matrices, self._stacks, self._native = None, {}, None
        return self

    def extra_repr(self) -> str:
        return f"{self.format}, {list(self.shape)}"


def packed_class(format: str) -> type[PackedWeight]:
    """The class of a format. Raises ValueError listing all for one that is not known."""
    if format in BLOCKS:
        return import_module("sparing.weights.blocks").KINDS[format]
    if format not in CLASSES:
        raise ValueError(f"weights={format!r} is not known, use {', '.join(CLASSES)}")
    module, name = CLASSES[format]
    return getattr(import_module(f"sparing.weights.{module}"), name)


def largest_magnitudes(tiles: Callable[[], Iterator[Tensor]], matrices: int) -> Tensor:
    """float32 [matrices], from a reading of all their rows."""
    return torch.cat([tile.abs().amax(-1) for tile in tiles()]).view(matrices, -1).amax(-1).float()


def empty_packed(
    format: str,
    shape: Sequence[int],
    device: torch.device | str = "cpu",
    empty: Empty = torch.empty,
    scales: str | None = None,
) -> PackedWeight:
    """A weight of this shape to `fill`; empty: makes its tensors; scales: of `Format.scales`, how they are laid out."""
    layout = FORMATS[format].layout(shape, scales)
    parts = {n: empty(own, dtype=getattr(torch, dtype), device=device) for n, (dtype, own) in layout.items()}
    return packed_class(format)(**parts)
