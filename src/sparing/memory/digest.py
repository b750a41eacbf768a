"""A digest that tells one model's weights from another's."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["weights_digest"]

SAMPLED = 64  # numbers of a tensor, about


def weights_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """A digest of samples of tensors: differs between fine-tunes of one model.

    tensors: in order; the parts of a packed matrix (codes, scales) under their names, a dense one under "". The same
    for a checkpoint in float32 and in bfloat16; another where matrices are packed, and for every format: what is
    computed with them is another thing then, if not by much.
    """
    found = hashlib.sha256()
    for part, tensor in tensors:
        flat = tensor.detach().flatten()
        sample = flat[:: max(1, len(flat) // SAMPLED)].contiguous()
        sample = sample if part else sample.bfloat16()
        found.update(part.encode() + sample.cpu().view(torch.uint8).numpy().tobytes())
    return found.hexdigest()[:16]
