"""Orthogonal matrices that spread a vector evenly over its coordinates: Haar by QR, and randomised Hadamard.

Source: Zandieh et al., "TurboQuant" (arXiv 2504.19874), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparing.kernels.hadamard import hadamard_factors, hadamard_matrices, kronecker_rows, multiply_rows

__all__ = ["ROTATIONS", "Rotation", "make_rotation", "random_rotation"]

ROTATIONS = ("rht", "haar", "hadamard", "identity")
SMALL = 64  # up to this size one product with the whole matrix is faster


def random_rotation(
    d: int, seed: int | Sequence[int] | None = None, A: Any = None, dtype: torch.dtype = torch.float64
) -> Tensor:
    """A uniformly (Haar) distributed orthogonal matrix [d, d]: Q of A = QR with each column times sign(R_jj).

    A: square matrix of independent N(0, 1), by default drawn from numpy's `default_rng(seed)`. Without the signs the
    distribution would depend on the linear algebra library's convention. Raises ValueError if A is not [d, d].
    Source: TurboQuant, section 3.

    >>> random_rotation(2, A=[[-3.0, 1.0], [0.0, 2.0]])
    tensor([[-1.,  0.],
            [ 0.,  1.]], dtype=torch.float64)
    """
    drawn = np.random.default_rng(seed).standard_normal((d, d)) if A is None else A
    matrix = torch.as_tensor(drawn, dtype=torch.float64)
    if matrix.shape != (d, d):
        raise ValueError(f"A has shape {list(matrix.shape)}, expected [{d}, {d}]")
    q, r = torch.linalg.qr(matrix)
    signs = torch.where(r.diagonal() < 0, -1.0, 1.0).to(q)
    return (q * signs + 0.0).to(dtype)  # + 0.0: no negative zeros


class Rotation:
    """An orthogonal matrix that is applied to vectors [..., d]: in full, or as a fast transform.

    matrix: [d, d], for Haar and explicit rotations. signs: [d] of +-1, for Hadamard transforms H diag(signs) / sqrt(d),
    which take d * (sum of the factors) operations instead of d * d.
    """

    def __init__(self, d: int, *, matrix: Tensor | None = None, signs: Tensor | None = None):
        self.d = d
        self.signs = None if signs is None else signs.float()
        self._whole = None if matrix is None else matrix.contiguous()  # what is multiplied with, if anything
        self._factors: list[Tensor] = []
        if self.signs is not None:
            self._factors = [(matrix / len(matrix) ** 0.5).float() for matrix in hadamard_matrices(d)]
            if d <= SMALL:
                self._whole = self.matrix

    @cached_property
    def matrix(self) -> Tensor:
        """[d, d]."""
        return self.apply(torch.eye(self.d)).T.contiguous() if self._whole is None else self._whole

    def apply(self, x: Tensor) -> Tensor:
        """Matrix times each vector: `x @ matrix^T`. x: [..., d] in a type it is computed in."""
        if self._whole is not None:
            return multiply_rows(x, self._whole.to(x).T)
        assert self.signs is not None
        return kronecker_rows(x * self.signs.to(x), self._factors)

    def invert(self, x: Tensor) -> Tensor:
        """Transposed matrix times each vector: `x @ matrix`."""
        if self._whole is not None:
            return multiply_rows(x, self._whole.to(x))
        assert self.signs is not None
        return kronecker_rows(x, [factor.T for factor in self._factors]) * self.signs.to(x)

    def inverse_factors(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """left [a, a], right [b, b] and signs [d], where `invert(x)` is `left X right * signs`, of x as X [a, b].

        None: there are not two factors.
        """
        if self._whole is not None or len(self._factors) != 2:
            return None
        assert self.signs is not None
        return self._factors[0].T, self._factors[1], self.signs


@lru_cache(maxsize=1024)
def make_rotation(kind: str, d: int, *seed: int) -> Rotation:
    """The rotation that a kind and a seed determine; the same object each time.

    kind: "rht" (random signs, then Hadamard; Haar where d allows no Hadamard matrix), "haar", "hadamard" (no signs) or
    "identity". seed: any whole numbers, as layer and role. Raises ValueError for an unknown kind, or "hadamard" of a d
    that is not a power of two, nor 12 or 20 times one.
    """
    if kind not in ROTATIONS:
        raise ValueError(f"rotation={kind!r} is not known, use {', '.join(ROTATIONS)} or a pair of matrices")
    if kind == "identity":
        return Rotation(d, matrix=torch.eye(d))
    if hadamard_factors(d) is None:
        if kind == "hadamard":
            raise ValueError(f"rotation='hadamard': there is none of size {d} here, use 'rht' or 'haar'")
        kind = "haar"
    if kind == "haar":
        return Rotation(d, matrix=random_rotation(d, seed, dtype=torch.float32))
    signs = np.ones(d) if kind == "hadamard" else np.random.default_rng(seed).choice([-1.0, 1.0], d)
    return Rotation(d, signs=torch.as_tensor(signs))
