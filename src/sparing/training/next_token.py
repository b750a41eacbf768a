"""The loss of a hybrid that learns to predict: the next token from the model, the ones after it from its own head.

Head, depth d (Nemotron 3's MTP): entry i is made from token i + d and the state at i, the model's own for d = 1, the
head's of depth d - 1 after that, and predicts token i + d + 1. All depths share one set of weights, as drafts chain.
Source: Nemotron 3 Super, arXiv 2604.12374; Megatron-LM `multi_token_prediction`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing import kernels
from sparing.config.memory import RecurrentSpec
from sparing.config.nemotron3 import Nemotron3Config
from sparing.models.nemotron3 import Nemotron3
from sparing.models.nemotron3_mtp import MTPHead
from sparing.training.block_diffusion import EncodePass, Examples
from sparing.training.cross_entropy import capped_cross_entropy

__all__ = ["CausalPass", "NextTokenLosses", "next_token_loss"]

CHUNK = 32  # tokens of a scan's matrices: the least work at the lengths that small models train on


class CausalPass(EncodePass):
    """Whole rows of equal length through a stack of attention and Mamba layers, all of them from an empty memory."""

    def __init__(self, ids: Tensor, config: Nemotron3Config):
        """ids: int64 [B, T]."""
        super().__init__(ids, [None] * config.num_hidden_layers)
        self.specs = config.memory_specs()

    def scan(self, layer: int, xbc: Tensor, dt: Tensor, weights: kernels.MambaWeights) -> Tensor:
        """xbc: [B * T, C]; dt: float32 [B * T, heads]; returns float32 [B * T, heads, head_dim].

        The rows lie side by side, as if they were more channels, heads and groups of one.
        """
        spec, rows = self.specs[layer], self.rows
        assert isinstance(spec, RecurrentSpec)
        heads, shared = spec.num_heads, spec.num_groups * spec.state_size
        padded = F.pad(_side_by_side(xbc, rows), (0, 0, spec.conv_kernel - 1, 0))
        bias = None if weights.conv_bias is None else weights.conv_bias.repeat(rows)
        mixed = kernels.causal_conv(padded, weights.conv_weight.repeat(rows, 1, 1), bias)
        x, b, c = mixed.unflatten(-1, (rows, -1)).split([heads * spec.head_dim, shared, shared], -1)
        # Each head's tokens one after the other, as products of many small matrices want them.
        x = x.unflatten(-1, (heads, -1)).permute(1, 2, 0, 3).flatten(0, 1).contiguous().transpose(0, 1)
        y, _ = kernels.ssd_scan(
            x,
            _side_by_side(dt, rows),
            weights.A.repeat(rows),
            b.reshape(self.tokens, rows * spec.num_groups, spec.state_size),
            c.reshape(self.tokens, rows * spec.num_groups, spec.state_size),
            weights.D.repeat(rows),
            chunk=CHUNK,
            final_state=False,
        )
        return y.unflatten(1, (rows, heads)).transpose(0, 1).flatten(0, 1)


def _side_by_side(x: Tensor, rows: int) -> Tensor:
    """[B * T, n] -> [T, B * n]"""
    return x.unflatten(0, (rows, -1)).transpose(0, 1).flatten(1)


@dataclass(frozen=True)
class NextTokenLosses:
    """Mean cross-entropies in nats per token: of the next one, and of the one after d more, by the head at depth d."""

    next_token: Tensor
    mtp: list[Tensor]
    scale: float

    @property
    def total(self) -> Tensor:
        """The head's depths count `scale` together."""
        return self.next_token + sum(self.mtp, torch.zeros(())) * (self.scale / max(1, len(self.mtp)))

    @property
    def parts(self) -> dict[str, Tensor]:
        return {"next_token": self.next_token, **{f"mtp_{d}": loss for d, loss in enumerate(self.mtp, 1)}}


def next_token_loss(
    model: Nemotron3, head: MTPHead, examples: Examples, depth: int = 2, scale: float = 0.3
) -> NextTokenLosses:
    """Both losses of a batch of text. Gradients of the head's reach the model, its embeddings and output head.

    depth: how many tokens after the next one the head learns to draft; scale: of its losses in the total.
    """
    ids = examples.ids  # [B, T]
    rows, tokens = ids.shape
    length = examples.prefix + examples.valid.sum(1) * ((tokens - examples.prefix) // examples.valid.shape[1])
    states = model(CausalPass(ids, model.config)).unflatten(0, (rows, -1))  # [B, T, H]

    def predict(states: Tensor, ahead: int) -> Tensor:
        """states: [B, T - ahead + 1, H], of which i predicts token i + ahead."""
        pairs = torch.arange(ahead, tokens) < length[:, None]  # [B, T - ahead]: targets that are text, not padding
        weights = torch.full((int(pairs.sum()),), 1.0 / max(1, int(pairs.sum())))
        return capped_cross_entropy(
            states[:, :-1][pairs].float(), model.output_table(), ids[:, ahead:][pairs], weights, None
        )

    next_token, drafts = predict(states, 1), []
    for d in range(1, depth + 1):
        # As when drafting: entry i joins the embedding of token i + d with the state before it, which at depth 1 is the
        # model's and after that the head's own. One step deeper there is one token less to predict from.
        batch = CausalPass(ids[:, d:], head.config)
        states = head(batch, states[:, : tokens - d].flatten(0, 1)).unflatten(0, (rows, -1))
        drafts.append(predict(states, d + 1))
    return NextTokenLosses(next_token, drafts, scale)
