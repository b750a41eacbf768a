"""Nemotron 3's head for several tokens at once (MTP): two layers that draft from the target's own hidden states.

Entry i of the head is made from token i + 1 and the target's state at i, and predicts token i + 2. Drafts chain: the
head's own output stands in for the state that the target has not computed yet, until it has.
Source: vLLM `nemotron_h_mtp.py` (post-norm states are handed over, embedding half first).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from sparing.config.nemotron3 import Nemotron3Config
from sparing.config.numbers import whole
from sparing.config.roles import Tensors
from sparing.errors import CheckpointError
from sparing.memory.sequence import Memory
from sparing.models.base import RecurrentBatch
from sparing.models.batch import Row
from sparing.models.drafting_head import DraftingHead
from sparing.models.layers import Linear, RMSNorm
from sparing.models.nemotron3 import Layer, Nemotron3, run_layers

__all__ = ["MTPHead", "mtp_draft"]


class MTPHead(DraftingHead):
    """The head of a Nemotron 3 model."""

    _target: tuple[Nemotron3]
    config: Nemotron3Config

    def __init__(self, target: Nemotron3):
        config = target.config.mtp.text
        super().__init__(target, config)
        size, eps = config.hidden_size, config.rms_norm_eps
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layers)
        self.layers[0].enorm = RMSNorm(size, eps)
        self.layers[0].hnorm = RMSNorm(size, eps)
        self.layers[0].eh_proj = Linear(2 * size, size, bias=False)
        self.layers[-1].final_layernorm = RMSNorm(size, eps)

    def tensors(self) -> Tensors:
        tensors = self._target[0].config.mtp.tensors()
        return {name.removeprefix("mtp."): tensor for name, tensor in tensors.items()}

    def check(self, stored: Iterable[str], path: str) -> None:
        stored = [name for name in stored if "mtp." in name]
        if stored and not self.config.memory_layers:
            raise CheckpointError(f"{path}: a drafting head of {' '.join(self.config.layers)} sees no other token")
        super().check(stored, path)

    def forward(self, batch: RecurrentBatch, hidden: Tensor) -> Tensor:
        """States [carried tokens, H] of entries, whose next ids are in the batch; hidden: [tokens, H], states at i."""
        first, last = self.layers[0], self.layers[-1]
        embedded = self._target[0].backbone.embeddings(batch.ids)
        pair = (first.enorm(embedded), first.hnorm(hidden))  # type: ignore[operator]
        x = first.eh_proj(torch.cat(pair, -1))  # type: ignore[operator]
        layers = range(len(self.layers))
        return last.final_layernorm(run_layers(self.layers, x, batch, layers, self.config.memory_layers))  # type: ignore[operator]


def mtp_draft(head: MTPHead, token: Tensor, hidden: Tensor, kv: Memory, depth: int) -> tuple[Tensor, Tensor]:
    """Draft the most likely tokens one after the other.

    token: int64 [k], the newest certain tokens, i + 1 for hidden [k, H], the target's final-normed states at i, none of
    which the head has seen; kv: the head's memory, which keeps their k entries and forgets those of drafts.
    Returns (drafts int64 [depth], float32 logits [depth, V] each is the most likely of). Depth 0 changes nothing.
    Raises ValueError for other shapes or types, and ids out of range. Source: Nemotron 3, drafting with one set of
    weights for every depth.
    """
    config = head.config
    depth = whole("depth", depth, 0)
    if not isinstance(token, Tensor) or token.ndim != 1 or len(token) == 0 or token.dtype != torch.int64:
        given = f"{token.dtype} {list(token.shape)}" if isinstance(token, Tensor) else repr(token)
        raise ValueError(f"token is {given}: give an int64 tensor [k] of at least one id")
    if hidden.shape != (len(token), config.hidden_size):
        raise ValueError(
            f"hidden has shape {list(hidden.shape)}: {len(token)} tokens take [{len(token)}, {config.hidden_size}]"
        )
    if bad := [i for i in (int(token.min()), int(token.max())) if not 0 <= i < config.vocab_size]:
        raise ValueError(f"token id {bad[0]} is out of range: the vocabulary has {config.vocab_size} entries")
    drafts: list[Tensor] = []
    found: list[Tensor] = []
    chained = hidden[:0]
    # Step 0 commits the k certain tokens. Later ones commit nothing and run all drafts so far anew: entries made of the
    # head's own guesses must leave no trace.
    for step in range(depth):
        logits, state = head.run([Row(torch.cat(drafts) if step else token, kv)], chained if step else hidden)
        kv.commit(0 if step else len(token))
        drafts.append(logits.argmax(-1))
        found.append(logits)
        chained = torch.cat([chained, state])
    if depth == 0:
        return token[:0], hidden.new_zeros(0, config.vocab_size).float()
    return torch.cat(drafts), torch.cat(found)
