"""From logits to a token: rules, temperature, filters, draw. Frozen settings, explicit generators."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.config.generation import WARPERS, check_setting
from sparing.decoding.rules import Rules, Seen
from sparing.kernels.vocabulary import gumbel

__all__ = ["Sampling", "row_generator", "unusable"]

SMALLEST_TEMPERATURE = 1e-5  # below it a draw is the most likely token, and quotients overflow
TOP_H_TOKENS = 100  # of the most likely, as in transformers


def row_generator(seed: int, row: int) -> torch.Generator:
    """The random numbers of one row: independent of the other rows, equal to `seed` itself for row 0."""
    return torch.Generator().manual_seed((seed + row * 0x9E3779B97F4A7C15) % 2**63)


def unusable(scores: Tensor) -> list[int]:
    """Rows of logits [rows, V] from which no token can be chosen: they hold NaN or +inf, or nothing but -inf."""
    usable = scores.amax(-1).isfinite()  # NaN is the largest of all
    return [] if usable.all() else (~usable).nonzero()[:, 0].tolist()


@dataclass(frozen=True, kw_only=True)
class Sampling(Rules):
    """How a next token is chosen.

    temperature: 0, or too little to tell from it, takes the most likely token; top_k: keep the k most likely; top_p:
    keep the smallest set that holds this probability; min_p: drop what is less likely than this share of the most
    likely; top_h, typical_p, epsilon_cutoff, eta_cutoff: as in transformers; the rest: of `Rules`.
    Raises ValueError for values of another type or out of range.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    top_h: float | None = None
    typical_p: float | None = None
    epsilon_cutoff: float | None = None
    eta_cutoff: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in WARPERS:
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, check_setting(name, value))
        if self.temperature < SMALLEST_TEMPERATURE:
            object.__setattr__(self, "temperature", 0.0)

    def process(self, logits: Tensor, seen: Sequence[Seen]) -> Tensor:
        """Changed, tempered and filtered logits. logits: float32 [rows, V]; seen: one per row, or none of them where
        `of_history` is empty."""
        z = self.apply(logits, seen) if self.changes else logits
        if self.temperature == 0:
            return z
        z = z / self.temperature
        if self.top_h:
            z = _keep_entropy(z, self.top_h)
        if self.top_k and self.top_k < z.shape[-1]:
            z = z.masked_fill(z < z.topk(self.top_k).values[..., -1:], -math.inf)
        if self.top_p is not None and self.top_p < 1:
            ordered, order = z.sort(descending=True)
            before = ordered.softmax(-1).cumsum(-1).roll(1, -1)
            before[..., 0] = 0.0
            dropped = torch.zeros_like(z, dtype=torch.bool).scatter(-1, order, before >= self.top_p)
            z = z.masked_fill(dropped, -math.inf)
        if self.min_p:
            z = z.masked_fill(z < z.amax(-1, keepdim=True) + math.log(self.min_p), -math.inf)
        if self.typical_p is not None and self.typical_p < 1:
            z = _keep_typical(z, self.typical_p)
        if self.epsilon_cutoff and self.epsilon_cutoff < 1:
            z = _drop_below(z, torch.full_like(z[..., :1], self.epsilon_cutoff))
        if self.eta_cutoff and self.eta_cutoff < 1:
            expected = math.sqrt(self.eta_cutoff) * (-_entropy(z)).exp()
            z = _drop_below(z, expected.clamp(max=self.eta_cutoff)[..., None])
        return z

    def choose(self, z: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """One id per row of processed logits [rows, V]: int64 [rows]. Each row draws from its own generator."""
        if self.temperature == 0:
            return z.argmax(-1)
        return (z + gumbel(generators, [1] * len(z), z.device)(z.shape[-1])).argmax(-1)


def _entropy(z: Tensor) -> Tensor:
    """float32 [...] of logits [..., V], nats."""
    return torch.special.entr(z.softmax(-1)).sum(-1)


def _drop_below(z: Tensor, least: Tensor) -> Tensor:
    """Without tokens of a probability below `least` [..., 1], except the most likely."""
    return z.masked_fill((z.softmax(-1) < least) & (z < z.amax(-1, keepdim=True)), -math.inf)


def _keep_typical(z: Tensor, mass: float) -> Tensor:
    """The tokens whose surprise is nearest to what is expected, up to this probability. Source: arXiv 2202.00666."""
    surprise = -z.log_softmax(-1)
    distance, order = (surprise - _entropy(z)[..., None]).abs().sort(-1)
    last = (z.gather(-1, order).softmax(-1).cumsum(-1) < mass).sum(-1, keepdim=True).clamp(max=z.shape[-1] - 1)
    far = distance > distance.gather(-1, last)
    far[..., :1] = False
    return z.masked_fill(torch.zeros_like(far).scatter(-1, order, far), -math.inf)


def _keep_entropy(z: Tensor, share: float) -> Tensor:
    """The most likely tokens whose entropies sum to at most this share of all of it (top-H)."""
    values, order = z.topk(min(TOP_H_TOKENS, z.shape[-1]))
    terms = torch.special.entr(values.softmax(-1))
    kept = terms.cumsum(-1) <= share * terms.sum(-1, keepdim=True)
    kept[..., 0] = True
    return z.masked_fill(~torch.zeros_like(z, dtype=torch.bool).scatter(-1, order, kept), -math.inf)
