"""Gemma 3 text models: config.json -> frozen description of every layer. Never imports torch.

Source: the released configurations and transformers' `configuration_gemma3.py`, whose older spelling of the two
rotations (`rope_theta`, `rope_local_base_freq`, `rope_scaling`) is read beside `rope_parameters`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sparing.config import roles
from sparing.config.fields import LARGEST_COUNT, Fields
from sparing.config.memory import AttentionSpec
from sparing.config.names import HEAD_NAMES
from sparing.config.roles import Tensors
from sparing.config.rope import RopeParameters
from sparing.config.stated import stated_once
from sparing.errors import shown

__all__ = ["Gemma3Config"]

SLIDING, FULL = "sliding_attention", "full_attention"
ROPE_TYPES = ("default", "linear", "llama3", "yarn", "proportional")  # those whose tables need no length
THETAS = {SLIDING: 10000.0, FULL: 1000000.0}
THETA_KEYS = {SLIDING: "rope_local_base_freq", FULL: "rope_theta"}  # where rope_parameters has none

# What other Gemmas state and every Gemma 3 does anyway.
NEUTRAL = {"use_qk_norm": (True,), "hidden_act": ("gelu_pytorch_tanh",)}


@dataclass(frozen=True)
class Gemma3Config:
    """All numbers of a Gemma 3 text stack. `kinds` and `windows` hold what differs from layer to layer."""

    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    kinds: tuple[str, ...]  # sliding_attention | full_attention, of each layer
    window: int | None  # of sliding layers
    rope: Mapping[str, RopeParameters]  # by layer kind
    query_pre_attn_scalar: float = 256.0  # scores are divided by its root
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 131072
    final_logit_softcapping: float | None = None
    tie_word_embeddings: bool = True
    attention_bias: bool = False
    bos_token_id: int | None = 2
    eos_token_ids: tuple[int, ...] = (1,)
    pad_token_id: int | None = 0
    refused_token_ids: tuple[int, ...] = ()  # the image placeholder
    stored_dtype: str = "bfloat16"
    unknown: Mapping[str, Any] = field(default_factory=dict)

    model_type = "gemma3"
    canvas_length = None
    num_experts = 0
    top_k_experts = 0

    @property
    def num_hidden_layers(self) -> int:
        return len(self.kinds)

    def mixers(self) -> tuple[str, ...]:
        return ("attention",) * self.num_hidden_layers

    def memory_specs(self) -> list[AttentionSpec]:
        return [
            AttentionSpec(self.num_key_value_heads, self.head_dim, self.window if kind == SLIDING else None)
            for kind in self.kinds
        ]

    def layer_ropes(self) -> list[RopeParameters | None]:
        """How each layer rotates its queries and keys; None: not at all."""
        return [self.rope[kind] for kind in self.kinds]

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> Gemma3Config:
        """Parse the config.json of a text-only or multimodal checkpoint.

        Raises CheckpointError naming the key for missing, contradictory or unsupported values.
        """
        if "text_config" not in raw:
            return cls._from_text(Fields(raw), raw, {})
        outer = Fields(raw)
        outer.ignore(*(k for k in raw if k.endswith(("_config", "_token_id", "_token_index"))))
        outer.ignore("mm_tokens_per_image", "tie_word_embeddings")
        text = Fields(outer.get("text_config"), "config.json: text_config")
        return cls._from_text(text, raw, outer.harmless("gemma3"))

    @classmethod
    def _from_text(cls, fields: Fields, outer: Mapping[str, Any], unknown: Mapping[str, Any]) -> Gemma3Config:
        if fields.choice("use_bidirectional_attention", (None, False, True), None):
            raise fields.error(
                "use_bidirectional_attention is true (an embedding model): only causal text models are supported"
            )
        if (cap := fields.optional_number("attn_logit_softcapping")) is not None:
            raise fields.error(
                f"attn_logit_softcapping is {cap:g}: no released Gemma 3 caps the scores of its attention, and"
                " transformers leaves this setting unread; set it to null"
            )
        fields.choice("hidden_activation", ("gelu_pytorch_tanh",), "gelu_pytorch_tanh")
        num_heads, num_kv_heads = fields.integer("num_attention_heads", 8), fields.integer("num_key_value_heads", 4)
        if num_heads % num_kv_heads:
            raise fields.error(
                f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        if (head_dim := fields.integer("head_dim", 256)) % 2:
            raise fields.error(f"head_dim is {head_dim}: rotation pairs dimensions, use an even number")
        kinds, window = _kinds(fields), fields.optional_integer("sliding_window", 4096)
        if window is None and SLIDING in kinds:
            raise fields.error(f"layer_types holds {SLIDING!r}, but sliding_window is null")
        max_positions = fields.integer("max_position_embeddings", 131072)
        turning = _turning(fields)
        rope = {
            kind: RopeParameters.parse(
                found,
                theta=fields.number(THETA_KEYS[kind], THETAS[kind], above=0.0),
                max_positions=max_positions,
                head_dim=head_dim,
                types=ROPE_TYPES,
            )
            for kind, found in turning.items()
        }
        vocab_size = fields.integer("vocab_size", 262208)
        tied = fields.boolean("tie_word_embeddings", True)
        own_eos = fields.token_ids("eos_token_id", 1)
        return cls(
            hidden_size=fields.integer("hidden_size", 2304),
            intermediate_size=fields.integer("intermediate_size", 9216),
            vocab_size=vocab_size,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            kinds=kinds,
            window=window,
            rope=rope,
            query_pre_attn_scalar=fields.number("query_pre_attn_scalar", 256, above=0.0),
            rms_norm_eps=fields.epsilon("rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            final_logit_softcapping=fields.optional_number("final_logit_softcapping", above=0.0),
            tie_word_embeddings=Fields(outer).boolean("tie_word_embeddings", tied),
            attention_bias=fields.boolean("attention_bias", False),
            bos_token_id=fields.token_id("bos_token_id", 2),
            eos_token_ids=Fields(outer).token_ids("eos_token_id") or own_eos,
            pad_token_id=fields.token_id("pad_token_id", 0),
            refused_token_ids=Fields(outer).placeholders(vocab_size),
            stored_dtype=Fields(outer).stored_dtype(fields.raw),
            unknown={
                **unknown,
                **fields.harmless("gemma3", NEUTRAL),
                **{
                    f"rope_parameters.{kind}.{key}": value
                    for kind, found in turning.items()
                    for key, value in found.harmless("gemma3").items()
                },
            },
        )

    def untied(self, file: str) -> Gemma3Config:
        """The same with a head of its own, which `file` holds."""
        return replace(self, tie_word_embeddings=False)

    @stated_once
    def tensors(self) -> Tensors:
        """Checkpoint name (text-only prefix `model.`) -> (shape, role): everything that must be in the file."""
        h, d, width, tied = self.hidden_size, self.head_dim, self.intermediate_size, self.tie_word_embeddings
        q_size, kv_size = self.num_attention_heads * d, self.num_key_value_heads * d
        attention = {"q_proj": (q_size, h), "k_proj": (kv_size, h), "v_proj": (kv_size, h), "o_proj": (h, q_size)}
        layer: Tensors = {}
        for name, shape in attention.items():
            layer[f"self_attn.{name}.weight"] = (shape, roles.PROJECTIONS[name])
            if self.attention_bias:
                layer[f"self_attn.{name}.bias"] = (shape[:1], roles.BIAS)
        for name, shape in {"gate_proj": (width, h), "up_proj": (width, h), "down_proj": (h, width)}.items():
            layer[f"mlp.{name}.weight"] = (shape, roles.PROJECTIONS[name])
        for name in ("input", "post_attention", "pre_feedforward", "post_feedforward"):
            layer[f"{name}_layernorm.weight"] = ((h,), roles.NORM)
        layer |= {f"self_attn.{name}_norm.weight": ((d,), roles.QK_NORM) for name in "qk"}
        tensors: Tensors = {
            "model.embed_tokens.weight": ((self.vocab_size, h), roles.TIED_TABLE if tied else roles.EMBEDDING),
            "model.norm.weight": ((h,), roles.NORM),
        }
        for i in range(self.num_hidden_layers):
            tensors |= {f"model.layers.{i}.{name}": stated for name, stated in layer.items()}
        if not tied:
            tensors["lm_head.weight"] = ((self.vocab_size, h), roles.HEAD)
        return tensors

    def tolerated_tensors(self) -> tuple[str, ...]:
        """Patterns of whole names that may be present and mean nothing: the tower that sees, and a tied head."""
        towers = r"(model\.)?(vision_tower|multi_modal_projector)\..*"
        return (towers, r".*rotary_emb\..*", *((HEAD_NAMES.pattern,) if self.tie_word_embeddings else ()))


def _kinds(fields: Fields) -> tuple[str, ...]:
    """Of each layer: as listed, or else every sixth one sees all."""
    num_layers = fields.integer("num_hidden_layers", 26, maximum=LARGEST_COUNT)
    pattern = fields.integer("sliding_window_pattern", 6)
    kinds = fields.strings("layer_types")
    if kinds is None:
        return tuple(SLIDING if (i + 1) % pattern else FULL for i in range(num_layers))
    fields.ignore("_sliding_window_pattern")  # what the list was made of
    if len(kinds) != num_layers:
        raise fields.error(f"layer_types has {len(kinds)} entries, num_hidden_layers is {num_layers}")
    if (bad := next((kind for kind in kinds if kind not in (SLIDING, FULL)), None)) is not None:
        raise fields.error(f"layer_types holds {shown(bad)}, supported: {SLIDING!r}, {FULL!r}")
    return tuple(kinds)


def _turning(fields: Fields) -> dict[str, Fields]:
    """The object that says how heads turn, of each kind of layer; `rope_scaling` is of those that see all."""
    ropes = fields.get("rope_parameters", None) or {}
    if not isinstance(ropes, Mapping) or not set(ropes) <= set(THETAS):
        raise fields.error(
            f"rope_parameters is {shown(ropes)}, expected an object with an entry {SLIDING} and one {FULL}"
        )
    scaling = fields.get("rope_scaling", None) or {}
    own = {kind: ropes.get(kind) or {} for kind in THETAS}
    if not all(isinstance(each, Mapping) for each in (scaling, *own.values())):
        raise fields.error("rope_parameters or rope_scaling does not say how heads turn: expected objects")
    own[FULL] = {**own[FULL], **scaling}
    return {kind: Fields(found, f"{fields.file}: rope_parameters.{kind}") for kind, found in own.items()}
