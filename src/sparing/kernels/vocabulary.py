"""One pass over the vocabulary: argmax, sample, entropy and soft embedding without a [tokens, vocabulary] tensor.

Head, soft cap, temperature, softmax and the product with the embedding table are attention whose keys and values
are the same table, so an online softmax over blocks of the table yields everything a denoising step needs while the
block is still in cache.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparing.kernels.norm import softcap
from sparing.kernels.products import linear, weighted_rows

__all__ = ["VocabularyPass", "VocabularyResult", "entropy", "gumbel", "vocabulary_softmax"]

BLOCK_BYTES = 8 << 20  # of the table: stays in the last-level cache between its two uses


@dataclass
class VocabularyResult:
    """argmax, sample: int64 [L]; entropy: float32 [L], nats; soft: [L, D] probability-weighted mean table row."""

    argmax: Tensor
    sample: Tensor
    entropy: Tensor
    soft: Tensor | None

    def rows(self, rows: slice | Tensor) -> VocabularyResult:
        soft = None if self.soft is None else self.soft[rows]
        return VocabularyResult(self.argmax[rows], self.sample[rows], self.entropy[rows], soft)


class VocabularyPass:
    """Accumulates over blocks of tempered logits [L, block], fed in vocabulary order."""

    def __init__(self) -> None:
        self.offset = 0

    def update(self, z: Tensor, noise: Tensor | None = None, table: Tensor | None = None) -> None:
        """z: float32 [L, n] tempered logits of the next n ids; noise: Gumbel [L, n] or None (sample = argmax);
        table: [n, D] rows whose probability-weighted mean is wanted, or None."""
        best, at = z.max(-1)
        best = best.clamp_min(torch.finfo(best.dtype).min)  # finite for a block of nothing but -inf
        perturbed, drawn = (best, at) if noise is None else (z + noise).max(-1)
        if self.offset == 0:
            self._top, self._argmax, self._perturbed, self._sample = best, at, perturbed, drawn
            self._sum, self._moment = torch.zeros_like(best), torch.zeros_like(best)
            self._soft = None if table is None else z.new_zeros(len(z), table.shape[1])
        else:
            # Rescale what was accumulated to the new maximum m': sum e^(z-m'), and sum e^(z-m') (z-m').
            shift = torch.where(best > self._top, self._top - best, 0.0).clamp_min(-1e4)
            decay = shift.exp()
            self._moment = decay * (self._moment + shift * self._sum)
            self._sum = decay * self._sum
            if self._soft is not None:
                self._soft *= decay[:, None]
            self._argmax = torch.where(best > self._top, at + self.offset, self._argmax)
            self._sample = torch.where(perturbed > self._perturbed, drawn + self.offset, self._sample)
            self._top = torch.maximum(self._top, best)
            self._perturbed = torch.maximum(self._perturbed, perturbed)
        centred = (z - self._top[:, None]).clamp_min(-1e4)  # finite for logits of -inf
        mass = centred.exp()
        self._sum = self._sum + mass.sum(-1)
        self._moment = self._moment + (mass * centred).sum(-1)
        if table is not None:
            assert self._soft is not None
            self._soft += weighted_rows(mass.to(table.dtype), table)
        self.offset += z.shape[-1]

    def result(self) -> VocabularyResult:
        soft = None if self._soft is None else self._soft / self._sum[:, None]
        spread = (self._sum.log() - self._moment / self._sum).clamp_min(0.0)
        return VocabularyResult(self._argmax, self._sample, spread, soft)


def vocabulary_softmax(
    hidden: Tensor,
    table: Tensor,
    *,
    temperature: Tensor | float = 1.0,
    cap: float | None = None,
    noise: Callable[[int], Tensor] | None = None,
    embedding: Tensor | None = None,
    bias: Tensor | None = None,
) -> VocabularyResult:
    """What a denoising step needs to know of `softmax((softcap(hidden @ table^T) + bias) / temperature)`.

    hidden: [L, D]; table: [V, D] the output head; temperature: number or [L]; noise: called with a block's width n,
    returns Gumbel noise [L, n]; embedding: [V, D] rows averaged into `soft` (None: not wanted); bias: float32 [V], -inf
    for ids that are not to be chosen. Logits that are not finite, or all -inf, show as an entropy of NaN.
    Products in the table's dtype, everything after them in float32.
    """
    run = VocabularyPass()
    rows = max(1, BLOCK_BYTES // (table.shape[1] * table.element_size()))
    if isinstance(temperature, Tensor):
        temperature = temperature[:, None]
    for start in range(0, len(table), rows):
        block = table[start : start + rows]
        z = linear(hidden, block).float()
        z = z if cap is None else softcap(z, cap)
        z = (z if bias is None else z + bias[start : start + rows]) / temperature
        rows_of_embedding = None if embedding is None else embedding[start : start + rows]
        run.update(z, None if noise is None else noise(len(block)), rows_of_embedding)
    return run.result()


def gumbel(generators: Sequence[torch.Generator], rows: Sequence[int], device: torch.device) -> Callable[[int], Tensor]:
    """Noise source for `vocabulary_softmax`: row group i of `rows[i]` rows draws from its own generator."""

    def draw(width: int) -> Tensor:
        parts = [torch.empty(n, width).exponential_(generator=g) for g, n in zip(generators, rows, strict=True)]
        return torch.cat(parts).log_().neg_().to(device)

    return draw


def entropy(logits: Tensor) -> Tensor:
    """Entropy of softmax(logits) in nats: float32 [...] for logits [..., V]. Logits of -inf count as probability 0."""
    run = VocabularyPass()
    run.update(logits.reshape(-1, logits.shape[-1]).float())
    return run.result().entropy.view(logits.shape[:-1])
