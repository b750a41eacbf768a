"""DeepSeek-V4's head for several tokens at once (MTP): one layer more, which drafts from the target's own streams.

Entry i of the head is made from token i + 1 and the target's streams at i, before they become one, and predicts token
i + 2; the first entry of a text has no embedding. Drafts chain: the streams that the head itself ends with stand in for
those that the target has not computed yet.
Source: the authors' `inference/model.py`; vLLM's port for the first entry and for what chained drafts are made from.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor

from sparing.config.deepseek_v4 import DeepseekV4Config
from sparing.config.roles import Tensors
from sparing.errors import CheckpointError
from sparing.models.deepseek_v4 import CompressedBatch, DeepseekV4, Layer, Pass, StreamHead
from sparing.models.drafting_head import DraftingHead
from sparing.models.layers import Linear, RMSNorm

__all__ = ["DeepseekV4MTP"]


class DraftingLayer(Layer):
    """A layer, what joins tokens and streams before it, and what makes one stream of all after it."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__(config, config.layers[0], config.layer_ropes()[0])
        size, eps = config.hidden_size, config.rms_norm_eps
        self.e_proj, self.h_proj = Linear(size, size, bias=False), Linear(size, size, bias=False)
        self.enorm, self.hnorm, self.norm = RMSNorm(size, eps), RMSNorm(size, eps), RMSNorm(size, eps)
        self.hc_head = StreamHead(config)


class DeepseekV4MTP(DraftingHead):
    """The head of a DeepSeek-V4 model."""

    _target: tuple[DeepseekV4]
    config: DeepseekV4Config

    def __init__(self, target: DeepseekV4):
        super().__init__(target, target.config.mtp.text)
        self.add_module("0", DraftingLayer(self.config))  # as checkpoints name it

    def tensors(self) -> Tensors:
        tensors = self._target[0].config.mtp.tensors()
        return {name.removeprefix("mtp."): tensor for name, tensor in tensors.items()}

    @property
    def layer(self) -> DraftingLayer:
        layer = self.get_submodule("0")
        assert isinstance(layer, DraftingLayer)
        return layer

    def check(self, stored: Iterable[str], path: str) -> None:
        stored = list(stored)
        self._target[0].config.mtp.refuse_later(stored, path)
        super().check(stored, path)
        if len(self.config.layers) > 1:
            raise CheckpointError(f"{path} drafts by {len(self.config.layers)} heads in turn: one depth is supported")

    def forward(self, batch: CompressedBatch, hidden: Tensor) -> Tensor:
        """Streams [carried tokens, n, H] of entries, whose next ids are in the batch; hidden: [tokens, n, H], at i."""
        layer = self.layer
        embedded = layer.enorm(self._target[0].model.embed_tokens(batch.ids))
        embedded = embedded.masked_fill((batch.positions == 0)[:, None], 0.0)
        streams = layer.e_proj(embedded)[:, None] + layer.h_proj(layer.hnorm(hidden))
        return layer(streams, 0, Pass(batch, self.config), is_last=True)

    def collapsed(self, states: Tensor) -> Tensor:
        return self.layer.norm(self.layer.hc_head(states))
