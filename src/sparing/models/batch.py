"""Rows of different lengths joined into one list of tokens: no padding anywhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor

from sparing.kernels.ssm import MambaWeights
from sparing.memory.attention import AttentionMemory
from sparing.memory.recurrent import RecurrentMemory
from sparing.memory.sequence import Memory

__all__ = ["RaggedBatch", "Row"]


@dataclass
class Row:
    """One sequence's share of a forward pass.

    tokens: int64 [T] new ids; memory: what came before; wanted: how many of the last positions' outputs are read
    (None: all); causal: False for a canvas, whose tokens all see each other; text_end: how many tokens the sequence
    holds once the text is read that these are a piece of (None: with these), on which "dynamic" rotation depends.
    """

    tokens: Tensor
    memory: Memory
    wanted: int | None = None
    causal: bool = True
    text_end: int | None = None

    @property
    def num_wanted(self) -> int:
        return len(self.tokens) if self.wanted is None else min(self.wanted, len(self.tokens))


class RaggedBatch:
    """What a model's forward sees: ids and positions of all rows, and where alone rows matter: `attend` and `scan`."""

    def __init__(self, rows: Sequence[Row]):
        self.rows = list(rows)
        if staged := next((row.memory.staged for row in self.rows if row.memory.staged), 0):
            raise ValueError(f"{staged} tokens are staged: commit or roll back before the next forward")
        self.ids = torch.cat([row.tokens for row in rows])  # [tokens]
        self._sizes = [len(row.tokens) for row in rows]
        self._counts = self._sizes  # positions of each row still carried through the layers
        first, device = [row.memory.length for row in rows], self.ids.device
        self.positions = torch.cat(
            [torch.arange(a, a + n, device=device) for a, n in zip(first, self._sizes, strict=True)]
        )

    @property
    def lengths(self) -> Tensor:
        """int64 [tokens]: length of the text that each was given with, or up to itself where it was generated."""
        ends = [
            row.memory.length + n if row.text_end is None else row.text_end
            for row, n in zip(self.rows, self._sizes, strict=True)
        ]
        of_tokens = torch.tensor(ends).repeat_interleave(torch.tensor(self._sizes))
        return torch.maximum(of_tokens.to(self.ids.device), self.positions + 1)

    def attend(self, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float = 1.0) -> Tensor:
        """Stage k, v (None in a layer that shares) and attend, row by row.

        q: [carried tokens, heads, d]; k, v: [tokens, kv_heads, d]; returns q's shape.
        """
        if k is not None and v is not None:
            of_rows = k.split_with_sizes(self._sizes), v.split_with_sizes(self._sizes)
            for row, k_row, v_row in zip(self.rows, *of_rows, strict=True):
                _attention(row, layer).stage(k_row, v_row)
        outputs = [
            _attention(row, layer).attend(q_row, scale=scale, causal=row.causal)
            for row, q_row, n in zip(self.rows, q.split_with_sizes(self._counts), self._counts, strict=True)
            if n
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else q

    def scan(self, layer: int, xbc: Tensor, dt: Tensor, weights: MambaWeights) -> Tensor:
        """Stage the inputs of a Mamba layer and read its state, row by row.

        xbc: [tokens, C]; dt: float32 [tokens, heads]; both as in `RecurrentMemory.stage`.
        Returns float32 [carried tokens, heads, head_dim].
        """
        outputs = []
        of_rows = xbc.split_with_sizes(self._sizes), dt.split_with_sizes(self._sizes)
        for row, xbc_row, dt_row, n in zip(self.rows, *of_rows, self._counts, strict=True):
            memory = row.memory.layers[layer]
            assert isinstance(memory, RecurrentMemory)
            memory.stage(xbc_row, dt_row, weights)
            outputs.append(memory.attend(n))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def narrow(self) -> Tensor | None:
        """From here on carry only the positions whose output is read: nothing later looks at the others.

        Called by the model after the last keys and values are made. Returns their indices, or None if all are read.
        """
        self._counts = [row.num_wanted for row in self.rows]
        if self._counts == self._sizes:
            return None
        kept = [torch.arange(end - n, end) for end, n in zip(accumulate(self._sizes), self._counts, strict=True)]
        return torch.cat(kept).to(self.ids.device)

    def rollback(self) -> None:
        for row in self.rows:
            row.memory.rollback()

    def commit(self) -> None:
        for row, n in zip(self.rows, self._sizes, strict=True):
            row.memory.commit(n)


def _attention(row: Row, layer: int) -> AttentionMemory:
    memory = row.memory.layers[layer]
    assert isinstance(memory, AttentionMemory)
    return memory
