"""Gemma 4: every layer of the family in order of execution.

Norms before and after each branch, QK-norm with scale exactly 1, values normed without weight, two rotary tables,
keys and values shared by the last layers, K = V in full layers, a parallel mixture of experts, per-layer inputs.
Source: transformers `modeling_gemma4.py`, google-deepmind/gemma `gm/nn/gemma4`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from sparing import kernels
from sparing.config.gemma4 import Gemma4Config, Gemma4Layer
from sparing.kernels import KeysFromValues
from sparing.models.base import Batch, LanguageModel
from sparing.models.layers import Embedding, GatedMLP, Linear, RMSNorm, ScaledEmbedding

__all__ = ["Gemma4", "Gemma4Stack"]

Tables = tuple[Tensor, Tensor]  # cos, sin


class Router(nn.Module):
    def __init__(self, config: Gemma4Config):
        super().__init__()
        self.proj = Linear(config.hidden_size, config.num_experts, bias=False)
        self.scale = nn.Parameter(torch.empty(config.hidden_size))
        self.per_expert_scale = nn.Parameter(torch.empty(config.num_experts))


class Experts(nn.Module):
    def __init__(self, config: Gemma4Config):
        super().__init__()
        experts, width, size = config.num_experts, config.moe_intermediate_size, config.hidden_size
        self.gate_up_proj = nn.Parameter(torch.empty(experts, 2 * width, size))
        self.down_proj = nn.Parameter(torch.empty(experts, size, width))


class Attention(nn.Module):
    def __init__(self, config: Gemma4Config, layer: Gemma4Layer):
        super().__init__()
        self.head_dim, self.eps = layer.head_dim, config.rms_norm_eps
        self.rope = config.rope[layer.kind]
        q_size, kv_size = config.num_attention_heads * layer.head_dim, layer.num_key_value_heads * layer.head_dim
        bias, size = config.attention_bias, config.hidden_size
        self.q_proj = Linear(size, q_size, bias)
        self.q_norm = RMSNorm(layer.head_dim, self.eps)
        if layer.is_producer:
            self.k_proj = Linear(size, kv_size, bias)
            self.k_norm = RMSNorm(layer.head_dim, self.eps)
            self.v_proj = None if layer.value_is_key else Linear(size, kv_size, bias)
        self.o_proj = Linear(q_size, size, bias)

    def queries(self, h: Tensor, tables: Tables) -> Tensor:
        """[tokens, heads, head_dim]"""
        q = self.q_proj(h).unflatten(-1, (-1, self.head_dim))
        return kernels.norm_rotate(q, self.q_norm.weight, *tables, self.eps)

    def keys_values(self, h: Tensor, tables: Tables) -> tuple[Tensor, Tensor]:
        """Two tensors [tokens, kv_heads, head_dim]. Without v_proj, values are the projection before k_norm."""
        k_proj, v_proj = self.k_proj, self.v_proj
        if v_proj is None:
            k = v = k_proj(h)
        else:
            k, v = kernels.linear_pair(h, k_proj.weight, v_proj.weight, k_proj.bias, v_proj.bias)
        k, v = (x.unflatten(-1, (-1, self.head_dim)) for x in (k, v))
        return kernels.norm_rotate(k, self.k_norm.weight, *tables, self.eps), kernels.rms_norm(v, eps=self.eps)


class DecoderLayer(nn.Module):
    def __init__(self, config: Gemma4Config, layer: Gemma4Layer):
        super().__init__()
        size, eps = config.hidden_size, config.rms_norm_eps
        self.is_producer, self.eps = layer.is_producer, eps
        self.input_layernorm = RMSNorm(size, eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(size, eps)
        self.pre_feedforward_layernorm = RMSNorm(size, eps)
        self.mlp = GatedMLP(size, layer.intermediate_size, "gelu")
        self.top_k_experts = config.top_k_experts
        if config.num_experts:
            self.router, self.experts = Router(config), Experts(config)
            self.pre_feedforward_layernorm_2 = RMSNorm(size, eps)
            self.post_feedforward_layernorm_1 = RMSNorm(size, eps)  # after the dense branch
            self.post_feedforward_layernorm_2 = RMSNorm(size, eps)  # after the experts
        self.post_feedforward_layernorm = RMSNorm(size, eps)
        if p := config.hidden_size_per_layer_input:
            self.per_layer_input_gate = Linear(size, p, bias=False)
            self.per_layer_projection = Linear(p, size, bias=False)
            self.post_per_layer_input_norm = RMSNorm(size, eps)

    def feed_forward(self, x: Tensor, h: Tensor) -> Tensor:
        """What is added to the residual x, before its norm. h: x after `pre_feedforward_layernorm`."""
        h = self.mlp(h)
        if self.top_k_experts:
            router = self.router
            h = kernels.parallel_moe(
                x,
                dense=h,
                router=(router.scale, router.proj.weight, router.per_expert_scale),
                k=self.top_k_experts,
                gate_up=self.experts.gate_up_proj,
                down=self.experts.down_proj,
                norms=(
                    self.post_feedforward_layernorm_1.weight,
                    self.pre_feedforward_layernorm_2.weight,
                    self.post_feedforward_layernorm_2.weight,
                ),
                eps=self.eps,
            )
        return h

    def per_layer_input(self, x: Tensor, ple: Tensor) -> Tensor:
        gate, projection = self.per_layer_input_gate.weight, self.per_layer_projection.weight
        return kernels.per_layer_gate(x, ple, gate, projection, self.post_per_layer_input_norm.weight, self.eps)


class Gemma4Stack(nn.Module):
    """Embedding, layers, final norm. Gemma 4 and DiffusionGemma run the same stack."""

    def __init__(self, config: Gemma4Config):
        super().__init__()
        self.config = config
        self.embed_tokens = ScaledEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(config, layer) for layer in config.layers)
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if p := config.hidden_size_per_layer_input:
            width = config.num_hidden_layers * p
            self.embed_tokens_per_layer = Embedding(config.vocab_size_per_layer_input, width)
            self.per_layer_model_projection = Linear(config.hidden_size, width, bias=False)
            self.per_layer_projection_norm = RMSNorm(p, config.rms_norm_eps)

    def forward(
        self,
        x: Tensor,
        batch: Batch,
        scalars: Sequence[Tensor],
        trace: list[Tensor] | None = None,
        layers: range | None = None,
        texts: int | None = None,
    ) -> Tensor:
        """x: [tokens, H] input of the first of these layers (None: all); scalars: per layer of the model, [1],
        multiplies its whole output, or [2], one for the first `texts` tokens and one for the rest.

        Returns the stream of the positions that are read, final-normed after the last layer of all.
        """
        config, eps = self.config, self.config.rms_norm_eps
        first, stop = (0, config.num_hidden_layers) if layers is None else (layers.start, layers.stop)
        last_producer = min(stop, config.first_shared_layer) - 1
        tables: dict[tuple[str, int], Tables] = {}
        turns = [(layer.kind, layer.head_dim) for layer in config.layers]  # what a layer's rotation depends on
        for kind, head_dim in dict.fromkeys(turns):
            inv_freq, _ = kernels.inverse_frequencies(config.rope[kind], head_dim)
            tables[kind, head_dim] = kernels.rope_tables(batch.positions, inv_freq, x.dtype)
        ple = None
        if config.hidden_size_per_layer_input:
            ple = kernels.per_layer_inputs(
                batch.ids,
                x if first == 0 else self.embed_tokens(batch.ids),
                self.embed_tokens_per_layer.weight,
                self.per_layer_model_projection.weight,
                self.per_layer_projection_norm.weight,
                config.num_hidden_layers,
                eps,
            )
        if trace is not None:
            trace.append(x)
        for i, layer in enumerate(islice(self.layers, first, stop), first):
            assert isinstance(layer, DecoderLayer)
            h = layer.input_layernorm(x)
            k = v = None
            if layer.is_producer:
                k, v = layer.self_attn.keys_values(h, tables[turns[i]])
            if i == last_producer and trace is None and (kept := batch.narrow()) is not None:
                # The last keys and values are made: positions whose output nobody reads end here.
                x, h, ple = x[kept], h[kept], None if ple is None else ple[kept]
                tables = {key: (cos[kept], sin[kept]) for key, (cos, sin) in tables.items()}
                texts = None if texts is None else int((kept < texts).sum())
            mixed = batch.attend(i, layer.self_attn.queries(h, tables[turns[i]]), k, v)
            if len(x) == 0:
                return x
            mixed = layer.self_attn.o_proj(mixed.flatten(-2))
            norm, next_norm = layer.post_attention_layernorm.weight, layer.pre_feedforward_layernorm.weight
            x, h = kernels.residual_norm(x, mixed, next_norm, norm, eps)
            h, norm = layer.feed_forward(x, h), layer.post_feedforward_layernorm.weight
            if ple is None:
                x = _scaled(x, h, norm, scalars[i], eps, texts)
            else:
                x = layer.per_layer_input(kernels.residual(x, h, norm, eps=eps), ple[:, i]) * scalars[i]
            if trace is not None:
                trace.append(x)
        return self.norm(x) if stop == config.num_hidden_layers else x


def _scaled(x: Tensor, y: Tensor, norm: Tensor, scale: Tensor, eps: float, texts: int | None) -> Tensor:
    """`kernels.residual` with a scale [1] for all tokens (texts: None), or [2] for the first of them and the rest."""
    if texts is None:
        return kernels.residual(x, y, norm, scale, eps)
    sizes = [texts, len(x) - texts]
    parts = zip(x.split_with_sizes(sizes), y.split_with_sizes(sizes), scale.split(1), strict=True)
    return torch.cat([kernels.residual(a, b, norm, of_part, eps) for a, b, of_part in parts])


class Gemma4(LanguageModel):
    """A Gemma 4 text model (any of the five sizes). Parameters carry their checkpoint names."""

    config: Gemma4Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: Gemma4Config):
        super().__init__(config)
        self.model = Gemma4Stack(config)
        for layer in self.model.layers:
            layer.register_buffer("layer_scalar", torch.empty(1))
        self.lm_head = None if config.tie_word_embeddings else Linear(config.hidden_size, config.vocab_size, False)

    def forward(self, batch: Batch, trace: list[Tensor] | None = None, layers: range | None = None) -> Tensor:
        scalars = [layer.get_buffer("layer_scalar") for layer in self.model.layers]
        x = self.model.embed_tokens(batch.ids) if batch.hidden is None else batch.hidden
        return self.model(x, batch, scalars, trace, layers)

    def output_table(self) -> Tensor:
        return self.model.embed_tokens.weight if self.lm_head is None else self.lm_head.weight

    def product(self, collapsed: Tensor) -> Tensor:
        logits = kernels.linear(collapsed, self.output_table())
        cap = self.config.final_logit_softcapping
        return (logits if cap is None else kernels.softcap(logits, cap)).float()

    def keys_from_values(self) -> list[KeysFromValues | None]:
        return keys_from_values(self.config, self.model)


def keys_from_values(config: Gemma4Config, stack: Gemma4Stack) -> list[KeysFromValues | None]:
    """Per layer, the K = V identity where the layer has no v_proj of its own."""
    found: list[KeysFromValues | None] = []
    for layer, module in zip(config.layers, stack.layers, strict=True):
        tied = layer.value_is_key and layer.is_producer
        weight = module.self_attn.k_norm.weight if tied else None  # type: ignore[union-attr]
        found.append(None if weight is None else KeysFromValues(weight, config.rope[layer.kind]))  # type: ignore[arg-type]
    return found
