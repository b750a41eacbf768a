"""The loss of a model that learns to predict: the next token from the model, the ones after it from its own head.

Head, depth d (MTP): entry i is made from token i + d and the state at i, the model's own for d = 1, the
head's of depth d - 1 after that, and predicts token i + d + 1. All depths share one set of weights, as drafts chain.
Source: Nemotron 3 Super, arXiv 2604.12374; DeepSeek-V4, arXiv 2606.19348; Megatron-LM `multi_token_prediction`.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing import kernels
from sparing.config.deepseek_v4 import DeepseekV4Config
from sparing.config.memory import AttentionSpec, RecurrentSpec
from sparing.config.protocol import ModelConfig
from sparing.models.base import LanguageModel
from sparing.models.drafting_head import DraftingHead
from sparing.training.balance import sequence_balance_of
from sparing.training.block_diffusion import EncodePass, Examples
from sparing.training.compressed import CompressedPass
from sparing.training.cross_entropy import capped_cross_entropy

__all__ = ["CausalPass", "NextTokenLosses", "causal_pass", "next_token_loss"]

CHUNK = 32  # tokens of a scan's matrices: the least work at the lengths that small models train on


class CausalPass(EncodePass):
    """Whole rows of equal length through a stack of attention and Mamba layers, all of them from an empty memory."""

    def __init__(self, ids: Tensor, config: ModelConfig):
        """ids: int64 [B, T]."""
        self.specs = config.memory_specs()
        super().__init__(ids, [spec.window if isinstance(spec, AttentionSpec) else None for spec in self.specs])

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


def causal_pass(ids: Tensor, config: ModelConfig) -> CausalPass | CompressedPass:
    """The pass over rows int64 [B, T] that suits the layers of a config."""
    return CompressedPass(ids, config) if isinstance(config, DeepseekV4Config) else CausalPass(ids, config)


@dataclass(frozen=True)
class NextTokenLosses:
    """Mean cross-entropies in nats per token: of the next one, and of the one after d more, by the head at depth d.

    indexer: where entries are chosen, how far from attention an indexer scores them, the mean over layers;
    balance: where experts are watched, how unevenly a text uses them (`sequence_balance`).
    """

    next_token: Tensor
    mtp: list[Tensor]
    scale: float
    indexer: Tensor | None = None
    balance: Tensor | None = None
    balance_scale: float = 0.0

    @property
    def total(self) -> Tensor:
        """The head's depths count `scale` together."""
        total = self.next_token + sum(self.mtp, torch.zeros(())) * (self.scale / max(1, len(self.mtp)))
        if self.indexer is not None:
            total = total + self.indexer
        return total if self.balance is None else total + self.balance * self.balance_scale

    @property
    def parts(self) -> dict[str, Tensor]:
        parts = {"next_token": self.next_token, **{f"mtp_{d}": loss for d, loss in enumerate(self.mtp, 1)}}
        more = {"indexer": self.indexer, "balance": self.balance}
        return parts | {name: loss for name, loss in more.items() if loss is not None}


def next_token_loss(
    model: LanguageModel,
    head: DraftingHead | None,
    examples: Examples,
    depth: int = 2,
    scale: float = 0.3,
    balance_scale: float = 0.0,
) -> NextTokenLosses:
    """All losses of a batch of text. Gradients of the head's reach the model, its embeddings and output head.

    head: None for a model without one; depth: how many tokens after the next one it learns to draft; scale: of its
    losses in the total; balance_scale: of the unevenness with which each text uses experts, of a model that is watched.
    """
    ids = examples.ids  # [B, T]
    rows, tokens = ids.shape
    length = examples.prefix + examples.valid.sum(1) * ((tokens - examples.prefix) // examples.valid.shape[1])
    batch = causal_pass(ids, model.config)
    states = model(batch).unflatten(0, (rows, -1))  # [B, T, H], or [B, T, streams, H]

    def predict(states: Tensor, ahead: int, of: LanguageModel | DraftingHead) -> Tensor:
        """states: [B, T - ahead + 1, ...], of which i predicts token i + ahead."""
        pairs = torch.arange(ahead, tokens) < length[:, None]  # [B, T - ahead]: targets that are text, not padding
        weights = torch.full((int(pairs.sum()),), 1.0 / max(1, int(pairs.sum())))
        return capped_cross_entropy(
            of.collapsed(states[:, :-1][pairs]).float(), model.output_table(), ids[:, ahead:][pairs], weights, None
        )

    next_token, drafts = predict(states, 1, model), []
    misjudged = batch.index_losses if isinstance(batch, CompressedPass) else []
    for d in range(1, depth + 1):
        if head is None:
            break
        # As when drafting: entry i joins the embedding of token i + d with the state before it, which at depth 1 is the
        # model's and after that the head's own. One step deeper there is one token less to predict from.
        deeper = causal_pass(ids[:, d:], head.config)
        states = head(deeper, states[:, : tokens - d].flatten(0, 1)).unflatten(0, (rows, -1))
        drafts.append(predict(states, d + 1, head))
    indexer = torch.stack(misjudged).mean() if misjudged else None
    balance = sequence_balance_of(model, rows) if balance_scale else None
    return NextTokenLosses(next_token, drafts, scale, indexer, balance, balance_scale)
