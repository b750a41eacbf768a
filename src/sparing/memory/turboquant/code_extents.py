"""Codes of layers alike: blocks of 64 tokens, in extents."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from copy import copy
from typing import Any

import torch
from torch import Tensor

from sparing.kernels.code_layout import BLOCK, block_bytes, canonical, lay_out
from sparing.kernels.codes import Codes
from sparing.kernels.rows import Extent, Span
from sparing.memory.extents import Entries
from sparing.memory.turboquant.coder import Coder
from sparing.memory.turboquant.quantisers import Encoded

__all__ = ["CodeExtents"]

CodeSpan = tuple[int, int, list[Codes]]  # tokens start..stop-1, and each part's codes of them


class CodeExtents:
    """Keys or values of a group of layers as codes, of one sequence.

    Of each part the blocks of codes and those of scales are entries. The last block may be filled in part: it is
    laid out anew as it grows, in an extent of its own where a fork reads the old one. Which of the tokens there is room
    for are written in a layer, its owner knows.
    """

    def __init__(self, coder: Coder, layers: int):
        """coder: that of any of the layers."""
        self.role, self.heads, self.dims, self.bits = coder.role, coder.heads, coder.dims, coder.bits

        def blocks(size: int, dtype: torch.dtype) -> Entries:
            return Entries(layers, 1, coder.heads, size, dtype, coder.device, step=1, joined=True)

        sizes = [block_bytes(dims, bits) for dims, bits in zip(self.dims, self.bits, strict=True)]
        self._parts = [(blocks(size, torch.uint8), blocks(BLOCK, coder.scale_dtype)) for size in sizes]
        self.room = 0  # tokens that may be written, or are; all in extents that no fork reads, or in full blocks
        self._spans: dict[int, list[CodeSpan]] = {}  # of layers that were asked for, until blocks come or go

    def make_room(self, n: int, expected: int = 0) -> None:
        """For n tokens in all, and where a new extent is needed for as many as are `expected`."""
        if n <= self.room:
            return
        before = self.mark()
        try:
            for entries in self._entries():
                self._extend(entries, -(-n // BLOCK), -(-expected // BLOCK))
        except BaseException:
            self.reset(before)
            raise
        self.room, self._spans = n, {}

    def _extend(self, entries: Entries, blocks: int, expected: int) -> None:
        full = self.room // BLOCK
        begun = entries.cut(full, full + 1)  # the block that is filled in part
        if begun and not entries.owns(begun[0]):
            entries.truncate(full)
        held = len(entries)
        entries.extend(blocks - held, held, expected - held)
        if begun and held == full:
            (old,), (new,) = begun, entries.cut(full, full + 1)
            new.extent.data[..., new.start, :] = old.extent.data[..., old.start, :]

    def write(self, layer: int, start: int, encoded: Sequence[Encoded]) -> None:
        """Tokens from `start` on, all before them being written. encoded: of each part, see `Coder.encode`."""
        full = start // BLOCK
        for (laid_out, scales), (codes, scale), dims, bits in zip(
            self._parts, encoded, self.dims, self.bits, strict=True
        ):
            codes, scale = codes.transpose(0, 1), scale.T
            if begun := start - full * BLOCK:
                last = canonical(laid_out.read(layer, 0, full, full + 1), bits, self.role, begun, dims)
                codes = torch.cat([last, codes], 1)
                scale = torch.cat([scales.read(layer, 0, full, full + 1)[:, 0, :begun], scale], 1)
            blocks = -(-codes.shape[1] // BLOCK)
            padded = scale.new_zeros(self.heads, blocks * BLOCK)
            padded[:, : scale.shape[1]] = scale
            _fill(laid_out, layer, full, lay_out(codes, bits, self.role))
            _fill(scales, layer, full, padded.unflatten(1, (blocks, BLOCK)))

    def truncate(self, n: int) -> None:
        """Forget the room for all but the first n tokens."""
        if n < self.room:
            self.room, self._spans = n, {}
            for entries in self._entries():
                entries.truncate(-(-n // BLOCK))

    def clear(self) -> None:
        """Hold nothing, so that what is written next lies in new extents."""
        self.room, self._spans = 0, {}
        for entries in self._entries():
            entries.clear()

    @property
    def held_in(self) -> object:
        """What tells the extents that hold it from others."""
        return self._parts[0][0].spans

    def spans(self, layer: int, coder: Coder) -> list[CodeSpan]:
        """What a kernel reads of a layer, whose codes `coder` made, extent by extent."""
        if (found := self._spans.get(layer)) is None:
            at, found = 0, []
            for of_parts in zip(*(entries.spans for entries in self._entries()), strict=True):
                views = [span.view(layer, 0) for span in of_parts]
                pairs = zip(views[::2], views[1::2], coder.centroids, self.dims, strict=True)
                stop = at + BLOCK * len(of_parts[0])
                found.append((at, stop, [Codes(*part) for part in pairs]))
                at = stop
            self._spans[layer] = found
        return found

    def upto(self, layer: int, coder: Coder, n: int) -> Iterator[CodeSpan]:
        """`spans` of the first n tokens."""
        for start, stop, parts in self.spans(layer, coder):
            if start >= n:
                return
            yield start, min(stop, n), parts

    def places(self, n: int) -> list[tuple[int, list[tuple[Span[Extent], Span[Extent]]]]]:
        """Where the first n tokens lie in all layers, extent by extent: how many, and each part's codes and scales."""
        found, at = [], 0
        for spans in zip(*(entries.spans for entries in self._entries()), strict=True):
            if at < n:
                found.append((min(BLOCK * len(spans[0]), n - at), list(zip(spans[::2], spans[1::2], strict=True))))
            at += BLOCK * len(spans[0])
        return found

    def decode(self, layer: int, coder: Coder, start: int, stop: int) -> Tensor:
        """float32 [heads, stop - start, d]; start: a multiple of 64."""
        parts = [
            coder.decode(parts, max(start, first) - first, end - first)
            for first, end, parts in self.upto(layer, coder, stop)
            if end > start
        ]
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def canonical(self, layer: int, n: int) -> list[Encoded]:
        """Codes uint8 [n, heads, dims] and scales [n, heads] of each part of the first n tokens."""
        found = []
        for (laid_out, scales), dims, bits in zip(self._parts, self.dims, self.bits, strict=True):
            codes = canonical(laid_out.read(layer, 0), bits, self.role, n, dims)
            found.append((codes.transpose(0, 1), scales.read(layer, 0).flatten(1)[:, :n].T))
        return found

    def nbytes(self, n: int) -> int:
        """Bytes of n tokens in all layers; the rest of the last block is head-room."""
        of_block = sum(entries.entry_nbytes for entries in self._entries())
        return n * of_block // BLOCK

    def state(self, layer: int, n: int) -> dict[str, Tensor]:
        """Codes as they lie [blocks, heads, block_bytes] and scales [n, heads], for `restore`."""
        found = {}
        for i, ((codes, scale), bits) in enumerate(zip(self.canonical(layer, n), self.bits, strict=True)):
            # Packed anew: what follows the last token may be left from a token taken back.
            found[f"codes{i or ''}"] = lay_out(codes.transpose(0, 1), bits, self.role).transpose(0, 1)
            found[f"scale{i or ''}"] = scale
        return found

    def restore(self, layer: int, state: dict[str, Tensor]) -> None:
        """Write what `state` returned, for which there is room."""
        encoded = []
        for i, (dims, bits) in enumerate(zip(self.dims, self.bits, strict=True)):
            codes, scale = state[f"codes{i or ''}"], state[f"scale{i or ''}"]
            read = canonical(codes.transpose(0, 1), bits, self.role, len(scale), dims)
            encoded.append((read.transpose(0, 1), scale))
        self.write(layer, 0, encoded)

    def mark(self) -> Any:
        return self.room, [entries.mark() for entries in self._entries()]

    def reset(self, mark: Any) -> None:
        self.room, marks = mark
        self._spans = {}
        for entries, of_entries in zip(self._entries(), marks, strict=True):
            entries.reset(of_entries)

    def blocks(self) -> dict[int, int]:
        """Bytes of each extent, by what tells it apart."""
        return {key: n for entries in self._entries() for key, n in entries.blocks().items()}

    def fork(self) -> CodeExtents:
        twin = copy(self)
        twin._parts = [(laid_out.fork(), scales.fork()) for laid_out, scales in self._parts]
        twin._spans = {}
        return twin

    def _entries(self) -> list[Entries]:
        return [entries for part in self._parts for entries in part]


def _fill(entries: Entries, layer: int, at: int, new: Tensor) -> None:
    """Write new [heads, n, size] to entries at..at+n-1 of a layer."""
    for span in entries.cut(at, at + new.shape[1]):
        span.view(layer, 0).copy_(new[:, : len(span)])
        new = new[:, len(span) :]
