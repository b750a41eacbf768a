"""Llama, Mistral, Qwen2 and Qwen3: pre-norm layers of grouped-head attention and a gated MLP.

Source: transformers `modeling_llama.py`, `modeling_mistral.py`, `modeling_qwen2.py`, `modeling_qwen3.py`.
"""

from __future__ import annotations

from itertools import islice

from torch import Tensor, nn

from sparing import kernels
from sparing.config.llama import LlamaConfig
from sparing.memory.turboquant.key_bias import KeyBias
from sparing.models.base import Batch, LanguageModel
from sparing.models.layers import Embedding, GatedMLP, Linear, RMSNorm

__all__ = ["Llama"]


class Attention(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(config.hidden_size, q_size, config.qkv_bias)
        self.k_proj = Linear(config.hidden_size, kv_size, config.qkv_bias)
        self.v_proj = Linear(config.hidden_size, kv_size, config.qkv_bias)
        self.o_proj = Linear(q_size, config.hidden_size, config.output_bias)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps) if config.qk_norm else None

    def queries(self, h: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """[tokens, heads, head_dim]"""
        return self._turned(self.q_proj(h), self.q_norm, cos, sin)

    def keys_values(self, h: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """Two tensors [tokens, kv_heads, head_dim]"""
        k_proj, v_proj = self.k_proj, self.v_proj
        k, v = kernels.linear_pair(h, k_proj.weight, v_proj.weight, k_proj.bias, v_proj.bias)
        return self._turned(k, self.k_norm, cos, sin), v.unflatten(-1, (-1, self.head_dim))

    def _turned(self, x: Tensor, norm: RMSNorm | None, cos: Tensor, sin: Tensor) -> Tensor:
        x = x.unflatten(-1, (-1, self.head_dim))
        return kernels.rotate(x, cos, sin) if norm is None else kernels.norm_rotate(x, norm.weight, cos, sin, norm.eps)


class DecoderLayer(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = GatedMLP(config.hidden_size, config.intermediate_size, "silu", config.mlp_bias)


class Stack(nn.Module):
    def __init__(self, config: LlamaConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, batch: Batch, trace: list[Tensor] | None = None, layers: range | None = None) -> Tensor:
        config = self.config
        first, stop = (0, config.num_hidden_layers) if layers is None else (layers.start, layers.stop)
        x = self.embed_tokens(batch.ids) if batch.hidden is None else batch.hidden  # [tokens, H]
        inv_freq, sharpness = kernels.inverse_frequencies(config.rope, config.head_dim)
        if config.rope.rope_type == "dynamic":
            inv_freq = kernels.dynamic_inv_freq(config.rope, config.head_dim, batch.lengths)
        cos, sin = kernels.rope_tables(batch.positions, inv_freq, x.dtype, sharpness)
        if trace is not None:
            trace.append(x)
        for i, layer in enumerate(islice(self.layers, first, stop), first):
            assert isinstance(layer, DecoderLayer)
            h = layer.input_layernorm(x)
            k, v = layer.self_attn.keys_values(h, cos, sin)
            if i == stop - 1 and trace is None and (kept := batch.narrow()) is not None:
                # The last keys and values are made: positions whose output nobody reads end here.
                x, h, cos, sin = x[kept], h[kept], cos[kept], sin[kept]
            mixed = batch.attend(i, layer.self_attn.queries(h, cos, sin), k, v, config.head_dim**-0.5)
            if len(x) == 0:
                return x
            mixed = layer.self_attn.o_proj(mixed.flatten(-2))
            x, h = kernels.residual_norm(x, mixed, layer.post_attention_layernorm.weight, eps=config.rms_norm_eps)
            x = kernels.residual(x, layer.mlp(h))
            if trace is not None:
                trace.append(x)
        return self.norm(x) if stop == config.num_hidden_layers else x


class Llama(LanguageModel):
    """One of the four model types. Parameters carry their checkpoint names."""

    config: LlamaConfig  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: LlamaConfig):
        super().__init__(config)
        self.model = Stack(config)
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, False)

    def forward(self, batch: Batch, trace: list[Tensor] | None = None, layers: range | None = None) -> Tensor:
        return self.model(batch, trace, layers)

    def output_table(self) -> Tensor:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def key_biases(self) -> list[KeyBias | None]:
        config = self.config
        # A norm after the projection mixes the bias with the rest, and "dynamic" angles differ between sequences.
        if not config.qkv_bias or config.qk_norm or config.rope.rope_type == "dynamic":
            return super().key_biases()
        biases = [layer.self_attn.k_proj.bias for layer in self.model.layers]  # type: ignore[union-attr]
        return [KeyBias(bias.view(-1, config.head_dim), config.rope) for bias in biases]  # type: ignore[union-attr]
