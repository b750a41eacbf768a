"""DeepSeek-V4: several residual streams, attention over a window and compressed entries, and a mixture of experts.

Every layer is attention and experts. Around each of the two, learned mappings collapse the streams into one input and
spread its output over them (`kernels/hyper_connections.py`). Queries see the last tokens as they are, and older ones in
entries that stand for 4 tokens, of which an indexer chooses, or for 128 (`memory/compressed.py`). Keys are values, of
one head, and carry their rotation, so what attention mixes is turned back by the position of the query.
Source: transformers `modeling_deepseek_v4.py`; the authors' `inference/model.py`, where streams mix in float32.
"""

from __future__ import annotations

from itertools import islice
from typing import Protocol

import torch
from torch import Tensor, nn

from sparing import kernels
from sparing.config.deepseek_v4 import CSA, SLIDING, DeepseekV4Config, DeepseekV4Layer
from sparing.config.roles import Tensors
from sparing.config.rope import RopeParameters
from sparing.kernels.hyper_connections import hc_head, hc_post, hc_pre
from sparing.kernels.products import WeightStack
from sparing.models.base import Batch, LanguageModel
from sparing.models.layers import Embedding, GatedMLP, Linear, RMSNorm

__all__ = ["CompressedBatch", "DeepseekV4", "Layer", "Pass"]


class CompressedBatch(Batch, Protocol):
    """What a forward with compressed attention needs of its rows on top."""

    def closed(self, ratio: int) -> Tensor:
        """int64 [n]: numbers of the windows of `ratio` tokens that become complete in this pass, row after row."""
        ...

    def pool(self, layer: int, kv: Tensor, gate: Tensor, position_bias: Tensor, *, keys: bool = False) -> Tensor: ...

    def emit(self, layer: int, entries: Tensor, *, keys: bool = False) -> None: ...

    def selects(self, layer: int) -> bool: ...

    def attend_compressed(
        self,
        layer: int,
        q: Tensor,
        kv: Tensor,
        sinks: Tensor,
        scale: float,
        asked: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor: ...


class Turn:
    """A rotation of tokens: interleaved pairs at the end of a head, by float32 cos and sin whatever is turned."""

    def __init__(self, positions: Tensor, inv_freq: Tensor):
        self.cos, self.sin = kernels.rope_tables(positions, inv_freq, torch.float32)  # [tokens, 1, pairs]
        self.back_sin = -self.sin

    def __call__(self, x: Tensor) -> Tensor:
        """x: [tokens, heads, size]"""
        return kernels.rotate(x, self.cos, self.sin, layout="pairs", last=True)

    def back(self, x: Tensor) -> Tensor:
        return kernels.rotate(x, self.cos, self.back_sin, layout="pairs", last=True)

    def normed(self, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        return kernels.norm_rotate(x, weight, self.cos, self.sin, eps, layout="pairs", last=True)

    def narrow(self, kept: Tensor) -> None:
        self.cos, self.sin, self.back_sin = self.cos[kept], self.sin[kept], self.back_sin[kept]


class Pass:
    """What all layers of a pass share: ids, and the rotations of tokens and of the windows that become complete."""

    def __init__(self, batch: CompressedBatch, config: DeepseekV4Config):
        self.batch, self._config, self._kept = batch, config, None
        self._turns: dict[RopeParameters, Turn] = {}
        self._closed: dict[int, Turn] = {}

    @property
    def ids(self) -> Tensor:
        """int64 [carried tokens], which only layers that choose experts by them read."""
        return self.batch.ids if self._kept is None else self.batch.ids[self._kept]

    def turn(self, rope: RopeParameters) -> Turn:
        """Of the carried tokens."""
        if (found := self._turns.get(rope)) is None:
            found = self._turns[rope] = Turn(self.batch.positions, self._frequencies(rope))
        return found

    def closed(self, ratio: int, rope: RopeParameters) -> Turn:
        """Of the first tokens of the windows that become complete."""
        if (found := self._closed.get(ratio)) is None:
            positions = self.batch.closed(ratio) * ratio
            found = self._closed[ratio] = Turn(positions, self._frequencies(rope))
        return found

    def narrow(self) -> Tensor | None:
        """From here on only the tokens whose outputs are read: their indices, None for all."""
        kept = self._kept = self.batch.narrow()
        if kept is not None:
            for turn in self._turns.values():
                turn.narrow(kept)
        return kept

    def _frequencies(self, rope: RopeParameters) -> Tensor:
        return kernels.inverse_frequencies(rope, self._config.head_dim)[0]


class HyperConnection(nn.Module):
    """The mappings around one part of a layer; `eps` of the norm of all streams together."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        n, size = config.hc_mult, config.hidden_size
        self.fn = nn.Parameter(torch.empty((2 + n) * n, n * size))
        self.base = nn.Parameter(torch.empty((2 + n) * n))
        self.scale = nn.Parameter(torch.empty(3))
        self.numbers = config.hc_sinkhorn_iters, config.hc_eps, config.rms_norm_eps

    def forward(self, streams: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """streams: [tokens, n, H] -> (input [tokens, H], post [tokens, n], comb [tokens, n, n])"""
        return hc_pre(streams, self.fn, self.base, self.scale, *self.numbers)


class StreamHead(nn.Module):
    """Makes one stream of all, for the final norm."""

    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        n, size = config.hc_mult, config.hidden_size
        self.hc_fn = nn.Parameter(torch.empty(n, n * size))
        self.hc_base = nn.Parameter(torch.empty(n))
        self.hc_scale = nn.Parameter(torch.empty(1))
        self.numbers = config.hc_eps, config.rms_norm_eps

    def forward(self, streams: Tensor) -> Tensor:
        """[..., n, H] -> [..., H]"""
        return hc_head(streams, self.hc_fn, self.hc_base, self.hc_scale, *self.numbers)


class Compressor(nn.Module):
    """Entries of `size` numbers for each window of tokens; windows that overlap have two series of each token."""

    def __init__(self, config: DeepseekV4Config, layer: DeepseekV4Layer, size: int):
        super().__init__()
        rows = size * (2 if layer.kind == CSA else 1)
        self.kv_proj = Linear(config.hidden_size, rows, bias=False)
        self.gate_proj = Linear(config.hidden_size, rows, bias=False)
        self.position_bias = nn.Parameter(torch.empty(layer.ratio, rows))
        self.kv_norm = RMSNorm(size, config.rms_norm_eps)
        self.indexer: Indexer | None = None

    def compress(self, h: Tensor, i: int, batch: CompressedBatch, closed: Turn, *, keys: bool) -> None:
        """Take in h [tokens, H], and write the entries of the windows that become complete.

        keys: of the indexer, which learns by itself: no gradient reaches what it is made of.
        """
        h = h.detach() if keys else h
        kv, gate = kernels.linear_pair(h, self.kv_proj.weight, self.gate_proj.weight, wide=True)
        pooled = batch.pool(i, kv, gate, self.position_bias, keys=keys)
        if len(pooled):
            entries = closed.normed(pooled.to(h.dtype)[:, None], self.kv_norm.weight, self.kv_norm.eps)
            batch.emit(i, entries[:, 0], keys=keys)


class Indexer(Compressor):
    """Chooses entries for each query: a compressor of its own makes keys, the queries' latent makes what asks."""

    def __init__(self, config: DeepseekV4Config, layer: DeepseekV4Layer):
        super().__init__(config, layer, config.index_head_dim)
        self.heads, self.size = config.index_n_heads, config.index_head_dim
        self.q_b_proj = Linear(config.q_lora_rank, self.heads * config.index_head_dim, bias=False)
        self.scorer = nn.Module()
        self.scorer.weights_proj = Linear(config.hidden_size, self.heads, bias=False)

    def ask(self, latent: Tensor, h: Tensor, turn: Turn) -> tuple[Tensor, Tensor]:
        """(queries [tokens, heads, size], weights float32 [tokens, heads]); no gradient goes further back from them."""
        latent, h = latent.detach(), h.detach()
        weights: Tensor = self.scorer.weights_proj(h)  # type: ignore[operator]
        return turn(self.q_b_proj(latent).view(len(h), self.heads, self.size)), weights.float() * self.heads**-0.5


class Attention(nn.Module):
    def __init__(self, config: DeepseekV4Config, layer: DeepseekV4Layer, rope: RopeParameters):
        super().__init__()
        size, heads, d, eps = config.hidden_size, config.num_attention_heads, config.head_dim, config.rms_norm_eps
        self.heads, self.groups, self.ratio, self.rope, self.eps = heads, config.o_groups, layer.ratio, rope, eps
        self.size, self.scale = d, d**-0.5
        self.q_a_proj = Linear(size, config.q_lora_rank, bias=False)
        self.q_a_norm = RMSNorm(config.q_lora_rank, eps)
        self.q_b_proj = Linear(config.q_lora_rank, heads * d, bias=False)
        self.kv_proj = Linear(size, d, bias=False)
        self.kv_norm = RMSNorm(d, eps)
        self.sinks = nn.Parameter(torch.empty(heads))
        self.o_a_proj = Linear(heads * d // self.groups, self.groups * config.o_lora_rank, bias=False)
        self.o_b_proj = Linear(self.groups * config.o_lora_rank, size, bias=False)
        self.compressor = None if layer.kind == SLIDING else Compressor(config, layer, d)
        if self.compressor is not None and layer.kind == CSA:
            self.compressor.indexer = Indexer(config, layer)

    def group_matrices(self) -> Tensor | WeightStack:
        """[groups, o_lora_rank, heads of a group * head_dim]"""
        weight = self.o_a_proj.weight
        if isinstance(weight, Tensor):
            return weight.view(self.groups, -1, weight.shape[1])
        return weight.stacked(self.groups)

    def forward(self, h: Tensor, i: int, of: Pass, is_last: bool) -> tuple[Tensor, Tensor | None]:
        """h: [tokens, H] -> ([carried tokens, H], what `narrow` kept)."""
        batch, turn = of.batch, of.turn(self.rope)
        kv = turn.normed(self.kv_proj(h)[:, None], self.kv_norm.weight, self.eps)[:, 0]  # [tokens, d]
        compressor = self.compressor
        indexer = None if compressor is None else compressor.indexer
        if compressor is not None:
            compressor.compress(h, i, batch, of.closed(self.ratio, self.rope), keys=False)
        if indexer is not None:
            indexer.compress(h, i, batch, of.closed(self.ratio, self.rope), keys=True)
        kept = of.narrow() if is_last else None
        h = h if kept is None else h[kept]
        latent = self.q_a_norm(self.q_a_proj(h))
        q = turn.normed(self.q_b_proj(latent).view(len(h), self.heads, self.size), None, self.eps)
        asked = indexer.ask(latent, h, turn) if indexer is not None and batch.selects(i) else None
        mixed = turn.back(batch.attend_compressed(i, q, kv, self.sinks, self.scale, asked))  # as q
        if len(mixed) == 0:
            return h, kept
        mixed = kernels.grouped_linear(mixed.view(len(mixed), self.groups, -1), self.group_matrices())
        return self.o_b_proj(mixed.flatten(-2)), kept


class Router(nn.Module):
    """What chooses experts: by a score of each, or by a table of the experts of each token id."""

    e_score_correction_bias: Tensor
    tid2eid: Tensor

    def __init__(self, config: DeepseekV4Config, layer: DeepseekV4Layer):
        super().__init__()
        experts, k = config.num_experts, config.top_k_experts
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size))
        if layer.is_hash:
            self.register_buffer("tid2eid", torch.empty(config.vocab_size, k, dtype=torch.int64))
        else:
            self.register_buffer("e_score_correction_bias", torch.empty(experts))


class Experts(nn.Module):
    """Router, routed experts and the shared one. In hash layers a token's id says which experts it goes to."""

    def __init__(self, config: DeepseekV4Config, layer: DeepseekV4Layer):
        super().__init__()
        size, experts, width = config.hidden_size, config.num_experts, config.moe_intermediate_size
        self.k, self.scoring, self.scale = config.top_k_experts, config.scoring_func, config.routed_scaling_factor
        self.limit, self.is_hash = config.swiglu_limit, layer.is_hash
        self.gate = Router(config, layer)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, size))
        self.experts.down_proj = nn.Parameter(torch.empty(experts, size, width))
        self.shared_experts = GatedMLP(size, width, "silu", limit=config.swiglu_limit)

    def route(self, x: Tensor, ids: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(experts int64 [tokens, k], weights float32 [tokens, k]) of x [tokens, H]; ids: of the tokens, where they
        choose."""
        gate = self.gate
        bias = None if self.is_hash else gate.e_score_correction_bias
        chosen = gate.tid2eid[ids] if self.is_hash and ids is not None else None
        return kernels.route(x, gate.weight, bias, self.k, scoring=self.scoring, ids=chosen, scale=self.scale)

    def forward(self, x: Tensor, ids: Tensor | None) -> Tensor:
        """[tokens, H] -> [tokens, H]"""
        chosen, weights = self.route(x, ids)
        up: Tensor = self.experts.gate_up_proj  # type: ignore[assignment]
        down: Tensor = self.experts.down_proj  # type: ignore[assignment]
        return kernels.grouped_experts(
            x, weights, chosen, up, down, kernels.gated_silu, self.limit
        ) + self.shared_experts(x)


class Layer(nn.Module):
    def __init__(self, config: DeepseekV4Config, layer: DeepseekV4Layer, rope: RopeParameters):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.attn_hc, self.ffn_hc = HyperConnection(config), HyperConnection(config)
        self.input_layernorm, self.post_attention_layernorm = RMSNorm(size, eps), RMSNorm(size, eps)
        self.self_attn = Attention(config, layer, rope)
        self.mlp = Experts(config, layer)

    def forward(self, streams: Tensor, i: int, of: Pass, is_last: bool = False) -> Tensor:
        """[tokens, n, H] -> [carried tokens, n, H]"""
        h, post, comb = self.attn_hc(streams)
        mixed, kept = self.self_attn(self.input_layernorm(h), i, of, is_last)
        if kept is not None:
            streams, post, comb = streams[kept], post[kept], comb[kept]
            if len(streams) == 0:
                return streams
        streams = hc_post(streams, mixed, post, comb)
        h, post, comb = self.ffn_hc(streams)
        ids = of.ids if self.mlp.is_hash else None
        return hc_post(streams, self.mlp(self.post_attention_layernorm(h), ids), post, comb)


class Stack(nn.Module):
    def __init__(self, config: DeepseekV4Config):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        ropes = config.layer_ropes()
        self.layers = nn.ModuleList(Layer(config, *pair) for pair in zip(config.layers, ropes, strict=True))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.hc_head = StreamHead(config)

    def forward(self, batch: CompressedBatch, trace: list[Tensor] | None = None, layers: range | None = None) -> Tensor:
        """The streams after the last of these layers: [wanted tokens, n, H]."""
        of, layers = Pass(batch, self.config), range(len(self.layers)) if layers is None else layers
        streams = batch.hidden  # [tokens, n, H]
        if streams is None:
            streams = self.embed_tokens(batch.ids)[:, None].repeat(1, self.config.hc_mult, 1)
        if trace is not None:
            trace.append(streams)
        for i, layer in enumerate(islice(self.layers, layers.start, layers.stop), layers.start):
            streams = layer(streams, i, of, trace is None and i == layers.stop - 1)
            if trace is not None:
                trace.append(streams)
        return streams


class DeepseekV4(LanguageModel):
    """V4-Pro, V4-Flash, or another of their kind. Parameters carry the names that transformers gives them."""

    config: DeepseekV4Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: DeepseekV4Config):
        super().__init__(config)
        self.model = Stack(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(  # type: ignore[override]
        self, batch: CompressedBatch, trace: list[Tensor] | None = None, layers: range | None = None
    ) -> Tensor:
        """Streams [wanted tokens, n, H] after these layers (None: all); `collapsed` makes one of them."""
        return self.model(batch, trace, layers)

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        return self.config.hc_mult, self.config.hidden_size

    def tensors(self) -> Tensors:
        """Also of the drafting head, `mtp`, which a recipe trains as part of the model."""
        return super().tensors() | self.config.mtp.tensors()

    def collapsed(self, hidden: Tensor) -> Tensor:
        """What the output head multiplies: final-normed [..., H] of streams [..., n, H]."""
        return self.model.norm(self.model.hc_head(hidden))

    def output_table(self) -> Tensor:
        return self.lm_head.weight
