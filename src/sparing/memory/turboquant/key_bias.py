"""What a bias in the key projection adds to every key: known in advance, so it need not be quantised.

A key is `rope(W h + b, position) = rope(W h, position) + rope(b, position)`. The second part is the same for every
sequence; in Qwen2 its norm is up to forty times that of the first, and would take all the bits. It is subtracted before
a key becomes codes, and its logits `<q, rope(b, position)>` are added exactly: for each pair of dimensions that turn
together a cosine and a sine of the position, with coefficients of the query.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparing.config.rope import RopeParameters
from sparing.kernels.partial import group_rows, ungroup_rows
from sparing.kernels.rope import rotate, rotation_table

__all__ = ["KeyBias"]


class KeyBias:
    """The bias of one layer's key projection, [kv_heads, head_dim], and how it turns with the position."""

    def __init__(self, bias: Tensor, rope: RopeParameters):
        self.bias = bias.detach().float()
        self._table = rotation_table(rope, bias.shape[-1], torch.float32, bias.device)

    def rotated(self, positions: Tensor) -> Tensor:
        """`rope(b, position)`: float32 [kv_heads, n, head_dim] for positions [n] or [kv_heads, n]."""
        cos, sin = self._table(positions)
        heads = self.bias[:, None].expand(-1, positions.shape[-1], -1)
        return rotate(heads, cos, sin)

    def logits(self, q: Tensor, positions: Tensor) -> Tensor:
        """`<q, rope(b, position)>`: float32 [T, heads, n] for q [T, heads, head_dim] and positions as above."""
        kv_heads, d = self.bias.shape
        cos, sin = self._table(positions)  # [n, pairs] or [kv_heads, n, pairs]
        half = cos.shape[-1]
        parts = [half, half, d - 2 * half]
        q1, q2, passing = group_rows(q.float(), kv_heads).split(parts, -1)  # [kv_heads, group * T, ...]
        b1, b2, fixed = self.bias[:, None].split(parts, -1)
        turning = (q1 * b1 + q2 * b2) @ cos.transpose(-1, -2) + (q2 * b1 - q1 * b2) @ sin.transpose(-1, -2)
        return ungroup_rows(turning + (passing * fixed).sum(-1, keepdim=True), len(q))
