"""Hadamard transforms: products with an orthogonal matrix whose numbers are all alike in size, factor by factor.

A matrix of order d = a b is the Kronecker product of two smaller ones, so that d (a + b) multiplications do the work of
d^2. Of powers of two it is Sylvester's: entry (i, j) is negative where i and j have an odd number of bits in common.
Source: Sylvester (1867); Paley (1933) for orders 12 and 20.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
from torch import Tensor

__all__ = ["hadamard", "hadamard_factors", "hadamard_matrices", "kronecker_rows", "multiply_rows"]

PALEY = (20, 12)  # orders with q = 19, 11 that are not powers of two
LARGEST_FACTOR = 32  # of a fast transform: one small product for each factor
FEW_ROWS = 16


def hadamard(x: Tensor) -> Tensor:
    """The normalised Walsh-Hadamard transform of x [..., d] in Sylvester's order: in float32, in x's dtype at the end.

    It is its own inverse. Raises ValueError where d is not a power of two.

    >>> hadamard(torch.tensor([1.0, 2.0, 3.0, 4.0]))
    tensor([ 5., -1., -2.,  0.])
    """
    if not x.ndim or x.shape[-1].bit_count() != 1:
        raise ValueError(f"a Hadamard transform needs a size that is a power of two, found shape {list(x.shape)}")
    size = x.shape[-1]
    return (kronecker_rows(x.float(), hadamard_matrices(size)) * size**-0.5).to(x.dtype)


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


@cache
def hadamard_matrices(d: int) -> tuple[Tensor, ...]:
    """float64 matrices of +-1 whose Kronecker product is one of order d, the first on the left; none where d has
    none."""
    return tuple(map(_hadamard_of, hadamard_factors(d) or []))


def _hadamard_of(order: int) -> Tensor:
    """Sylvester's [order, order], or that of Paley's first construction."""
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


def kronecker_rows(x: Tensor, factors: Sequence[Tensor]) -> Tensor:
    """The Kronecker product of square matrices times each vector of x [..., d]: each acts on its own axis of x seen as
    [..., a, b, c]."""
    shape, after = x.shape, x.shape[-1]
    for factor in factors:
        order = len(factor)
        after //= order
        factor = factor.to(x)
        # [rows, order, after]: the last axis is the fast one
        x = multiply_rows(x.reshape(-1, order), factor.T) if after == 1 else factor @ x.reshape(-1, order, after)
    return x.reshape(shape)


def multiply_rows(x: Tensor, matrix: Tensor) -> Tensor:
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
