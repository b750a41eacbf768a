"""Memory of one attention layer of one sequence: stage, attend, commit, with all entries or a sliding window."""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.config.memory import AttentionSpec
from sparing.memory.dense import Storage, Where
from sparing.memory.turboquant.logit_noise import LogitNoise

__all__ = ["AttentionMemory"]


class AttentionMemory:
    """Committed entries followed by staged ones, in one storage.

    A window is cut in `commit` and nowhere else: while tokens are staged the layer still holds every entry that the
    first of them may see, and a consumer layer that shares this memory sees exactly what its producer saw.
    """

    def __init__(self, spec: AttentionSpec, storage: Storage, noise: LogitNoise | None = None):
        self.spec = spec
        self.storage = storage
        self.noise = noise  # until something is committed, of a storage in codes
        self.length = 0  # tokens ever committed
        self.held = 0  # committed entries in the storage
        self.staged = 0
        self._most = None if spec.window is None else spec.window - 1  # entries kept
        self._scattered: Tensor | None = None  # int32 [kv_heads, held], once entries in between were forgotten

    def stage(self, k: Tensor, v: Tensor) -> None:
        """Make T new entries visible to `attend`. k, v: [T, kv_heads, head_dim], k normed and rotated."""
        self.storage.append(k, v)
        self.staged += len(k)

    def attend(self, q: Tensor, *, scale: float, causal: bool) -> Tensor:
        """Mix values for the last T staged positions. q: [T, heads, head_dim], normed and rotated; returns its shape.

        causal: a token sees itself and what came before, within the window. Otherwise all T see each other and every
        committed entry held (of a window: the last `window - 1`).
        """
        if self.noise is not None and self.length == 0:
            self.noise.observe(q, self.storage.read(self.where())[0], scale)
        return self.storage.attend(q, self.where(), scale=scale, causal=causal, window=self.spec.window)

    def attend_after(self, q: Tensor, *, scale: float, window: int | None) -> Tensor:
        """Mix values for one query that stands after all entries and adds none, as a drafter's does.

        q: [1, heads, head_dim], normed and rotated; window: how many last entries it sees (None: all that are held).
        """
        return self.storage.attend(q, self.where(), scale=scale, causal=True, window=window)

    def hold_at_least(self, entries: int) -> None:
        """Keep at least this many entries of a window from now on, although its own queries see fewer."""
        if self._most is not None:
            self._most = max(self._most, entries)

    def commit(self, n: int) -> None:
        """Keep the first n staged tokens, forget the rest, cut the window."""
        if not 0 <= n <= self.staged:
            raise ValueError(f"cannot commit {n} tokens: {self.staged} are staged")
        self.storage.truncate(self.held + n)
        self.length += n
        self.held += n
        self.staged = 0
        if self.noise is not None and self.length == 0:
            self.noise.forget()
        if self._most is not None and self.held > self._most:
            self.storage.drop_first(self.held - self._most)
            self.held = self._most
        elif self._scattered is not None:
            self._scattered = self._followed_by(n)
        self.storage.settle()

    def keep(self, index: Tensor) -> None:
        """Forget all committed entries but index int64 [kv_heads, m] (ascending); positions and rotations stay.

        Raises ValueError while tokens are staged.
        """
        if self.staged:
            raise ValueError(f"{self.staged} tokens are staged: commit or roll back before forgetting entries")
        self._scattered = self.entries().gather(1, index.cpu()).int()
        self.storage.keep(index)
        self.held = index.shape[1]

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes + (0 if self._scattered is None else self._scattered.nbytes)

    def entries(self) -> Tensor:
        """Committed key positions: int64 [kv_heads, n]."""
        if self._scattered is not None:
            return self._scattered.long()
        positions = torch.arange(self.length - self.held, self.length)
        return positions.expand(self.spec.num_key_value_heads, self.held)

    def where(self) -> Where:
        """Positions of all entries, the staged ones included, as a storage wants them."""
        return self.length - self.held if self._scattered is None else self._followed_by(self.staged).long()

    def _followed_by(self, n: int) -> Tensor:
        """int32 [kv_heads, m + n]: scattered positions, then those of the n tokens that come next."""
        assert self._scattered is not None
        heads, held = self._scattered.shape
        first = self.length - (self.held - held)  # in `commit` the new ones are counted already
        return torch.cat([self._scattered, torch.arange(first, first + n, dtype=torch.int32).expand(heads, n)], 1)

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs, as named tensors."""
        state = self.storage.state()
        return state if self._scattered is None else {**state, "positions": self._scattered}

    def restore(self, length: int, state: dict[str, Tensor]) -> None:
        """Take over the `state` of a memory in which `length` tokens were committed."""
        self._scattered = state.pop("positions", None)
        self.storage.restore(state)
        self.length, self.held = length, len(self.storage)

    def fork(self) -> AttentionMemory:
        twin = AttentionMemory(self.spec, self.storage.fork(), None if self.noise is None else self.noise.fork())
        twin.length, twin.held, twin._scattered = self.length, self.held, self._scattered
        twin._most = self._most
        return twin
