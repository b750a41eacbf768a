"""TurboQuant for caches: vectors in, codes of their parts out, and back without leaving the rotated frames.

A quantiser stores a vector as parts whose sum it is: `x = sum of M_s^T (scale_s * centroids_s[codes_s])`. `project`
takes a query to the frames (`M_s q` for each part), `assemble` takes sums of values back (`sum of M_s^T y_s`). Plain
TurboQuant has one part; the sketch adds a second, the split by channels has those of both halves.
All tensors are float32 [tokens, heads, d]; encoding keeps what it touches within the processor's cache.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from sparing.memory.turboquant.definition import encode_directions, qjl_sketch, sphere_codebook
from sparing.memory.turboquant.rotation import Rotation

__all__ = ["MseQuantiser", "ProdQuantiser", "Quantiser", "SplitQuantiser", "gaussian_sketch"]

Encoded = tuple[Tensor, Tensor]  # codes uint8 [tokens, heads, dims], scale [tokens, heads]

PIECE = 1 << 17  # numbers encoded at a time


class Quantiser(Protocol):
    """How vectors of one layer and role become codes."""

    @property
    def centroids(self) -> Sequence[Tensor]:
        """float32 [2^bits] of each part."""
        ...

    def encode(self, x: Tensor) -> list[Encoded]:
        """Each part's codes and scales of x."""
        ...

    def project(self, q: Tensor) -> list[Tensor]:
        """Queries [T, heads, d] in each part's frame; heads: a multiple of the key heads."""
        ...

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        """[T, heads, d] from a sum in each part's frame."""
        ...

    def learnt(self, x: Tensor) -> Quantiser:
        """One that took from the first vectors, x, what it needs of data; itself where nothing is left to learn."""
        ...

    def state(self) -> dict[str, Tensor]:
        """What identifies the codes' frames, and what was learnt from data."""
        ...


class MseQuantiser:
    """One part: the direction rotated and rounded, times a scale."""

    def __init__(self, rotation: Rotation, bits: int, scale: str):
        self.rotation, self.scale = rotation, scale
        self.codebook = sphere_codebook(rotation.d, bits)
        self.centroids = [self.codebook.centroids.float()]

    def encode(self, x: Tensor) -> list[Encoded]:
        tokens = max(1, PIECE // (x.shape[1] * x.shape[2]))
        pieces = [encode_directions(piece, self.rotation, self.codebook, self.scale) for piece in x.split(tokens)]
        codes, scales = zip(*pieces, strict=True)
        return [(torch.cat(codes), torch.cat(scales))]

    def project(self, q: Tensor) -> list[Tensor]:
        return [self.rotation.apply(q)]

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        return self.rotation.invert(parts[0])

    def factors(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """left [a, a], right [b, b] and signs [a b], where `assemble` is `left X right * signs`, of x as X [a, b]."""
        return self.rotation.inverse_factors()

    def learnt(self, x: Tensor) -> MseQuantiser:
        return self

    def state(self) -> dict[str, Tensor]:
        signs = self.rotation.signs
        return {"rotation": self.rotation.matrix} if signs is None else {"signs": signs.to(torch.int8)}


class ProdQuantiser:
    """Two parts: bits - 1 bits for the direction (none at 1 bit), and the signs of a sketch of what is left."""

    def __init__(self, rotation: Rotation, sketch: Tensor, bits: int):
        self.sketch = sketch  # Gaussian [d, d]
        self.direction = None if bits == 1 else MseQuantiser(rotation, bits - 1, "norm")
        signs = torch.tensor([-1.0, 1.0])
        self.centroids = [signs] if self.direction is None else [*self.direction.centroids, signs]

    def encode(self, x: Tensor) -> list[Encoded]:
        norm = torch.linalg.vector_norm(x, dim=-1)
        residual, parts = x, []
        if self.direction is not None:
            parts = self.direction.encode(x)
            decoded = [
                scale[..., None] * centroids.to(scale)[codes.int()]
                for (codes, scale), centroids in zip(parts, self.direction.centroids, strict=True)
            ]
            residual = x - self.direction.assemble(decoded)
        left = torch.where(norm > 0, torch.linalg.vector_norm(residual, dim=-1), 0)
        signs = (qjl_sketch(residual, self.sketch) > 0).to(torch.uint8)
        return [*parts, (signs, left * (math.sqrt(math.pi / 2) / x.shape[-1]))]

    def project(self, q: Tensor) -> list[Tensor]:
        sketched = q @ self.sketch.to(q).T
        return [sketched] if self.direction is None else [*self.direction.project(q), sketched]

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        residual = parts[-1] @ self.sketch.to(parts[-1])
        return residual if self.direction is None else self.direction.assemble(parts[:-1]) + residual

    def learnt(self, x: Tensor) -> ProdQuantiser:
        return self

    def state(self) -> dict[str, Tensor]:
        return {"sketch": self.sketch, **({} if self.direction is None else self.direction.state())}


class SplitQuantiser:
    """Channels that stand out, chosen once for each head, and the others, each part with a quantiser of its own.

    The channels are those of largest mean square among the first `sample` tokens that are encoded, see `learnt`;
    paired: as pairs (m, m + d / 2), between which RoPE moves energy. channels: int16 [heads, count], once chosen.
    """

    def __init__(
        self,
        outliers: Quantiser,
        others: Quantiser,
        count: int,
        *,
        paired: bool,
        sample: int,
        channels: Tensor | None = None,
    ):
        self.halves = (outliers, others)
        self.count, self.paired, self.sample, self.channels = count, paired, sample, channels
        self._orders: dict[int, Tensor] = {}
        self.centroids = [*outliers.centroids, *others.centroids]

    def encode(self, x: Tensor) -> list[Encoded]:
        return [part for half, x in zip(self.halves, self._split(x), strict=True) for part in half.encode(x)]

    def project(self, q: Tensor) -> list[Tensor]:
        return [part for half, q in zip(self.halves, self._split(q), strict=True) for part in half.project(q)]

    def assemble(self, parts: Sequence[Tensor]) -> Tensor:
        first = len(self.halves[0].centroids)
        halves = [self.halves[0].assemble(parts[:first]), self.halves[1].assemble(parts[first:])]
        joined = torch.cat(halves, -1)
        order = self._order(joined.shape[1], joined.shape[-1])
        return torch.empty_like(joined).scatter_(-1, order.expand(len(joined), -1, -1), joined)

    def learnt(self, x: Tensor) -> SplitQuantiser:
        return self if self.channels is not None else self.using(self._choose(x[: self.sample]))

    def using(self, channels: Tensor) -> SplitQuantiser:
        """One with channels that were chosen before: int16 [heads, count]."""
        return SplitQuantiser(*self.halves, self.count, paired=self.paired, sample=self.sample, channels=channels)

    def state(self) -> dict[str, Tensor]:
        channels = torch.empty(0, dtype=torch.int16) if self.channels is None else self.channels
        halves = zip(("outliers", "others"), self.halves, strict=True)
        named = {f"{half}_{name}": x for half, part in halves for name, x in part.state().items()}
        return {"channels": channels, **named}

    def _split(self, x: Tensor) -> tuple[Tensor, Tensor]:
        order = self._order(x.shape[1], x.shape[-1])
        ordered = x.gather(-1, order.expand(len(x), -1, -1))
        return ordered[..., : self.count].contiguous(), ordered[..., self.count :].contiguous()

    def _order(self, heads: int, d: int) -> Tensor:
        """int64 [heads, d]: the channels that stand out, then the others; query heads follow their key head."""
        if heads not in self._orders:
            assert self.channels is not None
            chosen = self.channels.long()
            mask = torch.zeros(len(chosen), d, dtype=torch.bool, device=chosen.device).scatter_(1, chosen, True)
            others = (~mask).nonzero()[:, 1].view(len(chosen), -1)
            self._orders[heads] = torch.cat([chosen, others], 1).repeat_interleave(heads // len(chosen), 0)
        return self._orders[heads]

    def _choose(self, x: Tensor) -> Tensor:
        energy = x.square().mean(0)  # [heads, d]
        if not self.paired:
            return energy.topk(self.count, -1).indices.sort(-1).values.to(torch.int16)
        half = x.shape[-1] // 2
        pairs = (energy[:, :half] + energy[:, half : 2 * half]).topk(self.count // 2, -1).indices.sort(-1).values
        return torch.cat([pairs, pairs + half], -1).to(torch.int16)


def gaussian_sketch(d: int, *seed: int) -> Tensor:
    """Independent N(0, 1): float32 [d, d]."""
    return torch.from_numpy(np.random.default_rng(seed).standard_normal((d, d))).float()
