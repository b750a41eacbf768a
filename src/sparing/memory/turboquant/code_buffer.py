"""A growing list of tokens in codes: one stream, blocks of 64 tokens."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.kernels.code_layout import BLOCK, block_bytes, pack, unpack
from sparing.kernels.codes import Codes
from sparing.memory.turboquant.buffer import Buffer

__all__ = ["CodeBuffer"]

SPARE = 4  # blocks of head-room at each growth


class CodeBuffer:
    """Codes and scales of n tokens; the last block may be filled in part, and is laid out anew when it grows."""

    def __init__(
        self, heads: int, centroids: Tensor, dims: int, role: str, scale_dtype: torch.dtype, device: torch.device
    ):
        self.heads, self.centroids, self.dims, self.role = heads, centroids.to(device), dims, role
        self.bits = len(centroids).bit_length() - 1
        self._packed = Buffer(heads, block_bytes(dims, self.bits), torch.uint8, device, SPARE)
        self._scale = Buffer(heads, BLOCK, scale_dtype, device, SPARE)
        self._n = 0

    def __len__(self) -> int:
        return self._n

    @property
    def codes(self) -> Codes:
        """What a kernel reads."""
        return Codes(self._packed.view, self._scale.view, self.centroids, self.dims)

    def append(self, codes: Tensor, scale: Tensor) -> None:
        """codes: uint8 [n, heads, dims]; scale: [n, heads], within the range of the scales' type."""
        codes, scale = codes.transpose(0, 1), scale.T.to(self._scale.view.dtype)
        full = self._n // BLOCK
        if started := self._n - full * BLOCK:
            last = unpack(self._packed.view[:, full:], self.bits, self.role, started, self.dims)
            codes = torch.cat([last, codes], 1)
            scale = torch.cat([self._scale.view[:, full, :started], scale], 1)
        self._packed.truncate(full)
        self._scale.truncate(full)
        self._n = full * BLOCK + codes.shape[1]
        blocks = -(-codes.shape[1] // BLOCK)
        padded = scale.new_zeros(self.heads, blocks * BLOCK)
        padded[:, : scale.shape[1]] = scale
        self._packed.append(pack(codes, self.bits, self.role).transpose(0, 1))
        self._scale.append(padded.unflatten(1, (blocks, BLOCK)).transpose(0, 1))

    def truncate(self, n: int) -> None:
        self._n = min(n, self._n)
        self._packed.truncate(-(-self._n // BLOCK))
        self._scale.truncate(-(-self._n // BLOCK))

    def canonical(self) -> tuple[Tensor, Tensor]:
        """(codes uint8 [n, heads, dims], scale [n, heads])."""
        codes = unpack(self._packed.view, self.bits, self.role, self._n, self.dims)
        return codes.transpose(0, 1), self._scale.view.flatten(1)[:, : self._n].T

    @property
    def nbytes(self) -> int:
        """Bytes of the n tokens; the rest of the last block is head-room."""
        block = block_bytes(self.dims, self.bits) + BLOCK * self._scale.view.element_size()
        return self.heads * self._n * block // BLOCK

    def fork(self) -> CodeBuffer:
        twin = object.__new__(CodeBuffer)
        twin.__dict__.update(self.__dict__)
        twin._packed, twin._scale = self._packed.fork(), self._scale.fork()
        return twin

    def state(self) -> dict[str, Tensor]:
        """Codes as they lie [blocks, heads, block_bytes] and scales [n, heads], for `restore`."""
        codes, scale = self.canonical()  # packed anew: what follows the last token may be left from a token taken back
        return {"codes": pack(codes.transpose(0, 1), self.bits, self.role).transpose(0, 1), "scale": scale}

    def restore(self, codes: Tensor, scale: Tensor) -> None:
        """Fill an empty buffer with what `state` returned."""
        unpacked = unpack(codes.transpose(0, 1), self.bits, self.role, len(scale), self.dims)
        self.append(unpacked.transpose(0, 1), scale)
