"""Output head, soft cap and cross-entropy in one pass that never holds the logits of more than a few rows.

Both gradients of a softmax cross-entropy are known as soon as its value is, so they are made while a chunk of logits
is still in the cache; on a CPU the head of a small model is bound by memory, not by arithmetic.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["capped_cross_entropy"]

CHUNK_BYTES = 1 << 19  # of logits: what the second-level cache holds


def capped_cross_entropy(hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor, cap: float | None) -> Tensor:
    """`sum_i weights[i] * CE(cap * tanh(hidden[i] @ table^T / cap), targets[i])`, differentiable in hidden and table.

    hidden: float32 [N, H]; table: float32 [V, H]; targets: int64 [N]; weights: float32 [N]; cap: None for no soft cap.
    """
    return _CappedCrossEntropy.apply(hidden, table, targets, weights, cap)


class _CappedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, targets: Tensor, weights: Tensor, cap: float | None) -> Tensor:
        total = hidden.new_zeros(())
        d_hidden, d_table = torch.empty_like(hidden), torch.zeros_like(table)
        rows = max(1, CHUNK_BYTES // (4 * len(table)))
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            h, target, weight = hidden[part], targets[part, None], weights[part, None]
            squashed = h @ table.T  # [rows, V]
            if cap is not None:
                squashed.div_(cap).tanh_()
            logits = squashed if cap is None else squashed * cap
            log_z = logits.logsumexp(-1, keepdim=True)
            total += ((log_z - logits.gather(-1, target)) * weight).sum()
            gradient = (logits - log_z).exp_()
            gradient.scatter_add_(-1, target, -torch.ones_like(weight)).mul_(weight)
            if cap is not None:
                gradient.addcmul_(gradient * squashed, squashed, value=-1)  # times 1 - tanh^2
            torch.mm(gradient, table, out=d_hidden[part])
            d_table.addmm_(gradient.T, h)
        ctx.save_for_backward(d_hidden, d_table)
        return total

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        d_hidden, d_table = ctx.saved_tensors
        return d_hidden * grad_outputs[0], d_table * grad_outputs[0], None, None, None
