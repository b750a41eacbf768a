"""Gemma 3: norms before and after each branch, QK-norm, five layers with a window for one that sees all.

Weights of all norms are stored around zero (`1 + w` multiplies); layers with a window turn by another table.
Source: transformers `modeling_gemma3.py`, google-deepmind/gemma `gm/nn`.
"""

from __future__ import annotations

from itertools import islice

from torch import Tensor, nn

from sparing import kernels
from sparing.config.gemma3 import Gemma3Config
from sparing.models.base import Batch, LanguageModel
from sparing.models.layers import GatedMLP, Linear, RMSNorm, ScaledEmbedding

__all__ = ["Gemma3"]

ONE = 1.0  # what is added to the weights of norms
Tables = tuple[Tensor, Tensor]  # cos, sin


class Attention(nn.Module):
    def __init__(self, config: Gemma3Config):
        super().__init__()
        size, d, bias = config.hidden_size, config.head_dim, config.attention_bias
        q_size, kv_size = config.num_attention_heads * d, config.num_key_value_heads * d
        self.head_dim, self.eps = d, config.rms_norm_eps
        self.q_proj = Linear(size, q_size, bias)
        self.k_proj = Linear(size, kv_size, bias)
        self.v_proj = Linear(size, kv_size, bias)
        self.o_proj = Linear(q_size, size, bias)
        self.q_norm = RMSNorm(d, self.eps, ONE)
        self.k_norm = RMSNorm(d, self.eps, ONE)

    def queries(self, h: Tensor, tables: Tables) -> Tensor:
        """[tokens, heads, head_dim]"""
        return self._turned(self.q_proj(h), self.q_norm, tables)

    def keys_values(self, h: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """Two tensors [tokens, kv_heads, head_dim]"""
        k_proj, v_proj = self.k_proj, self.v_proj
        k, v = kernels.linear_pair(h, k_proj.weight, v_proj.weight, k_proj.bias, v_proj.bias)
        return self._turned(k, self.k_norm, tables), v.unflatten(-1, (-1, self.head_dim))

    def _turned(self, x: Tensor, norm: RMSNorm, tables: Tables) -> Tensor:
        x = x.unflatten(-1, (-1, self.head_dim))
        return kernels.norm_rotate(x, norm.weight, *tables, self.eps, shift=ONE)


class DecoderLayer(nn.Module):
    def __init__(self, config: Gemma3Config):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.input_layernorm = RMSNorm(size, eps, ONE)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(size, eps, ONE)
        self.pre_feedforward_layernorm = RMSNorm(size, eps, ONE)
        self.mlp = GatedMLP(size, config.intermediate_size, "gelu")
        self.post_feedforward_layernorm = RMSNorm(size, eps, ONE)


class Stack(nn.Module):
    def __init__(self, config: Gemma3Config):
        super().__init__()
        self.config = config
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in config.kinds)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps, ONE)

    def forward(self, batch: Batch, trace: list[Tensor] | None = None, layers: range | None = None) -> Tensor:
        config, eps = self.config, self.config.rms_norm_eps
        first, stop = (0, config.num_hidden_layers) if layers is None else (layers.start, layers.stop)
        x = self.embed_tokens(batch.ids) if batch.hidden is None else batch.hidden  # [tokens, H]
        scale = config.query_pre_attn_scalar**-0.5
        tables: dict[str, Tables] = {}
        for kind in dict.fromkeys(config.kinds[first:stop]):
            inv_freq, sharpness = kernels.inverse_frequencies(config.rope[kind], config.head_dim)
            tables[kind] = kernels.rope_tables(batch.positions, inv_freq, x.dtype, sharpness)
        if trace is not None:
            trace.append(x)
        for i, layer in enumerate(islice(self.layers, first, stop), first):
            assert isinstance(layer, DecoderLayer)
            kind = config.kinds[i]
            h = layer.input_layernorm(x)
            k, v = layer.self_attn.keys_values(h, tables[kind])
            if i == stop - 1 and trace is None and (kept := batch.narrow()) is not None:
                # The last keys and values are made: positions whose output nobody reads end here.
                x, h, tables = x[kept], h[kept], {kind: (tables[kind][0][kept], tables[kind][1][kept])}
            mixed = batch.attend(i, layer.self_attn.queries(h, tables[kind]), k, v, scale)
            if len(x) == 0:
                return x
            mixed = layer.self_attn.o_proj(mixed.flatten(-2))
            norm, next_norm = layer.post_attention_layernorm.weight, layer.pre_feedforward_layernorm.weight
            x, h = kernels.residual_norm(x, mixed, next_norm, norm, eps, ONE)
            x = kernels.residual(x, layer.mlp(h), layer.post_feedforward_layernorm.weight, eps=eps, shift=ONE)
            if trace is not None:
                trace.append(x)
        return self.norm(x) if stop == config.num_hidden_layers else x


class Gemma3(LanguageModel):
    """A Gemma 3 text model of any size. Parameters carry their checkpoint names."""

    config: Gemma3Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: Gemma3Config):
        super().__init__(config)
        self.model = Stack(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, False)

    def forward(self, batch: Batch, trace: list[Tensor] | None = None, layers: range | None = None) -> Tensor:
        return self.model(batch, trace, layers)

    def output_table(self) -> Tensor:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def product(self, collapsed: Tensor) -> Tensor:
        logits, cap = kernels.linear(collapsed, self.output_table()), self.config.final_logit_softcapping
        return (logits if cap is None else kernels.softcap(logits, cap)).float()
