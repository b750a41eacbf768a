"""Gemma 4 text models: config.json -> frozen description of every layer. Never imports torch.

Source: the released configurations and transformers' `configuration_gemma4.py`, whose two spellings of the
per-layer geometry (scalar `global_*` keys, or a `per_layer_config` map) are both read.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sparing.config import roles
from sparing.config.fields import LARGEST_COUNT, Fields
from sparing.config.memory import AttentionSpec
from sparing.config.names import HEAD_NAMES
from sparing.config.roles import Role, Stacked, Tensors
from sparing.config.rope import RopeParameters
from sparing.config.stated import stated_once
from sparing.errors import shown

__all__ = ["Gemma4Config", "Gemma4Layer", "kv_share_map"]

SLIDING, FULL = "sliding_attention", "full_attention"
ROPE_TYPES = ("default", "linear", "llama3", "proportional")  # those whose tables need no factor and no length
DEFAULT_ROPE: dict[str, dict[str, Any]] = {
    SLIDING: {"rope_type": "default", "rope_theta": 10000.0},
    FULL: {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
}

# What other Gemmas state and every Gemma 4 does anyway: scores are not scaled, as queries and keys are normed.
NEUTRAL = {
    "query_pre_attn_scalar": (1.0,),
    "use_qk_norm": (True,),
    "hidden_act": ("gelu_pytorch_tanh",),
    "sliding_window_pattern": (6,),  # which layer_types state one by one
    "rope_theta": (1e6,),
    "rope_local_base_freq": (1e4,),
}


def kv_share_map(layer_types: list[str], num_shared: int) -> list[int]:
    """Which layer's keys and values each layer reads: itself, or the last producer of its own type.

    layer_types: "sliding_attention" or "full_attention" per layer; num_shared: how many of the last layers
    produce none. Raises ValueError if a consumer's type has no producer, or num_shared is out of range.
    Source: Gemma 4, `num_kv_shared_layers`.

    >>> kv_share_map(["sliding_attention", "full_attention", "sliding_attention", "full_attention"], 2)
    [0, 1, 0, 1]
    """
    first = len(layer_types) - num_shared
    if num_shared < 0 or first < 0:
        raise ValueError(f"num_kv_shared_layers is {num_shared}, the model has {len(layer_types)} layers")
    last_producer = {kind: i for i, kind in enumerate(layer_types[:first])}
    for i, kind in enumerate(layer_types[first:], first):
        if kind not in last_producer:
            raise ValueError(
                f"layer {i} ({kind}) shares keys and values, but none of the first {first} layers is {kind}:"
                f" lower num_kv_shared_layers ({num_shared})"
            )
    return list(range(first)) + [last_producer[kind] for kind in layer_types[first:]]


@dataclass(frozen=True)
class Gemma4Layer:
    """Geometry of one decoder layer."""

    kind: str  # sliding_attention | full_attention
    head_dim: int
    num_key_value_heads: int
    window: int | None
    source: int  # the layer whose keys and values are read
    is_producer: bool
    value_is_key: bool  # no v_proj: values are the raw key projection
    intermediate_size: int

    def memory(self) -> AttentionSpec:
        shared_with = None if self.is_producer else self.source
        return AttentionSpec(
            self.num_key_value_heads, self.head_dim, self.window, shared_with, value_only=self.value_is_key
        )


@dataclass(frozen=True)
class Gemma4Config:
    """All numbers of a Gemma 4 text stack. `layers` holds what differs from layer to layer."""

    hidden_size: int
    vocab_size: int
    num_attention_heads: int
    layers: tuple[Gemma4Layer, ...]
    rope: Mapping[str, RopeParameters]  # by layer kind
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131072
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    hidden_size_per_layer_input: int = 0
    vocab_size_per_layer_input: int = 0
    num_experts: int = 0
    top_k_experts: int = 0
    moe_intermediate_size: int = 0
    bos_token_id: int | None = 2
    eos_token_ids: tuple[int, ...] = (1,)
    pad_token_id: int | None = 0
    refused_token_ids: tuple[int, ...] = ()  # image, audio and video placeholders
    stored_dtype: str = "bfloat16"
    unknown: Mapping[str, Any] = field(default_factory=dict)

    model_type = "gemma4"
    canvas_length = None
    ignored_tensors = (
        r"(model\.)?(vision_tower|audio_tower|embed_vision|embed_audio|vision_embedder)\..*",
        r".*rotary_emb\..*",
    )

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def last_producers(self) -> dict[str, int]:
        """Layer kind -> the last layer of that kind that makes keys and values: what a drafter reads."""
        return {layer.kind: i for i, layer in enumerate(self.layers) if layer.is_producer}

    @property
    def first_shared_layer(self) -> int:
        """Index after the last layer that produces keys and values."""
        return sum(layer.is_producer for layer in self.layers)

    def mixers(self) -> tuple[str, ...]:
        return ("attention",) * self.num_hidden_layers

    def memory_specs(self) -> list[AttentionSpec]:
        return [layer.memory() for layer in self.layers]

    def layer_ropes(self) -> list[RopeParameters | None]:
        """How each layer rotates its queries and keys; None: not at all."""
        return [self.rope[layer.kind] for layer in self.layers]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Gemma4Config:
        """Parse the config.json of a text-only or multimodal checkpoint.

        Raises CheckpointError naming the key for missing, contradictory or unsupported values.
        """
        if "text_config" not in raw:
            return cls.from_text(Fields(raw), raw)
        outer = Fields(raw)
        outer.ignore(*(k for k in raw if k.endswith(("_config", "_token_id", "_token_index"))))
        outer.ignore("vision_soft_tokens_per_image", "text_config", "tie_word_embeddings")
        text = Fields(outer.get("text_config"), "config.json: text_config")
        return cls.from_text(text, raw, extra_unknown=outer.harmless("gemma4"))

    @classmethod
    def from_text(
        cls,
        fields: Fields,
        outer: Mapping[str, Any],
        *,
        always_value_is_key: bool = False,
        always_moe: bool = False,
        is_drafter: bool = False,
        default_softcap: float | None = None,
        extra_unknown: Mapping[str, Any] | None = None,
    ) -> Gemma4Config:
        if fields.choice("use_bidirectional_attention", (None, "vision", "all"), None) == "all":
            raise fields.error(
                "use_bidirectional_attention is 'all' (an embedding model): only causal text models are supported"
            )
        fields.choice("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
        model_type = str(fields.get("model_type", "gemma4_text"))
        num_layers = fields.integer("num_hidden_layers", 30, maximum=LARGEST_COUNT)
        kinds = fields.strings("layer_types") or [FULL if (i + 1) % 6 == 0 else SLIDING for i in range(num_layers)]
        if len(kinds) != num_layers:
            raise fields.error(f"layer_types has {len(kinds)} entries, num_hidden_layers is {num_layers}")
        if (bad := next((kind for kind in kinds if kind not in (SLIDING, FULL)), None)) is not None:
            raise fields.error(f"layer_types holds {shown(bad)}, supported: {SLIDING!r}, {FULL!r}")
        kinds[-1] = FULL  # the released rule: the last layer is full whatever the list says
        num_shared = fields.integer("num_kv_shared_layers", 0, minimum=0)
        if is_drafter:  # every layer reads the target's keys and values
            if num_shared not in (0, num_layers):
                raise fields.error(f"num_kv_shared_layers is {num_shared}: all {num_layers} layers of a drafter share")
            num_shared = num_layers
        try:
            sources = list(range(num_layers)) if is_drafter else kv_share_map(kinds, num_shared)
        except ValueError as error:
            raise fields.error(str(error)) from None

        value_is_key = always_value_is_key or fields.boolean("attention_k_eq_v", False)
        head_dims, kv_heads = _geometry(fields, kinds, value_is_key)
        num_heads = fields.integer("num_attention_heads", 8)
        if odd := next((d for d in head_dims if d % 2), None):
            raise fields.error(f"a head_dim is {odd}: rotation pairs dimensions, use an even number")
        if (i := next((i for i, n in enumerate(kv_heads) if num_heads % n), None)) is not None:
            raise fields.error(
                f"layer {i}: num_attention_heads {num_heads} is not a multiple of {kv_heads[i]} kv heads"
            )
        window = fields.integer("sliding_window", 512)
        width = fields.integer("intermediate_size", 9216)
        double_wide = fields.boolean("use_double_wide_mlp", False)
        first = num_layers - num_shared
        layers = tuple(
            Gemma4Layer(
                kind=kind,
                head_dim=head_dims[i],
                num_key_value_heads=kv_heads[i],
                window=window if kind == SLIDING else None,
                source=sources[i],
                is_producer=i < first,
                value_is_key=value_is_key and kind == FULL,
                intermediate_size=width * 2 if double_wide and i >= first else width,
            )
            for i, kind in enumerate(kinds)
        )
        max_positions = fields.integer("max_position_embeddings", 131072)
        turning = _turning(fields)
        has_experts = always_moe or fields.boolean("enable_moe_block", False)
        num_experts = fields.integer("num_experts") if has_experts else 0
        top_k_experts = fields.integer("top_k_experts") if has_experts else 0
        if top_k_experts > num_experts:
            raise fields.error(f"top_k_experts is {top_k_experts}, there are only {num_experts} experts")
        # A unified (12B) checkpoint has no per-layer inputs and its config no such key.
        ple_default = 0 if "unified" in model_type or always_moe or is_drafter else 256
        ple_size = fields.integer("hidden_size_per_layer_input", ple_default, minimum=0)
        vocab_size = fields.integer("vocab_size", 262144)
        fields.ignore("num_experts", "top_k_experts", "moe_intermediate_size", "expert_intermediate_size")
        ple_vocab = fields.integer("vocab_size_per_layer_input", 262144) if ple_size else 0
        fields.ignore("vocab_size_per_layer_input")
        if ple_size and ple_vocab < vocab_size:
            raise fields.error(
                f"vocab_size_per_layer_input is {ple_vocab}, vocab_size {vocab_size}: tokens without per-layer inputs"
            )
        tied = fields.boolean("tie_word_embeddings", True)
        own_eos = fields.token_ids("eos_token_id", 1)
        eos = Fields(outer).token_ids("eos_token_id") or own_eos
        return cls(
            hidden_size=fields.integer("hidden_size", 2304),
            vocab_size=vocab_size,
            num_attention_heads=num_heads,
            layers=layers,
            rope={
                kind: RopeParameters.parse(
                    turning[kind],
                    theta=None,
                    max_positions=max_positions,
                    head_dim=next((d for d, k in zip(head_dims, kinds, strict=True) if k == kind), head_dims[0]),
                    types=ROPE_TYPES,
                )
                for kind in (SLIDING, FULL)
            },
            rms_norm_eps=fields.epsilon("rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            final_logit_softcapping=fields.optional_number("final_logit_softcapping", default_softcap, above=0.0),
            tie_word_embeddings=Fields(outer).boolean("tie_word_embeddings", tied),
            attention_bias=fields.boolean("attention_bias", False),
            hidden_size_per_layer_input=ple_size,
            vocab_size_per_layer_input=ple_vocab,
            num_experts=num_experts,
            top_k_experts=top_k_experts,
            moe_intermediate_size=fields.integer("moe_intermediate_size") if has_experts else 0,
            bos_token_id=fields.token_id("bos_token_id", 2),
            eos_token_ids=eos,
            pad_token_id=fields.token_id("pad_token_id", 0),
            refused_token_ids=Fields(outer).placeholders(vocab_size),
            stored_dtype=Fields(outer).stored_dtype(fields.raw),
            unknown={
                **(extra_unknown or {}),
                **fields.harmless(model_type, NEUTRAL),
                **{
                    f"rope_parameters.{kind}.{key}": value
                    for kind, found in turning.items()
                    for key, value in found.harmless(model_type).items()
                },
            },
        )

    def untied(self, file: str) -> Gemma4Config:
        """The same with a head of its own, which `file` holds."""
        return replace(self, tie_word_embeddings=False)

    @stated_once
    def tensors(self) -> Tensors:
        """Checkpoint name (text-only prefix `model.`) -> (shape, role): everything that must be in the file."""
        h, tied = self.hidden_size, self.tie_word_embeddings
        tensors = self.stack_tensors("model.", roles.TIED_TABLE if tied else roles.EMBEDDING)
        for i in range(self.num_hidden_layers):
            tensors[f"model.layers.{i}.layer_scalar"] = ((1,), roles.CONSTANT)
            if p := self.hidden_size_per_layer_input:
                tensors[f"model.layers.{i}.per_layer_input_gate.weight"] = ((p, h), roles.MATRIX)
                tensors[f"model.layers.{i}.per_layer_projection.weight"] = ((h, p), roles.MATRIX)
                tensors[f"model.layers.{i}.post_per_layer_input_norm.weight"] = ((h,), roles.NORM)
        if p := self.hidden_size_per_layer_input:
            ids, layers = self.vocab_size_per_layer_input, self.num_hidden_layers
            tensors["model.embed_tokens_per_layer.weight"] = ((ids, layers * p), roles.LOOKUP)
            tensors["model.per_layer_model_projection.weight"] = (Stacked((p,) * layers, h), roles.MATRIX)
            tensors["model.per_layer_projection_norm.weight"] = ((p,), roles.NORM)
        if not tied:
            tensors["lm_head.weight"] = ((self.vocab_size, h), roles.HEAD)
        return tensors

    def stack_tensors(self, prefix: str, table: Role) -> Tensors:
        """Embedding (its role is `table`), layers, final norm; no layer scalars, whose place differs between models."""
        h, heads = self.hidden_size, self.num_attention_heads
        tensors: Tensors = {
            f"{prefix}embed_tokens.weight": ((self.vocab_size, h), table),
            f"{prefix}norm.weight": ((h,), roles.NORM),
        }
        for i, layer in enumerate(self.layers):
            d, kv, name = layer.head_dim, layer.num_key_value_heads, f"{prefix}layers.{i}."
            projections = {"q_proj": (heads * d, h), "o_proj": (h, heads * d)}
            if layer.is_producer:
                projections["k_proj"] = (kv * d, h)
                if not layer.value_is_key:
                    projections["v_proj"] = (kv * d, h)
            for projection, shape in projections.items():
                tensors[f"{name}self_attn.{projection}.weight"] = (shape, roles.PROJECTIONS[projection])
                if self.attention_bias:
                    tensors[f"{name}self_attn.{projection}.bias"] = (shape[:1], roles.BIAS)
            tensors[f"{name}self_attn.q_norm.weight"] = ((d,), roles.QK_NORM)
            if layer.is_producer:
                tensors[f"{name}self_attn.k_norm.weight"] = ((d,), roles.QK_NORM)
            norms = ["input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm"]
            norms.append("post_feedforward_layernorm")
            inward = layer.intermediate_size, h
            for projection, shape in {"gate_proj": inward, "up_proj": inward, "down_proj": inward[::-1]}.items():
                tensors[f"{name}mlp.{projection}.weight"] = (shape, roles.PROJECTIONS[projection])
            if experts := self.num_experts:
                tensors[f"{name}router.proj.weight"] = ((experts, h), roles.ROUTER)
                tensors[f"{name}router.scale"] = ((h,), roles.SCALE)
                tensors[f"{name}router.per_expert_scale"] = ((experts,), roles.SCALE)
                width = self.moe_intermediate_size
                tensors[f"{name}experts.gate_up_proj"] = (Stacked((width, width), h, experts), roles.EXPERTS)
                tensors[f"{name}experts.down_proj"] = ((experts, h, width), roles.EXPERTS)
                norms += ["post_feedforward_layernorm_1", "post_feedforward_layernorm_2", "pre_feedforward_layernorm_2"]
            for norm in norms:
                tensors[f"{name}{norm}.weight"] = ((h,), roles.NORM)
        return tensors

    def tolerated_tensors(self) -> tuple[str, ...]:
        """Patterns of whole names that may be present and mean nothing: other towers, dead keys of consumer layers."""
        consumers = "|".join(str(i) for i, layer in enumerate(self.layers) if not layer.is_producer)
        dead = rf".*layers\.0*({consumers})\.self_attn\.(k_proj|v_proj|k_norm|v_norm)\..*" if consumers else None
        tied = HEAD_NAMES.pattern if self.tie_word_embeddings else None
        return tuple(pattern for pattern in (*self.ignored_tensors, dead, tied) if pattern)


def _turning(fields: Fields) -> dict[str, Fields]:
    """The object that says how heads turn, of each kind of layer."""
    ropes = fields.get("rope_parameters", None) or DEFAULT_ROPE
    if not isinstance(ropes, Mapping) or not set(ropes) <= set(DEFAULT_ROPE):
        raise fields.error(
            f"rope_parameters is {shown(ropes)}, expected an object with an entry {SLIDING} and one {FULL}"
        )
    return {
        kind: Fields(ropes.get(kind) or default, f"{fields.file}: rope_parameters.{kind}")
        for kind, default in DEFAULT_ROPE.items()
    }


def _geometry(fields: Fields, kinds: list[str], value_is_key: bool) -> tuple[list[int], list[int]]:
    """(head_dim, kv heads) of every layer. `per_layer_config`, when present, wins over the scalar keys."""
    head_dim = fields.integer("head_dim", 256)
    kv_heads = fields.integer("num_key_value_heads", 4)
    fields.ignore("global_head_dim", "num_global_key_value_heads")
    head_dims, heads = [head_dim] * len(kinds), [kv_heads] * len(kinds)
    overrides = fields.get("per_layer_config", None)
    if overrides is None:
        global_dim = fields.integer("global_head_dim", 512)
        global_heads = fields.optional_integer("num_global_key_value_heads") if value_is_key else None
        for i, kind in enumerate(kinds):
            if kind == FULL:
                head_dims[i], heads[i] = global_dim, global_heads or kv_heads
        return head_dims, heads
    if not isinstance(overrides, Mapping):
        raise fields.error(f"per_layer_config is {shown(overrides)}, expected an object from layer index to overrides")
    for key, override in overrides.items():  # keys are layer indices, possibly zero-padded
        if not re.fullmatch("[0-9]{1,9}", str(key)) or int(key) >= len(kinds):
            raise fields.error(f"per_layer_config names layer {shown(key)}, the model has {len(kinds)} layers")
        values = Fields(override, f"{fields.file}: per_layer_config[{shown(key)}]")
        head_dims[int(key)] = values.integer("head_dim", head_dim)
        heads[int(key)] = values.integer("num_key_value_heads", kv_heads)
        if values.unknown():
            raise values.error(f"the override {shown(next(iter(values.unknown())))} is not supported")
    return head_dims, heads
