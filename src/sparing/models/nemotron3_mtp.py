"""Nemotron 3's head for several tokens at once (MTP): two layers that draft from the target's own hidden states.

Entry i of the head is made from token i + 1 and the target's state at i, and predicts token i + 2. Drafts chain: the
head's own output stands in for the state that the target has not computed yet, until it has.
Source: vLLM `nemotron_h_mtp.py` (post-norm states are handed over, embedding half first).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sparing.config.numbers import whole
from sparing.config.policy import parse_policy
from sparing.config.roles import Tensors
from sparing.memory.plan import plan_memory
from sparing.memory.sequence import Memory
from sparing.models.base import RecurrentBatch
from sparing.models.batch import RaggedBatch, Row
from sparing.models.layers import Linear, Network, RMSNorm
from sparing.models.nemotron3 import Layer, Nemotron3, run_layers

__all__ = ["MTPHead", "mtp_draft"]


class MTPHead(Network):
    """The head of one target, whose embeddings and output head it uses. Parameters carry their checkpoint names."""

    def __init__(self, target: Nemotron3):
        super().__init__()
        self._target = (target,)  # no parameters of the head's own
        config = self.config = target.config.mtp.text
        size, eps = config.hidden_size, config.rms_norm_eps
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layers)
        self.layers[0].enorm = RMSNorm(size, eps)
        self.layers[0].hnorm = RMSNorm(size, eps)
        self.layers[0].eh_proj = Linear(2 * size, size, bias=False)
        self.layers[-1].final_layernorm = RMSNorm(size, eps)

    def tensors(self) -> Tensors:
        tensors = self._target[0].config.mtp.tensors()
        return {name.removeprefix("mtp."): tensor for name, tensor in tensors.items()}

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

    def forward(self, batch: RecurrentBatch, hidden: Tensor) -> Tensor:
        """States [carried tokens, H] of entries, whose next ids are in the batch; hidden: [tokens, H], states at i."""
        first, last = self.layers[0], self.layers[-1]
        embedded = self._target[0].backbone.embeddings(batch.ids)
        pair = (first.enorm(embedded), first.hnorm(hidden))  # type: ignore[operator]
        x = first.eh_proj(torch.cat(pair, -1))  # type: ignore[operator]
        layers = range(len(self.layers))
        return last.final_layernorm(run_layers(self.layers, x, batch, layers, self.config.memory_layers))  # type: ignore[operator]

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], hidden: Tensor) -> tuple[Tensor, Tensor]:
        """(logits float32 [rows, V] of the token after next, states [rows, H]) at each row's last entry.

        rows: tokens i + 1 of the entries to stage, in the head's memories; hidden: [tokens, H] states at i of all rows.
        If anything raises, no memory has changed.
        """
        batch = RaggedBatch([Row(row.tokens, row.memory, wanted=1) for row in rows])
        try:
            states = self(batch, hidden)
            return self._target[0].head(states), states
        except BaseException:
            batch.rollback()
            raise


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
