"""DeepSeek-V4 (Pro, Flash): config.json -> frozen description of every layer. Never imports torch.

Source: arXiv 2606.19348, the inference code in the released repositories, transformers' `configuration_deepseek_v4.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from sparing.config import roles
from sparing.config.deepseek_v4_dialects import (
    CSA,
    SLIDING,
    V4_1,
    DeepseekV4Layer,
    read_layers,
    read_ropes,
    read_storage,
    read_turning,
)
from sparing.config.fields import LARGEST_COUNT, Fields
from sparing.config.memory import CompressedSpec, Indexer
from sparing.config.roles import Stacked, Tensors
from sparing.config.rope import RopeParameters
from sparing.config.stated import stated_once
from sparing.config.stored_parts import StoredPart, stored_parts
from sparing.errors import CheckpointError

__all__ = ["DeepseekV4Config", "MTPConfig"]

SCORES = ("sqrtsoftplus", "sigmoid", "softmax")
# Of a drafting layer, what may be there beside its own: copies of the model's embedding and head.
COPIES = r"mtp\.\d+\.(emb\.tok_emb|embed|embed_tokens|(shared_head\.)?head|lm_head)\.\w+"
WITHOUT_EFFECT = ("output_router_logits", "router_aux_loss_coef", "router_jitter_noise")  # of training


@dataclass(frozen=True)
class MTPConfig:
    """The layers that draft. text: described as if they were a model's."""

    text: DeepseekV4Config

    def tensors(self) -> Tensors:
        """Name (`mtp.j.`, experts stacked) -> (shape, role): everything of these layers that must be in the file."""
        c, tensors = self.text, Tensors()
        for j, layer in enumerate(c.layers):
            tensors |= c._layer_tensors(f"mtp.{j}.", layer) | c._collapse_tensors(f"mtp.{j}.")
            for name in ("e_proj", "h_proj"):
                tensors[f"mtp.{j}.{name}.weight"] = ((c.hidden_size, c.hidden_size), roles.MATRIX)
            for name in ("enorm", "hnorm"):
                tensors[f"mtp.{j}.{name}.weight"] = ((c.hidden_size,), roles.NORM)
        return tensors

    def refuse_later(self, stored: Iterable[str], file: str) -> None:
        """Raises CheckpointError where a file's drafting tensors, by their canonical names, are of another design.

        Copies of the model's embedding and head may be there: they are the model's own.
        """
        ours = {re.sub(r"\.experts\.\w+$", ".experts", name) for name in self.tensors()}
        for name in stored:
            if not name.startswith("mtp.") or re.fullmatch(COPIES, name):
                continue
            expert = re.search(r"\.experts\.(\d+)\.", name)
            is_surplus = expert is not None and int(expert[1]) >= self.text.num_experts
            if is_surplus or re.sub(r"\.experts\..*", ".experts", name) not in ours:
                raise CheckpointError(
                    f"{file}: {name} is no tensor of DeepSeek-V4's drafting head: a later design (such as DSpark's"
                    " main_proj) is not supported, use draft='ngram'"
                )


@dataclass(frozen=True)
class DeepseekV4Config:
    """All numbers of a DeepSeek-V4 stack: in each layer attention and experts, between hc_mult residual streams.

    layers: what differs from layer to layer; mtp_layers: those that draft, () without any. qk_rope_head_dim: how many
    dimensions at the end of a head turn, in interleaved pairs. q_lora_rank: width of the latent that queries of
    attention and indexer are made from. o_groups, o_lora_rank: groups of heads that the output projection first takes
    to o_lora_rank numbers each. sliding_window: last tokens a query sees uncompressed, its own included. index_*: of
    the indexer of CSA layers, which chooses index_topk entries. hc_*: of the hyper-connections. swiglu_limit: experts'
    gates are cut above it, their other half on both sides. rope: "main" turns sliding layers, "compress" all others.
    is_fp8: whether matrices are released in FP8 with a scale for each block of 128 x 128; expert_dtype: "fp4", "fp8" or
    "bf16" where config.json says what routed experts are stored in, else None.
    """

    hidden_size: int
    vocab_size: int
    layers: tuple[DeepseekV4Layer, ...]
    num_attention_heads: int
    head_dim: int
    qk_rope_head_dim: int
    q_lora_rank: int
    o_groups: int
    o_lora_rank: int
    sliding_window: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    rope: Mapping[str, RopeParameters]
    scoring_func: str = "sqrtsoftplus"
    routed_scaling_factor: float = 1.5
    swiglu_limit: float = 10.0
    hc_mult: int = 4
    hc_sinkhorn_iters: int = 20
    hc_eps: float = 1e-6
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 1048576
    mtp_layers: tuple[DeepseekV4Layer, ...] = ()
    bos_token_id: int | None = 0
    eos_token_ids: tuple[int, ...] = (1,)
    pad_token_id: int | None = None
    is_fp8: bool = False
    expert_dtype: str | None = None
    stored_dtype: str = "bfloat16"
    unknown: Mapping[str, Any] = field(default_factory=dict)

    model_type = "deepseek_v4"
    num_key_value_heads = 1
    canvas_length = None
    refused_token_ids = ()
    tie_word_embeddings = False

    @property
    def num_hidden_layers(self) -> int:
        return len(self.layers)

    @property
    def mtp(self) -> MTPConfig:
        """The layers that draft, which a file may hold or not."""
        return MTPConfig(replace(self, layers=self.mtp_layers, mtp_layers=()))

    def mixers(self) -> tuple[str, ...]:
        return ("attention",) * self.num_hidden_layers

    def untied(self, file: str) -> DeepseekV4Config:
        """The same: a head is never the embedding."""
        return self

    def memory_specs(self) -> list[CompressedSpec]:
        index = Indexer(self.index_n_heads, self.index_head_dim, self.index_topk)
        return [
            CompressedSpec(
                head_dim=self.head_dim,
                rope_dim=self.qk_rope_head_dim,
                window=self.sliding_window,
                ratio=layer.ratio,
                is_overlapping=layer.kind == CSA,
                index=index if layer.kind == CSA else None,
            )
            for layer in self.layers
        ]

    def layer_ropes(self) -> list[RopeParameters]:
        """How each layer rotates queries and keys: entries and indexer of a layer turn as its attention does."""
        return [self.rope["main" if layer.kind == SLIDING else "compress"] for layer in self.layers]

    def tolerated_tensors(self) -> tuple[str, ...]:
        """Patterns of whole names that may be present and mean nothing: the layers that draft."""
        return (r"(model\.)?mtp\..*",)

    def released(self, *, drafting: bool) -> Iterator[StoredPart]:
        """What the release's files hold, with or without the layers that draft. Experts: FP4 where nothing is said."""
        tensors = self.tensors() | (self.mtp.tensors() if drafting else {})
        return stored_parts(tensors, experts=self.expert_dtype or "fp4", scale="float8_e8m0fnu")

    @stated_once
    def tensors(self) -> Tensors:
        """Name (transformers', experts stacked) -> (shape, role): all that must be in the file.

        What the releases call them: `config.deepseek_v4_names`.
        """
        tensors: Tensors = {
            "model.embed_tokens.weight": ((self.vocab_size, self.hidden_size), roles.EMBEDDING),
            "lm_head.weight": ((self.vocab_size, self.hidden_size), roles.HEAD),
            **self._collapse_tensors("model."),
        }
        for i, layer in enumerate(self.layers):
            tensors |= self._layer_tensors(f"model.layers.{i}.", layer)
        return tensors

    def _collapse_tensors(self, prefix: str) -> Tensors:
        """What makes one stream of all, and the norm after it."""
        n, h = self.hc_mult, self.hidden_size
        return {
            f"{prefix}norm.weight": ((h,), roles.NORM),
            f"{prefix}hc_head.hc_fn": ((n, n * h), roles.HYPER_CONNECTION),
            f"{prefix}hc_head.hc_base": ((n,), roles.HYPER_GATE),
            f"{prefix}hc_head.hc_scale": ((1,), roles.HYPER_GATE),
        }

    def _layer_tensors(self, prefix: str, layer: DeepseekV4Layer) -> Tensors:
        n, h = self.hc_mult, self.hidden_size
        tensors: Tensors = {}
        for part in ("attn_hc", "ffn_hc"):  # rows: n that collapse streams, n that write, n * n that mix
            tensors[f"{part}.fn"] = (Stacked((n, n, n * n), n * h), roles.HYPER_CONNECTION)
            tensors[f"{part}.base"] = (((2 + n) * n,), roles.HYPER_GATE)
            tensors[f"{part}.scale"] = ((3,), roles.HYPER_GATE)
        for norm in ("input_layernorm", "post_attention_layernorm"):
            tensors[f"{norm}.weight"] = ((h,), roles.NORM)
        tensors |= {f"self_attn.{name}": tensor for name, tensor in self._attention_tensors(layer).items()}
        tensors |= {f"mlp.{name}": tensor for name, tensor in self._moe_tensors(layer).items()}
        return {prefix + name: tensor for name, tensor in tensors.items()}

    def _attention_tensors(self, layer: DeepseekV4Layer) -> Tensors:
        h, d, q, heads = self.hidden_size, self.head_dim, self.q_lora_rank, self.num_attention_heads
        latent = (self.o_lora_rank,) * self.o_groups
        tensors: Tensors = {
            "q_a_proj.weight": ((q, h), roles.MATRIX),
            "q_a_norm.weight": ((q,), roles.NORM),
            "q_b_proj.weight": ((heads * d, q), roles.MATRIX),
            "kv_proj.weight": ((d, h), roles.MATRIX),
            "kv_norm.weight": ((d,), roles.NORM),
            "sinks": ((heads,), roles.SINK),
            "o_a_proj.weight": (Stacked(latent, heads * d // self.o_groups), roles.MATRIX),  # rows for each group
            "o_b_proj.weight": ((h, sum(latent)), roles.OUTPUT),
        }
        if layer.kind != SLIDING:
            tensors |= self._compressor_tensors("compressor.", layer, d)
        if layer.kind == CSA:
            rows = self.index_n_heads * self.index_head_dim
            tensors |= self._compressor_tensors("compressor.indexer.", layer, self.index_head_dim)
            tensors["compressor.indexer.q_b_proj.weight"] = ((rows, q), roles.MATRIX)
            tensors["compressor.indexer.scorer.weights_proj.weight"] = ((self.index_n_heads, h), roles.COMPRESSOR)
        return tensors

    def _compressor_tensors(self, prefix: str, layer: DeepseekV4Layer, size: int) -> Tensors:
        """Windows that overlap have two series: rows [:size] are for the next window, [size:] for the current one."""
        rows = (size, size) if layer.kind == CSA else (size,)
        return {
            f"{prefix}kv_proj.weight": (Stacked(rows, self.hidden_size), roles.COMPRESSOR),
            f"{prefix}gate_proj.weight": (Stacked(rows, self.hidden_size), roles.COMPRESSOR),
            f"{prefix}position_bias": ((layer.ratio, sum(rows)), roles.POSITION_BIAS),
            f"{prefix}kv_norm.weight": ((size,), roles.NORM),
        }

    def _moe_tensors(self, layer: DeepseekV4Layer) -> Tensors:
        h, experts, width = self.hidden_size, self.num_experts, self.moe_intermediate_size
        tensors: Tensors = {
            "gate.weight": ((experts, h), roles.ROUTER),
            "experts.gate_up_proj": (Stacked((width, width), h, experts), roles.EXPERTS),  # the gate's rows first
            "experts.down_proj": ((experts, h, width), roles.EXPERTS),
        }
        if layer.is_hash:
            tensors["gate.tid2eid"] = ((self.vocab_size, self.top_k_experts), roles.HASH_TABLE)
        else:
            tensors["gate.e_score_correction_bias"] = ((experts,), roles.CORRECTION)
        for name, shape in {"gate_proj": (width, h), "up_proj": (width, h), "down_proj": (h, width)}.items():
            tensors[f"shared_experts.{name}.weight"] = (shape, roles.PROJECTIONS[name])
        return tensors

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DeepseekV4Config:
        """Parse a config.json of either dialect.

        Raises CheckpointError naming the keys for missing, contradictory or unsupported values.
        """
        fields = Fields(raw)
        if later := next((key for key in raw if re.match(r"engram|num_engram", key, re.IGNORECASE)), None):
            raise fields.error(f"{later} is stated: {V4_1}")
        fields.ignore(*WITHOUT_EFFECT)
        for key, only in {
            "num_key_value_heads": 1, "n_shared_experts": 1, "norm_topk_prob": True, "topk_method": "noaux_tc",
            "hidden_act": "silu", "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": False,
        }.items():  # fmt: skip
            fields.choice(key, (only,), only)
        count = fields.integer("num_hidden_layers", 43, maximum=LARGEST_COUNT)
        drafting = fields.integer("num_nextn_predict_layers", 1, minimum=0, maximum=LARGEST_COUNT)
        layers, mtp_layers = read_layers(fields, count, drafting)
        heads, head_dim = fields.integer("num_attention_heads", 64), fields.integer("head_dim", 512)
        turning, share = read_turning(fields, head_dim)
        groups = fields.integer("o_groups", 8)
        if heads % groups:
            raise fields.error(f"num_attention_heads {heads} is not a multiple of o_groups {groups}")
        index_dim = fields.integer("index_head_dim", 128)
        if turning > index_dim and any(layer.kind == CSA for layer in (*layers, *mtp_layers)):
            raise fields.error(f"index_head_dim is {index_dim}, of which qk_rope_head_dim {turning} cannot turn")
        experts, k = (
            fields.integer("n_routed_experts", 256, maximum=LARGEST_COUNT),
            fields.integer("num_experts_per_tok", 6),
        )
        if k > experts:
            raise fields.error(f"num_experts_per_tok is {k}, there are only {experts} experts (n_routed_experts)")
        max_positions = fields.integer("max_position_embeddings", 1048576)
        is_fp8, expert_dtype = read_storage(fields)
        rope, unread = read_ropes(fields, max_positions, head_dim, share)
        return cls(
            hidden_size=fields.integer("hidden_size", 4096),
            vocab_size=fields.integer("vocab_size", 129280),
            layers=layers,
            num_attention_heads=heads,
            head_dim=head_dim,
            qk_rope_head_dim=turning,
            q_lora_rank=fields.integer("q_lora_rank", 1024),
            o_groups=groups,
            o_lora_rank=fields.integer("o_lora_rank", 1024),
            sliding_window=fields.integer("sliding_window", 128),
            index_n_heads=fields.integer("index_n_heads", 64),
            index_head_dim=index_dim,
            index_topk=fields.integer("index_topk", 512),
            num_experts=experts,
            top_k_experts=k,
            moe_intermediate_size=fields.integer("moe_intermediate_size", 2048),
            rope=rope,
            scoring_func=fields.choice("scoring_func", SCORES, "sqrtsoftplus"),
            routed_scaling_factor=fields.number("routed_scaling_factor", 1.5),
            swiglu_limit=fields.number("swiglu_limit", 10.0, above=0.0),
            hc_mult=fields.integer("hc_mult", 4),
            hc_sinkhorn_iters=fields.integer("hc_sinkhorn_iters", 20),
            hc_eps=fields.epsilon("hc_eps", 1e-6),
            rms_norm_eps=fields.epsilon("rms_norm_eps", 1e-6),
            max_position_embeddings=max_positions,
            mtp_layers=mtp_layers,
            bos_token_id=fields.token_id("bos_token_id", 0),
            eos_token_ids=fields.token_ids("eos_token_id", 1),
            pad_token_id=fields.token_id("pad_token_id"),
            is_fp8=is_fp8,
            expert_dtype=expert_dtype,
            stored_dtype=fields.stored_dtype(),
            unknown={**unread, **fields.harmless("deepseek_v4")},
        )
