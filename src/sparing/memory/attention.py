"""Memory of one attention layer of one sequence: stage, attend, commit, with all entries or a sliding window."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing import kernels
from sparing.memory.dense import Storage
from sparing.memory.spec import AttentionSpec

__all__ = ["AttentionMemory"]


class AttentionMemory:
    """Committed entries followed by staged ones, in one storage.

    A window is cut in `commit` and nowhere else: while tokens are staged the layer still holds every entry that the
    first of them may see, and a consumer layer that shares this memory sees exactly what its producer saw.
    """

    def __init__(self, spec: AttentionSpec, storage: Storage):
        self.spec = spec
        self.storage = storage
        self.length = 0  # tokens ever committed
        self.held = 0  # committed entries in the storage
        self.staged = 0

    def stage(self, k: Tensor, v: Tensor) -> None:
        """Make T new entries visible to `attend`. k, v: [T, kv_heads, head_dim], k normed and rotated."""
        self.storage.append(k, v)
        self.staged += len(k)

    def attend(self, q: Tensor, *, scale: float, causal: bool) -> Tensor:
        """Mix values for the last T staged positions. q: [T, heads, head_dim], normed and rotated; returns its shape.

        causal: a token sees itself and what came before, within the window. Otherwise all T see each other and every
        committed entry held (of a window: the last `window - 1`).
        """
        keys, values = self.storage.read(self.length - self.held)
        return kernels.attention(q, keys, values, scale=scale, causal=causal, window=self.spec.window)

    def commit(self, n: int) -> None:
        """Keep the first n staged tokens, forget the rest, cut the window."""
        if not 0 <= n <= self.staged:
            raise ValueError(f"cannot commit {n} tokens: {self.staged} are staged")
        self.storage.truncate(self.held + n)
        self.length += n
        self.held += n
        self.staged = 0
        if self.spec.window is not None and self.held >= self.spec.window:
            self.storage.drop_first(self.held - (self.spec.window - 1))
            self.held = self.spec.window - 1

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes

    def entries(self) -> Tensor:
        """Committed key positions: int64 [kv_heads, n]."""
        positions = torch.arange(self.length - self.held, self.length)
        return positions.expand(self.spec.num_key_value_heads, self.held)

    def fork(self) -> AttentionMemory:
        twin = AttentionMemory(self.spec, self.storage.fork())
        twin.length, twin.held = self.length, self.held
        return twin
