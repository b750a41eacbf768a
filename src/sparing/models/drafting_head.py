"""What a model's own head for drafting offers, whatever is inside (MTP)."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparing.config.policy import parse_policy
from sparing.errors import CheckpointError
from sparing.memory.plan import plan_memory
from sparing.memory.sequence import Memory
from sparing.models.batch import RaggedBatch, Row
from sparing.models.layers import Network

__all__ = ["DraftingHead", "Target"]


class Target(Protocol):
    """What a head takes from its model: the output head, and what memories are made of."""

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    def product(self, collapsed: Tensor) -> Tensor: ...


class DraftingHead(Network):
    """A head of one target, whose embeddings and output head it uses. Parameters carry their checkpoint names.

    config: of its layers, as if they were a model's. Entry i is made of token i + 1 and of what the target's `run`
    gave at i, and predicts token i + 2. Drafts chain: what the head itself ends with stands in for what the target has
    not computed yet.
    """

    def __init__(self, target: Target, config: Any):
        super().__init__()
        self._target = (target,)  # no parameters of the head's own
        self.config = config

    def check(self, stored: Iterable[str], path: str) -> None:
        """Raises ValueError where a file's tensors hold no such head, CheckpointError where they hold another."""
        found = (re.search(r"\bmtp\.(?:layers\.)?(\d+)\.", name) for name in stored)
        numbers, expected = {int(match[1]) for match in found if match}, len(self.config.layers)
        if not numbers:
            raise ValueError(f"{path} holds no drafting head (mtp.*): use draft='ngram' or a smaller model")
        if len(numbers) != expected:
            raise CheckpointError(
                f"{path} holds a drafting head of {len(numbers)} layers, the config describes {expected}: one depth is"
                " supported"
            )

    def memory(self) -> Memory:
        """An empty memory for one sequence: the head's own entries."""
        target, specs = self._target[0], self.config.memory_specs()
        none = [None] * len(specs)
        return plan_memory(
            specs,
            parse_policy("dense"),
            dtype=target.dtype,
            device=target.device,
            keys_from_values=none,
            key_biases=none,
        ).memory()

    def collapsed(self, states: Tensor) -> Tensor:
        """What the target's output table multiplies, [..., H], of what `forward` returns."""
        return states

    def head(self, states: Tensor) -> Tensor:
        """float32 logits [..., V] of what `forward` returns."""
        return self._target[0].product(self.collapsed(states))

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(logits float32 [rows, V] of the token after next, states [rows, ...]) at each row's last entry.

        rows: tokens i + 1 of the entries to stage, in the head's memories; hidden: [tokens, ...], states at i of all
        rows. If anything raises, no memory has changed.
        """
        batch = RaggedBatch([Row(row.tokens, row.memory, wanted=1) for row in rows])
        try:
            states = self(batch, hidden)
            return self.head(states), states
        except BaseException:
            batch.rollback()
            raise
