"""Whole rows through DeepSeek-V4's attention, with gradients, and what its indexer and its router learn from.

An indexer chooses, and no gradient passes a choice: it learns to score entries as attention weighs them. The main model
learns nothing from that, as the indexer's inputs carry no gradient to it.
Source: DeepSeek-V3.2 (arXiv 2512.02556), training of the indexer; DeepSeek-V4, arXiv 2606.19348.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.config.deepseek_v4 import DeepseekV4Config
from sparing.config.memory import CompressedSpec
from sparing.kernels.compressor import compress_windows, csa_compress
from sparing.kernels.indexer import lightning_index
from sparing.training.block_diffusion import EncodePass

__all__ = ["CompressedPass"]


class CompressedPass(EncodePass):
    """Rows of equal length, all of them from an empty memory. index_losses: one for each layer that chose."""

    def __init__(self, ids: Tensor, config: DeepseekV4Config):
        """ids: int64 [B, T]."""
        super().__init__(ids, [None] * config.num_hidden_layers)
        self.specs = config.memory_specs()
        self.index_losses: list[Tensor] = []
        self._held: dict[tuple[int, bool], Tensor] = {}  # (layer, of the indexer) -> [B, windows, size]
        self._visible: dict[CompressedSpec, Tensor] = {}

    def closed(self, ratio: int) -> Tensor:
        return torch.arange(self.tokens // ratio).repeat(self.rows)

    def pool(self, layer: int, kv: Tensor, gate: Tensor, position_bias: Tensor, *, keys: bool = False) -> Tensor:
        kv, gate = (x.float().unflatten(0, (self.rows, -1)) for x in (kv, gate))
        if self.specs[layer].is_overlapping:
            return csa_compress(kv, gate, position_bias)[0].flatten(0, 1)
        return compress_windows(kv, gate, position_bias).flatten(0, 1)

    def emit(self, layer: int, entries: Tensor, *, keys: bool = False) -> None:
        self._held[layer, keys] = entries.unflatten(0, (self.rows, -1))

    def selects(self, layer: int) -> bool:
        spec = self.specs[layer]
        return spec.index is not None and spec.entries(self.tokens) > spec.index.topk

    def attend_compressed(
        self,
        layer: int,
        q: Tensor,
        kv: Tensor,
        sinks: Tensor,
        scale: float,
        asked: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `RaggedBatch`'s, over all keys under a mask: at these lengths that is faster than to gather them."""
        spec = self.specs[layer]
        q, keys = q.unflatten(0, (self.rows, -1)).transpose(1, 2), kv.unflatten(0, (self.rows, -1))  # [B, N, T, d]
        entries = self._held.get((layer, False), keys[:, :0])
        keys, visible = torch.cat([keys, entries.to(keys)], 1), self._seen(spec)
        scores = (q @ keys[:, None].mT).float() * scale  # [B, N, T, T + windows]
        asking: Tensor | None = None
        if asked is not None:
            asking = self._scores(layer, *asked)  # [B, T, windows]
            visible = visible.repeat(self.rows, 1, 1)
            visible[..., self.tokens :] &= self._chosen(spec, asking)
        scores = scores.masked_fill(~(visible if visible.ndim == 2 else visible[:, None]), -torch.inf)
        column = sinks.float()[:, None, None].expand(*scores.shape[:-1], 1)
        weights = torch.softmax(torch.cat([scores, column], -1), -1)[..., :-1]
        if asking is not None:
            self.index_losses.append(_misjudged(asking, weights[..., self.tokens :], visible[..., self.tokens :]))
        return (weights.to(keys.dtype) @ keys[:, None]).transpose(1, 2).flatten(0, 1)

    def _seen(self, spec: CompressedSpec) -> Tensor:
        """bool [T, T + windows]: tokens in the window, and the windows that are complete."""
        if (found := self._visible.get(spec)) is None:
            t, windows = torch.arange(self.tokens), torch.arange(spec.entries(self.tokens))
            back = t[:, None] - t
            recent = (back >= 0) & (back < spec.window)
            closed = windows < ((t + 1) // spec.ratio)[:, None] if spec.ratio else recent[:, :0]
            found = self._visible[spec] = torch.cat([recent, closed], 1)
        return found

    def _scores(self, layer: int, queries: Tensor, weights: Tensor) -> Tensor:
        """The indexer's scores [B, T, windows]."""
        keys = self._held[layer, True]
        queries, weights = (x.unflatten(0, (self.rows, -1)) for x in (queries, weights))
        return torch.stack([lightning_index(*row) for row in zip(queries, keys, weights, strict=True)])

    def _chosen(self, spec: CompressedSpec, scores: Tensor) -> Tensor:
        """bool [B, T, windows]: the entries of the highest scores among those that a query sees."""
        assert spec.index is not None
        closed = self._seen(spec)[:, self.tokens :]
        best = scores.detach().masked_fill(~closed, -torch.inf).topk(spec.index.topk, -1).indices
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(-1, best, True) & closed


def _misjudged(scores: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
    """How far the indexer's scores of chosen entries [B, T, windows] are from how attention [B, N, T, windows] weighs
    them: the mean of KL(attention, all heads together || softmax of scores) over queries that chose any."""
    target = weights.detach().sum(1)
    total = target.sum(-1, keepdim=True)
    any_chosen = chosen.any(-1) & (total[..., 0] > 0)
    target = (target / total)[any_chosen]
    logits = F.log_softmax(scores.masked_fill(~chosen, -torch.inf)[any_chosen], -1)
    return F.kl_div(logits.masked_fill(~chosen[any_chosen], 0.0), target, reduction="batchmean")
