"""From logits to a token: penalty, temperature, filters, draw. Frozen settings, explicit generators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.kernels.vocabulary import gumbel

__all__ = ["Sampling", "row_generator"]


def row_generator(seed: int, row: int) -> torch.Generator:
    """The random stream of one row: independent of the other rows, equal to `seed` itself for row 0."""
    return torch.Generator().manual_seed((seed + row * 0x9E3779B97F4A7C15) % 2**63)


@dataclass(frozen=True)
class Sampling:
    """How a next token is chosen.

    temperature: 0 takes the most likely token; top_k: keep the k most likely; top_p: keep the smallest set that holds
    this probability; min_p: drop what is less likely than this share of the most likely; repetition_penalty: divides
    positive and multiplies negative logits of tokens already present. Raises ValueError for values out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0

    def __post_init__(self) -> None:
        if not (self.temperature >= 0 and math.isfinite(self.temperature)):
            raise ValueError(f"temperature is {self.temperature}: use 0 for the most likely token, or more")
        if self.top_k is not None and self.top_k < 1:
            raise ValueError(f"top_k is {self.top_k}: use at least 1, or None for no limit")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise ValueError(f"top_p is {self.top_p}: use a probability above 0 and up to 1")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise ValueError(f"min_p is {self.min_p}: use a share between 0 and 1")
        if not self.repetition_penalty > 0:
            raise ValueError(f"repetition_penalty is {self.repetition_penalty}: use a number above 0 (1 is neutral)")

    def process(self, logits: Tensor, seen: Sequence[Tensor]) -> Tensor:
        """Tempered and filtered logits. logits: float32 [rows, V]; seen: ids already present, per row."""
        if self.repetition_penalty != 1.0:
            logits = logits.clone()
            for row, ids in zip(logits, seen, strict=True):
                values = row[ids]
                row[ids] = torch.where(values > 0, values / self.repetition_penalty, values * self.repetition_penalty)
        if self.temperature == 0:
            return logits
        z = logits / self.temperature
        if self.top_k is not None and self.top_k < z.shape[-1]:
            z = z.masked_fill(z < z.topk(self.top_k).values[..., -1:], -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = z.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
            before[..., 0] = 0.0
            dropped = torch.zeros_like(z, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            z = z.masked_fill(dropped, -math.inf)
        if self.min_p:
            z = z.masked_fill(z < z.amax(-1, keepdim=True) + math.log(self.min_p), -math.inf)
        return z

    def choose(self, z: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One id per row of processed logits [rows, V]: int64 [rows]. Each row draws from its own generator."""
        if self.temperature == 0:
            return z.argmax(-1)
        return (z + gumbel(generators, [1] * len(z), z.device)(z.shape[-1])).argmax(-1)
