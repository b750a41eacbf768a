"""Nemotron 3: layers of one mixer each, in order of execution: Mamba-2, attention, a mixture of experts, or an MLP.

No rotation anywhere: order comes from the Mamba layers. MLPs and experts square what is positive, without a gate.
Routed experts may work in a narrower, latent space.
Source: transformers `modeling_nemotron_h.py`; dt is clamped to the config's `time_step_limit`, not to the reference's
`time_step_min`, which belongs to the drawing of weights.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import islice

import torch
from torch import Tensor, nn

from sparing import kernels
from sparing.config.nemotron3 import Nemotron3Config
from sparing.config.nemotron3_layers import ATTENTION, MAMBA, MLP, MOE
from sparing.config.roles import Tensors
from sparing.models.base import Batch, LanguageModel, RecurrentBatch
from sparing.models.layers import Embedding, Linear, RMSNorm

__all__ = ["LatentMoELayer", "Layer", "Nemotron3", "run_layers"]


class Mamba(nn.Module):
    """Projections to z, x, B, C and dt, the scan over each row, a gated norm per group, and the way back."""

    def __init__(self, config: Nemotron3Config):
        super().__init__()
        inner, conv, heads = config.mamba_size, config.conv_size, config.mamba_num_heads
        self.sizes = [inner, conv, heads]
        self.groups, self.limit = config.n_groups, config.time_step_limit
        self.in_proj = Linear(config.hidden_size, sum(self.sizes), config.use_bias)
        self.conv1d = nn.Module()
        self.conv1d.weight = nn.Parameter(torch.empty(conv, 1, config.conv_kernel))
        self.conv1d.register_parameter("bias", nn.Parameter(torch.empty(conv)) if config.use_conv_bias else None)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.norm = RMSNorm(inner, config.rms_norm_eps)
        self.out_proj = Linear(inner, config.hidden_size, config.use_bias)

    def forward(self, h: Tensor, i: int, batch: RecurrentBatch, is_last: bool) -> tuple[Tensor, Tensor | None]:
        """h: [tokens, H] -> ([carried tokens, H], what `narrow` kept)."""
        z, xbc, dt = self.in_proj(h).split_with_sizes(self.sizes, -1)
        dt = kernels.time_steps(dt, self.dt_bias, self.limit)
        kept = batch.narrow() if is_last else None
        if kept is not None:
            z = z[kept]
        weight: Tensor = self.conv1d.weight  # type: ignore[assignment]
        bias: Tensor | None = self.conv1d.bias  # type: ignore[assignment]
        weights = kernels.MambaWeights(weight, bias, -self.A_log.float().exp(), self.D.float())
        y = batch.scan(i, xbc, dt, weights)  # float32 [carried tokens, heads, head_dim]
        y = kernels.gated_group_norm(y.flatten(-2), z, self.norm.weight, self.groups, self.norm.eps)
        return self.out_proj(y), kept


class Attention(nn.Module):
    """Grouped heads without rotation, norms or biases."""

    def __init__(self, config: Nemotron3Config):
        super().__init__()
        size, self.head_dim = config.hidden_size, config.head_dim
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(size, q_size, bias=False)
        self.k_proj = Linear(size, kv_size, bias=False)
        self.v_proj = Linear(size, kv_size, bias=False)
        self.o_proj = Linear(q_size, size, bias=False)

    def forward(self, h: Tensor, i: int, batch: Batch, is_last: bool) -> tuple[Tensor, Tensor | None]:
        """h: [tokens, H] -> ([carried tokens, H], what `narrow` kept)."""
        k, v = (project(h).unflatten(-1, (-1, self.head_dim)) for project in (self.k_proj, self.v_proj))
        kept = batch.narrow() if is_last else None
        q = self.q_proj(h if kept is None else h[kept]).unflatten(-1, (-1, self.head_dim))
        mixed = batch.attend(i, q, k, v, self.head_dim**-0.5)
        return self.o_proj(mixed.flatten(-2)), kept


class SquaredMLP(nn.Module):
    """`down(relu(up(x))^2)`"""

    def __init__(self, size: int, width: int, bias: bool):
        super().__init__()
        self.up_proj = Linear(size, width, bias)
        self.down_proj = Linear(width, size, bias)

    def forward(self, x: Tensor) -> Tensor:
        up, down = self.up_proj, self.down_proj
        return kernels.squared_mlp(x, up.weight, down.weight, (up.bias, down.bias))


class LatentMoELayer(nn.Module):
    """Router, routed experts (in a latent space, if the config has one) and the expert that sees every token.

    config: a parsed Nemotron 3 config with experts. Parameters carry their checkpoint names; the experts are stacked.
    Source: Nemotron 3, LatentMoE; the router and the shared expert read the full width.
    """

    scoring = "sigmoid"

    def __init__(self, config: Nemotron3Config):
        super().__init__()
        size, experts, width = config.hidden_size, config.num_experts, config.moe_intermediate_size
        latent = config.moe_latent_size
        self.k, self.normalize, self.scale = config.top_k_experts, config.norm_topk_prob, config.routed_scaling_factor
        self.n_group, self.topk_group = config.n_group, config.topk_group
        self.gate = nn.Module()
        self.gate.weight = nn.Parameter(torch.empty(experts, size))
        self.gate.register_buffer("e_score_correction_bias", torch.empty(experts))
        self.experts = nn.Module()
        self.experts.up_proj = nn.Parameter(torch.empty(experts, width, latent or size))
        self.experts.down_proj = nn.Parameter(torch.empty(experts, latent or size, width))
        self.shared_experts = SquaredMLP(size, config.moe_shared_expert_intermediate_size, config.mlp_bias)
        self.fc1_latent_proj = None if latent is None else Linear(size, latent, config.mlp_bias)
        self.fc2_latent_proj = None if latent is None else Linear(latent, size, config.mlp_bias)

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(expert ids int64 [tokens, k], weights float32 [tokens, k]) of x [tokens, H]."""
        gate: Tensor = self.gate.weight  # type: ignore[assignment]
        bias: Tensor = self.gate.e_score_correction_bias  # type: ignore[assignment]
        return kernels.route(
            x, gate, bias, self.k, self.n_group, self.topk_group, self.normalize, self.scale, scoring=self.scoring
        )

    def forward(self, x: Tensor) -> Tensor:
        """[tokens, H] -> [tokens, H]"""
        up: Tensor = self.experts.up_proj  # type: ignore[assignment]
        down: Tensor = self.experts.down_proj  # type: ignore[assignment]
        idx, w = self.route(x)
        fc1, fc2 = self.fc1_latent_proj, self.fc2_latent_proj
        weights = (None, None) if fc1 is None or fc2 is None else (fc1.weight, fc2.weight)
        biases = (None, None) if fc1 is None or fc2 is None else (fc1.bias, fc2.bias)
        return kernels.latent_moe(x, *weights, up, down, idx, w, self.shared_experts, biases)


class Layer(nn.Module):
    def __init__(self, config: Nemotron3Config, kind: str):
        super().__init__()
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mixer: nn.Module
        if kind == MAMBA:
            self.mixer = Mamba(config)
        elif kind == ATTENTION:
            self.mixer = Attention(config)
        elif kind == MOE:
            self.mixer = LatentMoELayer(config)
        else:
            assert kind == MLP
            self.mixer = SquaredMLP(config.hidden_size, config.intermediate_size, config.mlp_bias)


class Stack(nn.Module):
    def __init__(self, config: Nemotron3Config):
        super().__init__()
        self.memory_layers = config.memory_layers
        self.embeddings = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, kind) for kind in config.layers)
        self.norm_f = RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(self, batch: RecurrentBatch, trace: list[Tensor] | None = None, layers: range | None = None) -> Tensor:
        layers = range(len(self.layers)) if layers is None else layers
        x = self.embeddings(batch.ids) if batch.hidden is None else batch.hidden  # [tokens, H]
        x = run_layers(self.layers, x, batch, layers, self.memory_layers, trace)
        return self.norm_f(x) if layers.stop == len(self.layers) else x


def run_layers(
    modules: Iterable[nn.Module],
    x: Tensor,
    batch: RecurrentBatch,
    layers: range,
    memory_layers: Sequence[int],
    trace: list[Tensor] | None = None,
) -> Tensor:
    """x: [tokens, H] -> [carried tokens, H].

    modules: all layers; layers: those to run; memory_layers: those that remember anything, in order; trace: collects x
    and each layer's output.
    """
    before = memory_layers[: bisect_left(memory_layers, layers.stop)]
    last_memory_layer = before[-1] if before else -1
    if trace is not None:
        trace.append(x)
    elif last_memory_layer < layers.start and (kept := batch.narrow()) is not None:
        x = x[kept]
    for i, layer in enumerate(islice(modules, layers.start, layers.stop), layers.start):
        assert isinstance(layer, Layer)
        h, mixer = layer.norm(x), layer.mixer
        if isinstance(mixer, Mamba | Attention):
            # After the last layer that remembers, positions whose output nobody reads end.
            mixed, kept = mixer(h, i, batch, trace is None and i == last_memory_layer)
            x = (x if kept is None else x[kept]) + mixed
        else:
            x = x + mixer(h)
        if trace is not None:
            trace.append(x)
    return x


class Nemotron3(LanguageModel):
    """Nano, Super, Ultra, or another Nemotron-H model. Parameters carry their checkpoint names (prefix `backbone.`)."""

    config: Nemotron3Config  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, config: Nemotron3Config):
        super().__init__(config)
        self.backbone = Stack(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(  # type: ignore[override]
        self, batch: RecurrentBatch, trace: list[Tensor] | None = None, layers: range | None = None
    ) -> Tensor:
        return self.backbone(batch, trace, layers)

    def tensors(self) -> Tensors:
        """Also of the drafting head, `mtp`, which a recipe trains as part of the model."""
        return super().tensors() | self.config.mtp.tensors()

    def output_table(self) -> Tensor:
        return self.lm_head.weight
