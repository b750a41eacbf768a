"""DeepSeek-V3.2: config.json -> what a plan needs to know of it. It is planned, not run. Never imports torch.

Latent attention (MLA) over entries of single tokens, of which an indexer chooses: the model that DeepSeek-V4's figures
are compared with. The layers that draft are left out.
Source: the released configuration, transformers' `configuration_deepseek_v32.py`; arXiv 2412.19437 for MLA.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from sparing.config import roles
from sparing.config.entry_formats import DEEPSEEK_V3_2
from sparing.config.fields import LARGEST_COUNT, Fields
from sparing.config.memory import CompressedSpec, Indexer
from sparing.config.roles import Tensors
from sparing.config.rope import RopeParameters
from sparing.config.stated import stated_once
from sparing.config.stored_parts import StoredPart, stored_parts

__all__ = ["DeepseekV32Config"]

WITHOUT_EFFECT = (  # on what is counted
    "aux_loss_alpha", "ep_size", "first_k_dense_replace", "hidden_act", "moe_layer_freq", "n_group", "norm_topk_prob",
    "num_key_value_heads", "num_nextn_predict_layers", "rms_norm_eps", "routed_scaling_factor", "scoring_func",
    "seq_aux", "topk_group", "topk_method",
)  # fmt: skip


@dataclass(frozen=True)
class DeepseekV32Config:
    """Sizes of a DeepSeek-V3.2 stack.

    mlps: "dense" or "sparse" (a mixture of experts) per layer. An entry is a latent of kv_lora_rank numbers, from which
    keys and values follow, and qk_rope_head_dim that turn.
    """

    hidden_size: int
    vocab_size: int
    mlps: tuple[str, ...]
    num_attention_heads: int
    q_lora_rank: int
    kv_lora_rank: int
    qk_nope_head_dim: int
    qk_rope_head_dim: int
    v_head_dim: int
    index_n_heads: int
    index_head_dim: int
    index_topk: int
    intermediate_size: int
    num_experts: int
    top_k_experts: int
    moe_intermediate_size: int
    rope: RopeParameters
    max_position_embeddings: int = 163840
    bos_token_id: int | None = 0
    eos_token_ids: tuple[int, ...] = (1,)
    pad_token_id: int | None = None
    is_fp8: bool = False
    stored_dtype: str = "bfloat16"
    unknown: Mapping[str, Any] = field(default_factory=dict)

    model_type = "deepseek_v32"
    canvas_length = None
    refused_token_ids = ()
    tie_word_embeddings = False

    @property
    def num_hidden_layers(self) -> int:
        return len(self.mlps)

    def mixers(self) -> tuple[str, ...]:
        return ("attention",) * self.num_hidden_layers

    def untied(self, file: str) -> DeepseekV32Config:
        """The same: a head is never the embedding."""
        return self

    def memory_specs(self) -> list[CompressedSpec]:
        spec = CompressedSpec(
            head_dim=self.kv_lora_rank + self.qk_rope_head_dim,
            rope_dim=self.qk_rope_head_dim,
            window=0,
            ratio=1,  # every token has an entry of its own
            index=Indexer(self.index_n_heads, self.index_head_dim, self.index_topk),
            value_dim=self.kv_lora_rank,
            released=DEEPSEEK_V3_2,
        )
        return [spec] * self.num_hidden_layers

    def layer_ropes(self) -> list[RopeParameters | None]:
        return [self.rope] * self.num_hidden_layers

    def tolerated_tensors(self) -> tuple[str, ...]:
        """Patterns of whole names that may be present and mean nothing: layers after the last, which draft."""
        return (rf"model\.layers\.({self.num_hidden_layers})\..*",)

    def released(self, *, drafting: bool) -> Iterator[StoredPart]:
        """What the release's files hold; layers that draft are not described."""
        return stored_parts(self.tensors(), experts="fp8", scale="float32")

    @stated_once
    def tensors(self) -> Tensors:
        """Name (transformers', experts stacked) -> (shape, role)."""
        h = self.hidden_size
        tensors: Tensors = {
            "model.embed_tokens.weight": ((self.vocab_size, h), roles.EMBEDDING),
            "model.norm.weight": ((h,), roles.NORM),
            "lm_head.weight": ((self.vocab_size, h), roles.HEAD),
        }
        for i, mlp in enumerate(self.mlps):
            layer = f"model.layers.{i}."
            for norm in ("input_layernorm", "post_attention_layernorm"):
                tensors[f"{layer}{norm}.weight"] = ((h,), roles.NORM)
            tensors |= {f"{layer}self_attn.{name}": tensor for name, tensor in self._attention_tensors().items()}
            inside = self._mlp_tensors("", self.intermediate_size) if mlp == "dense" else self._moe_tensors()
            tensors |= {f"{layer}mlp.{name}": tensor for name, tensor in inside.items()}
        return tensors

    def _attention_tensors(self) -> Tensors:
        h, heads, q, latent = self.hidden_size, self.num_attention_heads, self.q_lora_rank, self.kv_lora_rank
        inner, di = self.qk_nope_head_dim + self.qk_rope_head_dim, self.index_head_dim
        return {
            "q_a_proj.weight": ((q, h), roles.MATRIX),
            "q_a_layernorm.weight": ((q,), roles.NORM),
            "q_b_proj.weight": ((heads * inner, q), roles.MATRIX),
            "kv_a_proj_with_mqa.weight": ((latent + self.qk_rope_head_dim, h), roles.MATRIX),
            "kv_a_layernorm.weight": ((latent,), roles.NORM),
            "kv_b_proj.weight": ((heads * (self.qk_nope_head_dim + self.v_head_dim), latent), roles.MATRIX),
            "o_proj.weight": ((h, heads * self.v_head_dim), roles.OUTPUT),
            "indexer.wq_b.weight": ((self.index_n_heads * di, q), roles.MATRIX),
            "indexer.wk.weight": ((di, h), roles.MATRIX),
            "indexer.k_norm.weight": ((di,), roles.QK_NORM),
            "indexer.k_norm.bias": ((di,), roles.BIAS),
            "indexer.weights_proj.weight": ((self.index_n_heads, h), roles.COMPRESSOR),
        }

    def _moe_tensors(self) -> Tensors:
        h, experts, width = self.hidden_size, self.num_experts, self.moe_intermediate_size
        return {
            "gate.weight": ((experts, h), roles.ROUTER),
            "gate.e_score_correction_bias": ((experts,), roles.CORRECTION),
            "experts.gate_up_proj": ((experts, 2 * width, h), roles.EXPERTS),
            "experts.down_proj": ((experts, h, width), roles.EXPERTS),
            **self._mlp_tensors("shared_experts.", width),
        }

    def _mlp_tensors(self, prefix: str, width: int) -> Tensors:
        shapes = {"gate_proj": (width, self.hidden_size), "up_proj": (width, self.hidden_size)}
        shapes["down_proj"] = (self.hidden_size, width)
        return {f"{prefix}{name}.weight": (shape, roles.PROJECTIONS[name]) for name, shape in shapes.items()}

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> DeepseekV32Config:
        """Parse a released config.json. Raises CheckpointError naming the key for missing or unsupported values."""
        fields = Fields(raw)
        fields.ignore(*WITHOUT_EFFECT)
        for key, only in {"n_shared_experts": 1, "attention_bias": False, "tie_word_embeddings": False}.items():
            fields.choice(key, (only,), only)
        count = fields.integer("num_hidden_layers", 61, maximum=LARGEST_COUNT)
        dense = fields.integer("first_k_dense_replace", 3, minimum=0)
        experts = fields.integer("n_routed_experts", 256, maximum=LARGEST_COUNT)
        k = fields.integer("num_experts_per_tok", 8)
        if k > experts:
            raise fields.error(f"num_experts_per_tok is {k}, there are only {experts} experts (n_routed_experts)")
        max_positions, turning = (
            fields.integer("max_position_embeddings", 163840),
            fields.integer("qk_rope_head_dim", 64),
        )
        theta = fields.number("rope_theta", 10000.0, above=0.0)
        scaling = Fields(fields.get("rope_scaling", None) or {}, f"{fields.file}: rope_scaling")
        said = fields.raw.get("quantization_config")
        return cls(
            hidden_size=fields.integer("hidden_size", 7168),
            vocab_size=fields.integer("vocab_size", 129280),
            mlps=tuple("dense" if i < dense else "sparse" for i in range(count)),
            num_attention_heads=fields.integer("num_attention_heads", 128),
            q_lora_rank=fields.integer("q_lora_rank", 1536),
            kv_lora_rank=fields.integer("kv_lora_rank", 512),
            qk_nope_head_dim=fields.integer("qk_nope_head_dim", 128),
            qk_rope_head_dim=turning,
            v_head_dim=fields.integer("v_head_dim", 128),
            index_n_heads=fields.integer("index_n_heads", 64),
            index_head_dim=fields.integer("index_head_dim", 128),
            index_topk=fields.integer("index_topk", 2048),
            intermediate_size=fields.integer("intermediate_size", 18432),
            num_experts=experts,
            top_k_experts=k,
            moe_intermediate_size=fields.integer("moe_intermediate_size", 2048),
            rope=RopeParameters.parse(scaling, theta=theta, max_positions=max_positions, head_dim=turning),
            max_position_embeddings=max_positions,
            bos_token_id=fields.token_id("bos_token_id", 0),
            eos_token_ids=fields.token_ids("eos_token_id", 1),
            pad_token_id=fields.token_id("pad_token_id"),
            is_fp8=isinstance(said, Mapping) and said.get("quant_method") == "fp8",
            stored_dtype=fields.stored_dtype(),
            unknown=fields.harmless("deepseek_v32"),
        )
