"""Orthogonal matrices that spread a vector evenly over its coordinates: Haar by QR, and randomised Hadamard.

Source: Zandieh et al., "TurboQuant" (arXiv 2504.19874), section 3; Paley (1933) for orders 12 and 20.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

__all__ = ["ROTATIONS", "Rotation", "hadamard_factors", "make_rotation", "random_rotation"]

ROTATIONS = ("rht", "haar", "hadamard", "identity")
PALEY = (20, 12)  # orders with q = 19, 11 that are not powers of two
LARGEST_FACTOR = 32  # of a fast transform: one small product for each factor
SMALL = 64  # up to this size one product with the whole matrix is faster
FEW_ROWS = 16


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


def hadamard_factors(d: int) -> list[int] | None:
    """Orders of small Hadamard matrices whose Kronecker product has order d, the first on the left; None: no such.

    d is a power of two, or 12 or 20 times one. d = 1 has no factors.
    """
    factors = []
    for order in PALEY:
        if d % order == 0 and (d // order).bit_count() == 1:
            factors, d = [order], d // order
            break
    if d < 1 or d.bit_count() != 1:
        return None
    while d > LARGEST_FACTOR:
        # Near-equal halves make the fewest operations: 512 = 16 x 32.
        half = 1 << min(d.bit_length() // 2, LARGEST_FACTOR.bit_length() - 1)
        factors, d = [*factors, half], d // half
    return [*factors, d] if d > 1 else factors


def _small_hadamard(order: int) -> Tensor:
    """float64 [order, order] of +-1: Sylvester's, or Paley's first construction."""
    if order not in PALEY:
        one, matrix = torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), torch.ones(1, 1).double()
        while len(matrix) < order:
            matrix = torch.kron(one, matrix)
        return matrix
    q = order - 1
    squares = {i * i % q for i in range(1, q)}
    legendre = torch.tensor([0.0] + [1.0 if i in squares else -1.0 for i in range(1, q)], dtype=torch.float64)
    skew = torch.zeros(order, order, dtype=torch.float64)
    skew[0, 1:], skew[1:, 0] = 1, -1
    index = torch.arange(q)
    skew[1:, 1:] = legendre[(index - index[:, None]) % q]
    return torch.eye(order, dtype=torch.float64) + skew


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
            orders = hadamard_factors(d) or []
            self._factors = [(_small_hadamard(order) / order**0.5).float() for order in orders]
            if d <= SMALL:
                self._whole = self.matrix

    @cached_property
    def matrix(self) -> Tensor:
        """[d, d]."""
        return self.apply(torch.eye(self.d)).T.contiguous() if self._whole is None else self._whole

    def apply(self, x: Tensor) -> Tensor:
        """Matrix times each vector: `x @ matrix^T`. x: [..., d] in a type it is computed in."""
        if self._whole is not None:
            return _multiply(x, self._whole.to(x).T)
        assert self.signs is not None
        return self._transform(x * self.signs.to(x), transposed=False)

    def invert(self, x: Tensor) -> Tensor:
        """Transposed matrix times each vector: `x @ matrix`."""
        if self._whole is not None:
            return _multiply(x, self._whole.to(x))
        assert self.signs is not None
        return self._transform(x, transposed=True) * self.signs.to(x)

    def inverse_factors(self) -> tuple[Tensor, Tensor, Tensor] | None:
        """left [a, a], right [b, b] and signs [d], where `invert(x)` is `left X right * signs`, of x as X [a, b].

        None: there are not two factors.
        """
        if self._whole is not None or len(self._factors) != 2:
            return None
        assert self.signs is not None
        return self._factors[0].T, self._factors[1], self.signs

    def _transform(self, x: Tensor, *, transposed: bool) -> Tensor:
        """The Kronecker product of the factors: each acts on its own axis of x seen as [..., a, b, c]."""
        shape, after = x.shape, self.d
        for factor in self._factors:
            order = len(factor)
            after //= order
            factor = factor.to(x).T if transposed else factor.to(x)
            # [rows, order, after]: the last axis is the fast one
            x = _multiply(x.reshape(-1, order), factor.T) if after == 1 else factor @ x.reshape(-1, order, after)
        return x.reshape(shape)


def _multiply(x: Tensor, matrix: Tensor) -> Tensor:
    """`x @ matrix`, each row the same to the bit however many there are and wherever it stands among them.

    Products of very few rows sum in another order, and those of odd sizes in one that depends on the row's place; in
    float64 that disappears in rounding.
    """
    rows = x.reshape(-1, x.shape[-1])
    n = len(rows)
    if n < FEW_ROWS:
        rows = torch.cat([rows, rows.new_zeros(FEW_ROWS - n, rows.shape[1])])
    if rows.shape[1] % 4:
        return (rows.double() @ matrix.double())[:n].to(x).reshape(x.shape)
    return (rows @ matrix)[:n].reshape(x.shape)


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
