"""Nemotron 3 and the other Nemotron-H hybrids: config.json -> frozen description of every layer. Never imports torch.

Source: the released configurations of Nano, Super and Ultra, and transformers' `configuration_nemotron_h.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sparing.config import roles
from sparing.config.fields import Fields
from sparing.config.memory import AttentionSpec, MemorySpec, RecurrentSpec
from sparing.config.nemotron3_layers import ATTENTION, MAMBA, MLP, MOE, expert_numbers, layer_kinds, mamba_numbers
from sparing.config.roles import Stacked, Tensors
from sparing.config.rope import RopeParameters
from sparing.config.stated import stated_once

__all__ = ["MTPConfig", "Nemotron3Config"]

WITHOUT_EFFECT = (  # keys that change how weights are drawn, or how fast code runs, but no value of a forward pass
    "chunk_size", "expand", "mamba_chunk_size", "mamba_dt_init_floor", "mamba_dt_max", "mamba_dt_min", "mamba_expand",
    "mamba_proj_bias", "max_window_layers", "moe_shared_expert_overlap", "num_logits_to_keep", "output_router_logits",
    "partial_rotary_factor", "rescale_prenorm_residual", "residual_in_fp32", "rope_theta", "time_step_floor",
    "time_step_max", "time_step_min", "use_mamba_kernels",
)  # fmt: skip


@dataclass(frozen=True)
class MTPConfig:
    """The head that drafts. text: its layers, described as if they were a model's."""

    text: Nemotron3Config

    def tensors(self) -> Tensors:
        """Checkpoint name (experts stacked) -> (shape, role): everything of the head that must be in the file."""
        h, last = self.text.hidden_size, len(self.text.layers) - 1
        tensors = self.text._layer_tensors("mtp.")
        tensors |= {f"mtp.layers.0.{name}.weight": ((h,), roles.NORM) for name in ("enorm", "hnorm")}
        tensors["mtp.layers.0.eh_proj.weight"] = ((h, 2 * h), roles.MATRIX)
        tensors[f"mtp.layers.{last}.final_layernorm.weight"] = ((h,), roles.NORM)
        return tensors


@dataclass(frozen=True)
class Nemotron3Config:
    """All numbers of a stack of single-mixer layers.

    layers: "mamba", "attention", "moe" or "mlp" per layer. n_groups: of B and C in a Mamba layer; n_group, topk_group:
    of experts, and how many of them a token may choose from. moe_latent_size: width the routed experts work in
    (None: hidden_size). time_step_limit: bounds of dt. mtp_layers: sublayers of the head that drafts, () without one.
    """

    hidden_size: int
    vocab_size: int
    layers: tuple[str, ...]
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    intermediate_size: int = 0
    mlp_bias: bool = False
    rms_norm_eps: float = 1e-5
    max_position_embeddings: int = 4096
    mamba_num_heads: int = 0
    mamba_head_dim: int = 0
    n_groups: int = 1
    ssm_state_size: int = 0
    conv_kernel: int = 1
    use_conv_bias: bool = True
    use_bias: bool = False
    time_step_limit: tuple[float, float] = (0.0, math.inf)
    ssm_dtype: str = "float32"
    num_experts: int = 0
    top_k_experts: int = 0
    n_group: int = 1
    topk_group: int = 1
    norm_topk_prob: bool = True
    routed_scaling_factor: float = 1.0
    moe_intermediate_size: int = 0
    moe_shared_expert_intermediate_size: int = 0
    moe_latent_size: int | None = None
    mtp_layers: tuple[str, ...] = ()
    bos_token_id: int | None = 1
    eos_token_ids: tuple[int, ...] = (2,)
    pad_token_id: int | None = 0
    is_wrapped: bool = False  # the text model of a file that also holds other towers
    stored_dtype: str = "float32"
    unknown: Mapping[str, Any] = field(default_factory=dict)

    model_type = "nemotron_h"
    canvas_length = None
    refused_token_ids = ()
    tie_word_embeddings = False

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def mamba_size(self) -> int:
        """Channels of a Mamba layer's x, z and y."""
        return self.mamba_num_heads * self.mamba_head_dim

    @property
    def conv_size(self) -> int:
        """Channels of a Mamba layer's convolution: x, B and C."""
        return self.mamba_size + 2 * self.n_groups * self.ssm_state_size

    @property
    def memory_layers(self) -> tuple[int, ...]:
        """Numbers of the layers that remember anything."""
        return tuple(i for i, kind in enumerate(self.layers) if kind in (MAMBA, ATTENTION))

    @property
    def mtp(self) -> MTPConfig:
        """The drafting head, which a file may hold or not."""
        return MTPConfig(replace(self, layers=self.mtp_layers or (ATTENTION, MOE), mtp_layers=()))

    def mixers(self) -> tuple[str, ...]:
        return self.layers

    def untied(self, file: str) -> Nemotron3Config:
        """The same: a head is never the embedding."""
        return self

    def memory_specs(self) -> list[MemorySpec | None]:
        attention = AttentionSpec(self.num_key_value_heads, self.head_dim)
        mamba = RecurrentSpec(
            self.mamba_num_heads,
            self.mamba_head_dim,
            self.ssm_state_size,
            self.n_groups,
            self.conv_kernel,
            self.ssm_dtype,
        )
        return [{ATTENTION: attention, MAMBA: mamba}.get(kind) for kind in self.layers]

    def layer_ropes(self) -> list[RopeParameters | None]:
        """How each layer rotates its queries and keys: none does, order comes from the Mamba layers."""
        return [None] * len(self.layers)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Nemotron3Config:
        """Parse the config.json of a text-only or multimodal checkpoint.

        Raises CheckpointError naming the key for missing, contradictory or unsupported values.
        """
        nested = next((key for key in ("llm_config", "text_config") if key in raw), None)
        if nested is None:
            return cls.from_text(Fields(raw), raw, {})
        outer = Fields(raw)
        outer.ignore(nested, "tie_word_embeddings", *(k for k in raw if k.endswith(("_config", "_token_id"))))
        return cls.from_text(Fields(outer.get(nested), f"config.json: {nested}"), raw, outer.harmless("nemotron_h"))

    @classmethod
    def from_text(cls, fields: Fields, outer: Mapping[str, Any], unknown: Mapping[str, Any]) -> Nemotron3Config:
        if fields.get("block_configs", None) is not None or fields.get("model_type", "") == "nemotron_h_puzzle":
            raise fields.error("block_configs (nemotron_h_puzzle: experts that differ by layer) is not supported")
        fields.ignore(*WITHOUT_EFFECT)
        fields.choice("mlp_hidden_act", ("relu2",), "relu2")
        fields.choice("mamba_hidden_act", ("silu",), "silu")
        fields.choice("attention_bias", (False,), False)
        fields.choice("sliding_window", (None,), None)
        fields.choice("tie_word_embeddings", (False,), False)
        layers = layer_kinds(fields, "hybrid_override_pattern", ("layers_block_type", "layer_types"))
        if layers is None:
            raise fields.error("neither hybrid_override_pattern nor layers_block_type says what the layers are")
        if MAMBA not in layers and ATTENTION not in layers:
            raise fields.error("no layer is mamba or attention: such a model sees one token at a time")
        fields.optional_integer("num_hidden_layers")  # the layers themselves count
        mtp = layer_kinds(fields, "mtp_hybrid_override_pattern", ("mtp_layers_block_type",)) or (ATTENTION, MOE)
        mtp = mtp if fields.integer("num_nextn_predict_layers", 0, minimum=0) else ()
        kinds = {*layers, *mtp}  # the head that drafts may hold what the model's own layers lack
        heads = fields.integer("num_attention_heads", 32)
        kv_heads = fields.optional_integer("num_key_value_heads", 8) or heads
        if heads % kv_heads:
            raise fields.error(f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}")
        same = fields.epsilon("norm_eps", 1e-5)  # a second name, which some files use alone
        eps = fields.epsilon("layer_norm_epsilon", same)
        if "norm_eps" in fields.raw and same != eps:
            raise fields.error(f"norm_eps is {same}, layer_norm_epsilon is {eps}: the two are one number, give one")
        eos = fields.token_ids("eos_token_id", 2)
        width = fields.integer("intermediate_size", 21504)
        return cls(
            hidden_size=fields.integer("hidden_size", 4096),
            vocab_size=fields.integer("vocab_size", 131072),
            layers=layers,
            num_attention_heads=heads,
            num_key_value_heads=kv_heads,
            head_dim=fields.integer("head_dim", 128),
            intermediate_size=width if MLP in kinds else 0,
            mlp_bias=fields.boolean("mlp_bias", False),
            rms_norm_eps=eps,
            max_position_embeddings=fields.integer("max_position_embeddings", 4096),
            **mamba_numbers(fields, MAMBA in kinds),
            **expert_numbers(fields, MOE in kinds),
            mtp_layers=mtp,
            bos_token_id=fields.token_id("bos_token_id", 1),
            eos_token_ids=Fields(outer).token_ids("eos_token_id") or eos,
            pad_token_id=fields.token_id("pad_token_id", 0),
            is_wrapped=fields.raw is not outer,
            stored_dtype=fields.stored_dtype(outer),
            unknown={**unknown, **fields.harmless("nemotron_h", {"hidden_act": ("silu", "relu2")})},
        )

    @stated_once
    def tensors(self) -> Tensors:
        """Checkpoint name (prefix `backbone.`, experts stacked) -> (shape, role): all that must be in the file."""
        h = self.hidden_size
        return {
            "backbone.embeddings.weight": ((self.vocab_size, h), roles.EMBEDDING),
            "backbone.norm_f.weight": ((h,), roles.NORM),
            "lm_head.weight": ((self.vocab_size, h), roles.HEAD),
            **self._layer_tensors("backbone."),
        }

    def _layer_tensors(self, prefix: str) -> Tensors:
        mixers = {  # all layers of a kind alike: one tuple for all, as tuples by the hundred thousand take long to make
            MAMBA: self._mamba_tensors(),
            ATTENTION: self._attention_tensors(),
            MOE: self._moe_tensors(),
            MLP: self._mlp_tensors("", self.intermediate_size),
        }
        norm = (self.hidden_size,), roles.NORM
        tensors: Tensors = {}
        for i, kind in enumerate(self.layers):
            tensors[f"{prefix}layers.{i}.norm.weight"] = norm
            tensors |= {f"{prefix}layers.{i}.mixer.{name}": stated for name, stated in mixers[kind].items()}
        return tensors

    def _mamba_tensors(self) -> Tensors:
        h, inner, heads, conv = self.hidden_size, self.mamba_size, self.mamba_num_heads, self.conv_size
        shared = self.n_groups * self.ssm_state_size
        projected = Stacked((inner, inner, shared, shared, heads), h)  # z, x, B, C, dt
        tensors: Tensors = {
            "in_proj.weight": (projected, roles.MATRIX),
            "conv1d.weight": ((conv, 1, self.conv_kernel), roles.CONV),
            "dt_bias": ((heads,), roles.TIME_STEP),
            "A_log": ((heads,), roles.DECAY),
            "D": ((heads,), roles.STATE),
            "norm.weight": ((inner,), roles.NORM),
            "out_proj.weight": ((h, inner), roles.OUTPUT),
        }
        if self.use_conv_bias:
            tensors["conv1d.bias"] = ((conv,), roles.BIAS)
        if self.use_bias:
            tensors |= {"in_proj.bias": (projected[:1], roles.BIAS), "out_proj.bias": ((h,), roles.BIAS)}
        return tensors

    def _attention_tensors(self) -> Tensors:
        h, q = self.hidden_size, self.num_attention_heads * self.head_dim
        kv = self.num_key_value_heads * self.head_dim
        shapes = {"q_proj": (q, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, q)}
        return {f"{name}.weight": (shape, roles.PROJECTIONS[name]) for name, shape in shapes.items()}

    def _mlp_tensors(self, prefix: str, width: int) -> Tensors:
        h = self.hidden_size
        tensors: Tensors = {}
        for name, shape in {"up_proj": (width, h), "down_proj": (h, width)}.items():
            tensors[f"{prefix}{name}.weight"] = (shape, roles.PROJECTIONS[name])
            if self.mlp_bias:
                tensors[f"{prefix}{name}.bias"] = (shape[:1], roles.BIAS)
        return tensors

    def _moe_tensors(self) -> Tensors:
        h, experts, width = self.hidden_size, self.num_experts, self.moe_intermediate_size
        size = self.moe_latent_size or h
        tensors: Tensors = {
            "gate.weight": ((experts, h), roles.ROUTER),
            "gate.e_score_correction_bias": ((experts,), roles.CORRECTION),
            "experts.up_proj": ((experts, width, size), roles.EXPERTS),
            "experts.down_proj": ((experts, size, width), roles.EXPERTS),
            **self._mlp_tensors("shared_experts.", self.moe_shared_expert_intermediate_size),
        }
        if latent := self.moe_latent_size:
            tensors["fc1_latent_proj.weight"] = ((latent, h), roles.LATENT_IN)
            tensors["fc2_latent_proj.weight"] = ((h, latent), roles.LATENT_OUT)
            if self.mlp_bias:
                tensors |= {"fc1_latent_proj.bias": ((latent,), roles.BIAS), "fc2_latent_proj.bias": ((h,), roles.BIAS)}
        return tensors

    def tolerated_tensors(self) -> tuple[str, ...]:
        """Patterns of whole names that may be present and mean nothing: the drafting head, and other towers."""
        return (r"^(language_model\.)?mtp\..*", *((r"^(?!language_model\.).*",) if self.is_wrapped else ()))
