"""Llama, Mistral, Qwen2 and Qwen3: one pre-norm stack, four sets of switches. Never imports torch.

Source: the released config.json files and transformers' configurations of the four model types.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sparing.config.fields import LARGEST_COUNT, LARGEST_SIZE, Fields
from sparing.config.memory import AttentionSpec
from sparing.config.names import HEAD_NAMES
from sparing.config.roles import BIAS, EMBEDDING, HEAD, NORM, PROJECTIONS, QK_NORM, TIED_TABLE, Tensors
from sparing.config.rope import RopeParameters
from sparing.config.stated import stated_once
from sparing.errors import shown

__all__ = ["LlamaConfig"]

# What transformers assumes where config.json leaves a key out.
DEFAULT_KV_HEADS = {"mistral": 8, "qwen2": 32, "qwen3": 32}
DEFAULT_POSITIONS = {"llama": 2048, "mistral": 131072, "qwen2": 32768, "qwen3": 32768}
DEFAULT_WINDOW = 4096


@dataclass(frozen=True)
class LlamaConfig:
    """All numbers of the stack.

    windows: sliding window of each layer (None: full attention); max_position_embeddings: tokens that the model can
    hold, with the stretch of `rope` where config.json states the length before it.
    """

    model_type: str
    hidden_size: int
    intermediate_size: int
    vocab_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    windows: tuple[int | None, ...]
    rope: RopeParameters
    rms_norm_eps: float
    max_position_embeddings: int
    tie_word_embeddings: bool
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    pad_token_id: int | None = None
    stored_dtype: str = "float32"
    unknown: Mapping[str, Any] = field(default_factory=dict)

    canvas_length = None
    refused_token_ids = ()
    num_experts = top_k_experts = 0

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> LlamaConfig:
        """Parse config.json. Raises CheckpointError naming the key for missing or contradictory values."""
        fields = Fields(raw)
        model_type = fields.choice("model_type", ("llama", "mistral", "qwen2", "qwen3"))
        fields.choice("hidden_act", ("silu", "swish"), "silu")
        hidden_size = fields.integer("hidden_size")
        num_heads = fields.integer("num_attention_heads")
        num_kv_heads = fields.optional_integer("num_key_value_heads", DEFAULT_KV_HEADS.get(model_type)) or num_heads
        if num_heads % num_kv_heads:
            raise fields.error(
                f"num_attention_heads {num_heads} is not a multiple of num_key_value_heads {num_kv_heads}"
            )
        head_dim = fields.optional_integer("head_dim", 128 if model_type == "qwen3" else None)
        if head_dim is None:
            if hidden_size % num_heads:
                raise fields.error(
                    f"no head_dim, and hidden_size {hidden_size} is not a multiple of num_attention_heads {num_heads}"
                )
            head_dim = hidden_size // num_heads
        num_layers = fields.integer("num_hidden_layers", maximum=LARGEST_COUNT)
        max_positions = fields.integer("max_position_embeddings", DEFAULT_POSITIONS[model_type])
        rope, unknown = _rope(fields, model_type, max_positions, head_dim)
        bias = fields.boolean("attention_bias", False) if model_type in ("llama", "qwen3") else False
        return cls(
            model_type=model_type,
            hidden_size=hidden_size,
            intermediate_size=fields.integer("intermediate_size"),
            vocab_size=fields.integer("vocab_size"),
            num_hidden_layers=num_layers,
            num_attention_heads=num_heads,
            num_key_value_heads=num_kv_heads,
            head_dim=head_dim,
            windows=_windows(fields, model_type, num_layers, max_positions),
            rope=rope,
            rms_norm_eps=fields.epsilon("rms_norm_eps", 1e-6),
            max_position_embeddings=_context(max_positions, rope),
            tie_word_embeddings=fields.boolean("tie_word_embeddings", False),
            qkv_bias=bias or model_type == "qwen2",
            output_bias=bias,
            mlp_bias=fields.boolean("mlp_bias", False) if model_type == "llama" else False,
            qk_norm=model_type == "qwen3",
            bos_token_id=fields.token_id("bos_token_id"),
            eos_token_ids=fields.token_ids("eos_token_id"),
            pad_token_id=fields.token_id("pad_token_id"),
            stored_dtype=fields.stored_dtype(),
            unknown=fields.harmless(model_type, _neutral(model_type, head_dim)) | unknown,
        )

    def untied(self, file: str) -> LlamaConfig:
        """The same with a head of its own, which `file` holds."""
        return replace(self, tie_word_embeddings=False)

    def mixers(self) -> tuple[str, ...]:
        return ("attention",) * self.num_hidden_layers

    def memory_specs(self) -> list[AttentionSpec]:
        return [AttentionSpec(self.num_key_value_heads, self.head_dim, window) for window in self.windows]

    def layer_ropes(self) -> list[RopeParameters | None]:
        """How each layer rotates its queries and keys; None: not at all."""
        return [self.rope] * self.num_hidden_layers

    @stated_once
    def tensors(self) -> Tensors:
        """Checkpoint name -> (shape, role): everything that must be in the file."""
        h, d = self.hidden_size, self.head_dim
        tied = self.tie_word_embeddings
        tensors: Tensors = {
            "model.embed_tokens.weight": ((self.vocab_size, h), TIED_TABLE if tied else EMBEDDING),
            "model.norm.weight": ((h,), NORM),
        }
        if not tied:
            tensors["lm_head.weight"] = ((self.vocab_size, h), HEAD)
        projections = {
            ("self_attn", "q_proj"): (self.num_attention_heads * d, h, self.qkv_bias),
            ("self_attn", "k_proj"): (self.num_key_value_heads * d, h, self.qkv_bias),
            ("self_attn", "v_proj"): (self.num_key_value_heads * d, h, self.qkv_bias),
            ("self_attn", "o_proj"): (h, self.num_attention_heads * d, self.output_bias),
            ("mlp", "gate_proj"): (self.intermediate_size, h, self.mlp_bias),
            ("mlp", "up_proj"): (self.intermediate_size, h, self.mlp_bias),
            ("mlp", "down_proj"): (h, self.intermediate_size, self.mlp_bias),
        }
        layer: Tensors = {}  # of each alike: one tuple for all, as tuples by the hundred thousand take long to make
        for (module, projection), (rows, columns, has_bias) in projections.items():
            layer[f"{module}.{projection}.weight"] = ((rows, columns), PROJECTIONS[projection])
            if has_bias:
                layer[f"{module}.{projection}.bias"] = ((rows,), BIAS)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            layer[f"{norm}.weight"] = ((h,), NORM)
        if self.qk_norm:
            layer |= {"self_attn.q_norm.weight": ((d,), QK_NORM), "self_attn.k_norm.weight": ((d,), QK_NORM)}
        for i in range(self.num_hidden_layers):
            tensors |= {f"model.layers.{i}.{name}": stated for name, stated in layer.items()}
        return tensors

    def tolerated_tensors(self) -> tuple[str, ...]:
        """Patterns of whole names that may be present and mean nothing."""
        return (r".*rotary_emb\..*", *((HEAD_NAMES.pattern,) if self.tie_word_embeddings else ()))


def _rope(fields: Fields, model_type: str, max_positions: int, head_dim: int) -> tuple[RopeParameters, dict[str, Any]]:
    """How heads turn, as an object and the keys beside it say, and what of the object nobody reads."""
    if head_dim % 2:
        raise fields.error(f"head_dim is {head_dim}: rotation pairs dimensions, use an even number")
    key = "rope_scaling" if fields.get("rope_scaling", None) else "rope_parameters"
    fields.ignore("rope_parameters")
    turning = Fields(fields.raw.get(key) or {}, f"{fields.file}: {key}")
    rope = RopeParameters.parse(
        turning,
        theta=fields.optional_number("rope_theta", above=0.0) or 10000.0,
        max_positions=max_positions,
        head_dim=head_dim,
        original=fields.optional_integer("original_max_position_embeddings"),
        partial=1.0 if (share := fields.optional_number("partial_rotary_factor")) is None else share,
    )
    return rope, {f"{key}.{name}": value for name, value in turning.harmless(model_type).items()}


def _context(max_positions: int, rope: RopeParameters) -> int:
    """Tokens a sequence may have. Llama 3's `max_position_embeddings` counts them after stretching, others' before."""
    if rope.rope_type in ("linear", "dynamic"):
        return int(min(max_positions * rope.factor, LARGEST_SIZE))
    if rope.rope_type == "yarn":
        return max(max_positions, int(min(rope.original_max_position_embeddings * rope.factor, LARGEST_SIZE)))
    return max_positions


def _neutral(model_type: str, head_dim: int) -> dict[str, Any]:
    """Values of unread settings that say what the stack does anyway."""
    return {
        "query_pre_attn_scalar": (head_dim,),
        "rotary_dim": (head_dim,),
        "rope_dimension_count": (head_dim,),
        "use_qk_norm": (model_type == "qwen3",),
        "qk_norm": (model_type == "qwen3",),
        **dict.fromkeys(("hidden_activation", "activation_function", "activation", "act_fn"), ("silu", "swish")),
    }


def _windows(fields: Fields, model_type: str, num_layers: int, max_positions: int) -> tuple[int | None, ...]:
    """Sliding window of each layer. Qwen's `use_sliding_window` gates it and spares the first layers."""
    window = fields.optional_integer("sliding_window", DEFAULT_WINDOW)
    if model_type == "llama" and "sliding_window" in fields.raw and window is not None and window < max_positions:
        raise fields.error(f"sliding_window is {window}, llama models see all: remove it, or set model_type to mistral")
    kinds = fields.strings("layer_types")
    use_window = (
        fields.boolean("use_sliding_window", False) if model_type.startswith("qwen") else model_type == "mistral"
    )
    spared = fields.optional_integer("max_window_layers", 28, minimum=0) or 0
    if not use_window:
        window = None
    if kinds is None:
        first = spared if model_type.startswith("qwen") else 0
        return tuple(window if i >= first else None for i in range(num_layers))
    if len(kinds) != num_layers:
        raise fields.error(f"layer_types has {len(kinds)} entries, num_hidden_layers is {num_layers}")
    bad = next((kind for kind in kinds if kind not in ("full_attention", "sliding_attention")), None)
    if bad is not None:
        raise fields.error(f"layer_types holds {shown(bad)}, supported: 'full_attention', 'sliding_attention'")
    if "sliding_attention" in kinds and window is None:
        switch = "sliding_window is null" if use_window else "use_sliding_window is not set"
        raise fields.error(f"layer_types holds 'sliding_attention', but {switch}")
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)
