"""Codes of vectors in plain tensors, as a kernel reads them."""

import torch
from torch import Tensor

from sparing.kernels.code_layout import BLOCK, lay_out
from sparing.kernels.codes import Codes
from sparing.memory.turboquant.coder import Coder


def as_codes(coder: Coder, x: Tensor) -> list[Codes]:
    """x: [n, heads, d]. coder: one that has learnt what it needs."""
    found, blocks = [], -(-len(x) // BLOCK)
    for (codes, scale), centroids, bits, dims in zip(
        coder.encode(x), coder.centroids, coder.bits, coder.dims, strict=True
    ):
        padded = torch.zeros(coder.heads, blocks * BLOCK, dtype=scale.dtype)
        padded[:, : len(scale)] = scale.T
        laid_out = lay_out(codes.transpose(0, 1), bits, coder.role)
        found.append(Codes(laid_out, padded.unflatten(1, (blocks, BLOCK)), centroids, dims))
    return found
