"""Lloyd-Max codebooks of one coordinate of a random unit vector, and of the normal distribution it tends to.

A coordinate t of a uniform point of the unit sphere in d dimensions has density proportional to
(1 - t^2)^((d - 3) / 2). With t = sin(a) the density in a is cos(a)^(d - 2), smooth up to both ends, so that
Gauss-Legendre sums are exact to rounding in every cell. Source: TurboQuant (arXiv 2504.19874), section 3.1.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

__all__ = ["Codebook", "lloyd_max_codebook"]

LLOYD_STEPS = 30  # then Newton's converge at once; Lloyd's alone would take tens of thousands at 8 bits
NODES, WEIGHTS = np.polynomial.legendre.leggauss(32)
PIECES = 12  # parts the outermost cell is summed in
REACH = 13.0  # standard deviations beyond which the density is below rounding
FINEST = 4096  # cells of the search grid


def lloyd_max_codebook(d: int | None, bits: int) -> tuple[Tensor, Tensor, float]:
    """The codebook of least mean squared error: (centroids [2^bits], boundaries [2^bits - 1], error).

    d: vector size (at least 2), in units of a unit vector's coordinate; None: the standard normal distribution. The
    error is that of one coordinate; d times it is the relative squared error of a vector. float64, ascending,
    symmetric. Computed once and kept: do not write into the tensors. Raises ValueError for d < 2 or bits not 1..8.
    Source: Lloyd (1982), Max (1960).

    >>> lloyd_max_codebook(3, 1)[0]  # the sphere's coordinate is uniform in three dimensions
    tensor([-0.5000,  0.5000], dtype=torch.float64)
    """
    if d is not None and d < 2:
        raise ValueError(f"d is {d}: a codebook needs vectors of at least 2 coordinates")
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}: use 1 to 8")
    return _solve(d, bits)


class Codebook:
    """Centroids [2^bits] and boundaries [2^bits - 1], ascending, and a search for the centroid of a value."""

    def __init__(self, centroids: Tensor, boundaries: Tensor | None = None):
        self.centroids = centroids
        self.boundaries = (centroids[1:] + centroids[:-1]) / 2 if boundaries is None else boundaries
        self._grids: dict[tuple[torch.dtype, torch.device], tuple[float, float, Tensor, Tensor] | None] = {}

    def assign(self, values: Tensor) -> Tensor:
        """uint8 of the values' shape: how many boundaries are at or below each (one on a boundary goes up)."""
        key = values.dtype, values.device
        if key not in self._grids:
            self._grids[key] = self._grid(values)
        if (grid := self._grids[key]) is None:
            return torch.bucketize(values, self.boundaries.to(values), right=True).to(torch.uint8)
        # An even grid holds at most one boundary a cell: one look-up says how many lie below the cell, another where
        # the boundary inside is. Ten times as fast as a binary search.
        factor, offset, below, inside = grid
        flat = values.flatten()
        cell = (flat * factor + offset).clamp_(0, len(below) - 1).int()
        return (below.index_select(0, cell).add_(flat >= inside.index_select(0, cell))).view(values.shape)

    def _grid(self, like: Tensor) -> tuple[float, float, Tensor, Tensor] | None:
        bounds = self.boundaries.to(like)
        gap = float(bounds.diff().min()) if len(bounds) > 1 else 1.0
        cells = 2 * math.ceil(float(bounds[-1] - bounds[0]) / gap) + 4
        if cells > FINEST:
            return None
        factor, offset = 2 / gap, 2 - float(bounds[0]) * 2 / gap
        place = (bounds * factor + offset).clamp_(0, cells - 1).long()  # by the arithmetic that values go through
        below = torch.searchsorted(place, torch.arange(cells, device=like.device)).to(torch.uint8)
        inside = bounds.new_full((cells,), math.inf)
        inside[place] = bounds
        return factor, offset, below, inside


@lru_cache(maxsize=256)
def _solve(d: int | None, bits: int) -> tuple[Tensor, Tensor, float]:
    # The best centroids are the means of their cells: Lloyd's steps come near, Newton's on mean(c) - c = 0 converge.
    # The law is symmetric, so only the positive half is solved: the first edge is 0, all c > 0.
    law = _Law(d)
    c = law.starting_centroids(2 ** (bits - 1))  # the positive half
    for step in range(LLOYD_STEPS + 30):
        edges = np.concatenate(([0.0], (c[1:] + c[:-1]) / 2, [law.end]))
        mass, mean, _ = law.cells(edges, c)
        change = mean - c
        if step >= LLOYD_STEPS:
            change = np.linalg.solve(np.eye(len(c)) - _jacobian(law, edges, mean, mass), change)
        c = c + change
        if step >= LLOYD_STEPS and np.abs(change).max() < 1e-15 * law.scale:
            break
    edges = np.concatenate(([0.0], (c[1:] + c[:-1]) / 2, [law.end]))
    error = 2 * law.cells(edges, c)[2].sum()
    inner = edges[1:-1]
    boundaries = np.concatenate((-inner[::-1], [0.0], inner))
    return torch.from_numpy(np.concatenate((-c[::-1], c))), torch.from_numpy(boundaries), float(error)


def _jacobian(law: _Law, edges: np.ndarray, mean: np.ndarray, mass: np.ndarray) -> np.ndarray:
    """How the cells' means move with the centroids: [n, n], tridiagonal, as an edge is the mean of its neighbours."""
    density = law.density(edges[1:-1])
    upper = density * (edges[1:-1] - mean[:-1]) / mass[:-1]  # by the edge above cell i
    lower = density * (mean[1:] - edges[1:-1]) / mass[1:]  # by the edge below cell i + 1
    below, above = np.concatenate(([0.0], lower)), np.concatenate((upper, [0.0]))
    return (np.diag(below + above) + np.diag(upper, 1) + np.diag(lower, -1)) / 2


class _Law:
    """A symmetric density on [-end, end] and its moments over cells."""

    def __init__(self, d: int | None):
        self.d = d
        self.end = math.inf if d is None else 1.0
        self.scale = 1.0 if d is None else d**-0.5
        log_constant = -0.5 * math.log(2 * math.pi)
        if d is not None:
            log_constant = math.lgamma(d / 2) - math.lgamma((d - 1) / 2) - 0.5 * math.log(math.pi)
        self.constant = math.exp(log_constant)

    def density(self, t: np.ndarray) -> np.ndarray:
        if self.d is None:
            return self.constant * np.exp(-t * t / 2)
        return self.constant * (1 - t * t) ** ((self.d - 3) / 2)

    def cells(self, edges: np.ndarray, c: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Mass, mean, and integral of (t - c)^2 of the cells between n + 1 ascending edges: [n] each."""
        # With t = sin(x) the density (1 - t^2)^((d - 3) / 2) dt is cos(x)^(d - 2) dx: smooth up to the end for every d,
        # so a fixed Gauss rule per cell is exact to rounding.
        start = edges[:-1] if self.d is None else np.arcsin(edges[:-1])
        furthest = start[-1] + REACH * self.scale
        stop = np.append(edges[1:-1], furthest)
        if self.d is not None:
            stop = np.append(np.arcsin(edges[1:-1]), min(furthest, math.pi / 2))
        # All cells but the last are narrow. The last is cut into pieces, and its moments about its centroid summed.
        cuts = np.linspace(start[-1], stop[-1], PIECES + 1)
        low, high = np.append(start[:-1], cuts[:-1]), np.append(stop[:-1], cuts[1:])
        centre = np.append(c[:-1], np.full(PIECES, c[-1]))[:, None]
        half = (high - low)[:, None] / 2
        x = (high + low)[:, None] / 2 + half * NODES  # [pieces, nodes]
        if self.d is None:
            t, density = x, np.exp(-x * x / 2)
        else:
            t, density = np.sin(x), np.cos(x) ** (self.d - 2)
        weighted = self.constant * half * WEIGHTS * density
        moments = [(weighted * (t - centre) ** power).sum(1) for power in range(3)]
        mass, first, second = (np.append(m[: len(c) - 1], m[len(c) - 1 :].sum()) for m in moments)
        return mass, c + first / mass, second

    def starting_centroids(self, n: int) -> np.ndarray:
        """Quantiles of density^(1/3), the best density of centroids in the limit of many."""
        if self.d is None:
            t = np.linspace(0, REACH, 4096)
            share = np.exp(-t * t / 6)
        else:
            angle = np.linspace(0, math.pi / 2, 4096)
            t, share = np.sin(angle), np.maximum(np.cos(angle), 0.0) ** ((self.d - 3) / 3 + 1)
        total = np.cumsum(share)
        return np.interp((np.arange(n) + 0.5) / n, total / total[-1], t)
