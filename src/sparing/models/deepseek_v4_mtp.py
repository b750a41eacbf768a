"""DeepSeek-V4's head for several tokens at once (MTP): one layer more, which drafts from the target's own streams.

Entry i of the head is made from token i + 1 and the target's streams at i, before they become one, and predicts token
i + 2; the first entry of a text has no embedding. Drafts chain: the streams that the head itself ends with stand in for
those that the target has not computed yet.
Source: the authors' `inference/model.py`; vLLM's port for the first entry and for what chained drafts are made from.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from sparing.config.deepseek_v4 import DeepseekV4Config
from sparing.config.policy import parse_policy
from sparing.config.roles import Role
from sparing.memory.plan import plan_memory
from sparing.memory.sequence import Memory
from sparing.models.batch import RaggedBatch, Row
from sparing.models.deepseek_v4 import CompressedBatch, DeepseekV4, Layer, Pass, StreamHead
from sparing.models.layers import Linear, Network, RMSNorm

__all__ = ["DeepseekV4MTP"]


class DraftingLayer(Layer):
    """A layer, what joins tokens and streams before it, and what makes one stream of all after it."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__(config, config.layers[0], config.layer_ropes()[0])
        size, eps = config.hidden_size, config.rms_norm_eps
        self.e_proj, self.h_proj = Linear(size, size, bias=False), Linear(size, size, bias=False)
        self.enorm, self.hnorm, self.norm = RMSNorm(size, eps), RMSNorm(size, eps), RMSNorm(size, eps)
        self.hc_head = StreamHead(config)


class DeepseekV4MTP(Network):
    """The head of one target, whose embeddings and output head it uses. Parameters carry their checkpoint names."""

    def __init__(self, target: DeepseekV4):
        super().__init__()
        self._target = (target,)  # no parameters of the head's own
        self.config = target.config.mtp.text
        self.add_module("0", DraftingLayer(self.config))  # as checkpoints name it

    def roles(self) -> dict[str, Role]:
        tensors = self._target[0].config.mtp.tensors()
        return {name.removeprefix("mtp."): role for name, (_, role) in tensors.items()}

    @property
    def layer(self) -> DraftingLayer:
        layer = self.get_submodule("0")
        assert isinstance(layer, DraftingLayer)
        return layer

    def memory(self) -> Memory:
        """An empty memory for one sequence: the head's own entries."""
        target, specs = self._target[0], self.config.memory_specs()
        none = [None] * len(specs)
        return plan_memory(
            specs,
            parse_policy("dense"),
            dtype=target.dtype,
            device=target.device,
            keys_from_values=none,
            key_biases=none,
        ).memory()

    def forward(self, batch: CompressedBatch, hidden: Tensor) -> Tensor:
        """Streams [carried tokens, n, H] of entries, whose next ids are in the batch; hidden: [tokens, n, H], at i."""
        layer = self.layer
        embedded = layer.enorm(self._target[0].model.embed_tokens(batch.ids))
        embedded = embedded.masked_fill((batch.positions == 0)[:, None], 0.0)
        streams = layer.e_proj(embedded)[:, None] + layer.h_proj(layer.hnorm(hidden))
        return layer(streams, 0, Pass(batch, self.config), is_last=True)

    def head(self, streams: Tensor) -> Tensor:
        """float32 logits [..., V] of the head's streams [..., n, H]."""
        return self._target[0].product(self.layer.norm(self.layer.hc_head(streams)))

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(logits float32 [rows, V] of the token after next, streams [rows, n, H]) at each row's last entry.

        rows: tokens i + 1 of the entries to stage, in the head's memories; hidden: [tokens, n, H], the target's streams
        at i of all rows. If anything raises, no memory has changed.
        """
        batch = RaggedBatch([Row(row.tokens, row.memory, wanted=1) for row in rows])
        try:
            streams = self(batch, hidden)
            return self.head(streams), streams
        except BaseException:
            batch.rollback()
            raise
