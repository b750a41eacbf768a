"""Nemotron 3 and the other Nemotron-H hybrids: config.json -> frozen description of every layer. Never imports torch.

Source: the released configurations of Nano, Super and Ultra, and transformers' `configuration_nemotron_h.py`.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sparing.config import roles
from sparing.config.fields import LARGEST_COUNT, Fields
from sparing.config.memory import AttentionSpec, MemorySpec, RecurrentSpec
from sparing.config.roles import Tensors
from sparing.config.rope import RopeParameters
from sparing.config.stated import stated_once
from sparing.errors import shown

__all__ = ["MTPConfig", "Nemotron3Config"]

MAMBA, ATTENTION, MOE, MLP = "mamba", "attention", "moe", "mlp"
LETTERS = {"M": MAMBA, "*": ATTENTION, "E": MOE, "-": MLP}
# A list of layers in the releases' words, or in those that transformers writes.
WORDS = {MAMBA: MAMBA, "linear_attention": MAMBA, ATTENTION: ATTENTION, "full_attention": ATTENTION, MOE: MOE, MLP: MLP}
DTYPES = ("float32", "bfloat16", "float16")

ALIASES = {  # second names, which older files use
    "n_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "time_step_limit": "mamba_dt_limit",
    "use_conv_bias": "mamba_conv_bias",
}
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
    def last_memory_layer(self) -> int:
        """Index of the last layer that remembers anything; -1 if none does."""
        return max((i for i, kind in enumerate(self.layers) if kind in (MAMBA, ATTENTION)), default=-1)

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
        layers = _layers(fields, "hybrid_override_pattern", ("layers_block_type", "layer_types"))
        if layers is None:
            raise fields.error("neither hybrid_override_pattern nor layers_block_type says what the layers are")
        if MAMBA not in layers and ATTENTION not in layers:
            raise fields.error("no layer is mamba or attention: such a model sees one token at a time")
        fields.optional_integer("num_hidden_layers")  # the layers themselves count
        mtp = _layers(fields, "mtp_hybrid_override_pattern", ("mtp_layers_block_type",)) or (ATTENTION, MOE)
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
            **_mamba(fields, MAMBA in kinds),
            **_experts(fields, MOE in kinds),
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
        mixers = {
            MAMBA: self._mamba_tensors,
            ATTENTION: self._attention_tensors,
            MOE: self._moe_tensors,
            MLP: lambda: self._mlp_tensors("", self.intermediate_size),
        }
        tensors: Tensors = {}
        for i, kind in enumerate(self.layers):
            tensors[f"{prefix}layers.{i}.norm.weight"] = ((self.hidden_size,), roles.NORM)
            tensors |= {f"{prefix}layers.{i}.mixer.{name}": tensor for name, tensor in mixers[kind]().items()}
        return tensors

    def _mamba_tensors(self) -> Tensors:
        h, inner, heads, conv = self.hidden_size, self.mamba_size, self.mamba_num_heads, self.conv_size
        projected = inner + conv + heads
        tensors: Tensors = {
            "in_proj.weight": ((projected, h), roles.MATRIX),
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
            tensors |= {"in_proj.bias": ((projected,), roles.BIAS), "out_proj.bias": ((h,), roles.BIAS)}
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


def _layers(fields: Fields, pattern_key: str, list_keys: tuple[str, ...]) -> tuple[str, ...] | None:
    """Kinds of layers from a list of words, else from a pattern of letters; None where neither is given."""
    for key in list_keys:
        words = fields.strings(key)
        if words is not None:
            fields.ignore(pattern_key, *list_keys)
            if (i := next((i for i, word in enumerate(words) if word not in WORDS), None)) is not None:
                raise fields.error(f"{key}[{i}] is {shown(words[i])}, supported: {', '.join(map(repr, WORDS))}")
            if len(words) > LARGEST_COUNT:
                raise fields.error(f"{key} has {len(words)} entries, over {LARGEST_COUNT}, which no model has")
            if not words:
                raise fields.error(f"{key} is empty: a model has at least one layer")
            return tuple(WORDS[word] for word in words)
    pattern = fields.get(pattern_key, None)
    if pattern is None:
        return None
    if not isinstance(pattern, str) or not pattern:
        raise fields.error(f"{pattern_key} is {shown(pattern)}, expected a string of the letters {' '.join(LETTERS)}")
    if len(pattern) > LARGEST_COUNT:
        raise fields.error(f"{pattern_key} has {len(pattern)} letters, over {LARGEST_COUNT}, which no model has")
    if (i := next((i for i, letter in enumerate(pattern) if letter not in LETTERS), None)) is not None:
        raise fields.error(f"{pattern_key}[{i}] is {pattern[i]!r}, supported: {' '.join(LETTERS)}")
    return tuple(LETTERS[letter] for letter in pattern)


def _mamba(fields: Fields, present: bool) -> dict[str, Any]:
    """Numbers of the Mamba layers; defaults where there are none."""
    for key, alias in ALIASES.items():
        a, b = fields.get(key, None), fields.get(alias, None)
        if a is not None and b is not None and a != b:
            raise fields.error(f"{key} is {shown(a)}, {alias} is {shown(b)}: the two are one number, give one of them")

    def name(key: str) -> str:
        return ALIASES[key] if fields.raw.get(ALIASES[key]) is not None else key

    heads, groups = fields.integer("mamba_num_heads", 128), fields.integer(name("n_groups"), 8)
    values = {
        "mamba_num_heads": heads,
        "mamba_head_dim": fields.integer("mamba_head_dim", 64),
        "n_groups": groups,
        "ssm_state_size": fields.integer("ssm_state_size", 128),
        "conv_kernel": fields.integer(name("conv_kernel"), 4),
        "use_conv_bias": fields.boolean(name("use_conv_bias"), True),
        "use_bias": fields.boolean("use_bias", False),
        "time_step_limit": _limit(fields, name("time_step_limit")),
        "ssm_dtype": fields.choice("mamba_ssm_cache_dtype", DTYPES, "float32"),
    }
    if present and heads % groups:
        raise fields.error(f"mamba_num_heads {heads} is not a multiple of n_groups {groups}")
    return values if present else {}


def _limit(fields: Fields, key: str) -> tuple[float, float]:
    """Bounds of dt. Infinity is a JSON extension, which files spell `Infinity`, "inf" or {"__float__": "Infinity"}."""
    raw = fields.get(key, None)
    if raw is None:
        return 0.0, math.inf
    items = raw if isinstance(raw, list | tuple) else []
    bounds: list[Any] = [item.get("__float__") if isinstance(item, Mapping) else item for item in items]
    try:
        low, high = (math.nan if isinstance(bound, bool) else float(bound) for bound in bounds)
    except OverflowError:
        raise fields.error(f'{key} holds a number that no step reaches: write "inf" for no upper bound') from None
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 <= low < high:
        raise fields.error(f'{key} is {shown(raw)}, expected two bounds like [0.0, "inf"]')
    return low, high


def _experts(fields: Fields, present: bool) -> dict[str, Any]:
    """Numbers of the mixture layers; defaults where there are none."""
    fields.choice("n_shared_experts", (1,), 1)
    latent = fields.optional_integer("moe_latent_size")
    experts = fields.integer("n_routed_experts", 8, maximum=LARGEST_COUNT)
    k = fields.integer("num_experts_per_tok", 2)
    groups, best = fields.integer("n_group", 1), fields.integer("topk_group", 1)
    values = {
        "num_experts": experts,
        "top_k_experts": k,
        "n_group": groups,
        "topk_group": best,
        "norm_topk_prob": fields.boolean("norm_topk_prob", True),
        "routed_scaling_factor": fields.number("routed_scaling_factor", 1.0),
        "moe_intermediate_size": fields.integer("moe_intermediate_size", 7688),
        "moe_shared_expert_intermediate_size": fields.integer("moe_shared_expert_intermediate_size", 7688),
        "moe_latent_size": latent,
    }
    if not present:
        return {}
    if experts % groups:
        raise fields.error(f"n_routed_experts {experts} is not a multiple of n_group {groups}")
    if best > groups:
        raise fields.error(f"topk_group is {best}, there are only {groups} groups (n_group)")
    if k > best * (experts // groups):
        raise fields.error(
            f"num_experts_per_tok is {k}, but {best} groups of {experts // groups} experts hold only"
            f" {best * (experts // groups)}: raise topk_group ({best}) or lower num_experts_per_tok"
        )
    return values
