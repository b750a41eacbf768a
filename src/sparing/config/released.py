"""Configurations of released models, so that they can be planned for before anything is downloaded.

Raw config.json contents in the released spelling, without the keys that have no effect on text. Gemma 4: transformers
`convert_gemma4_weights.py` and google-deepmind/gemma; of the 12B, `intermediate_size` and `num_attention_heads` are
what its parameter count implies. Nemotron 3: the published config.json files; of Ultra, `mamba_num_heads` is what its
parameter count implies. Gemma 3, DeepSeek, Llama 3.1, Qwen3 and Mistral-7B-v0.1: the published config.json files.
"""

from __future__ import annotations

from typing import Any

__all__ = ["RELEASED"]


def _gemma4(sliding_per_full: int, **values: Any) -> dict[str, Any]:
    """One member of the family: `sliding_per_full` sliding layers before each full one."""
    period = ["sliding_attention"] * sliding_per_full + ["full_attention"]
    return {
        "model_type": "gemma4_text",
        "layer_types": period * (values["num_hidden_layers"] // len(period)),
        "head_dim": 256,
        "global_head_dim": 512,
        "vocab_size": 262144,
        "vocab_size_per_layer_input": 262144,
        "hidden_size_per_layer_input": 0,
        "max_position_embeddings": 262144,
        "rms_norm_eps": 1e-6,
        "hidden_activation": "gelu_pytorch_tanh",
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
        "pad_token_id": 0,
        "eos_token_id": [1, 106],
        "bos_token_id": 2,
        "dtype": "bfloat16",
        "rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.25, "rope_theta": 1000000.0},
        },
        **values,
    }


def _gemma3(size: int, width: int, layers: int, heads: tuple[int, int], **values: Any) -> dict[str, Any]:
    """A size of the family; heads: of queries, of keys. The two smallest read texts alone, and shorter ones."""
    is_small = layers < 30
    short = {"vocab_size": 262144, "max_position_embeddings": 32768, "sliding_window": 512}
    long = {"rope_scaling": {"rope_type": "linear", "factor": 8.0}, "sliding_window": 1024}
    text = {
        "model_type": "gemma3_text",
        "dtype": "bfloat16",
        "hidden_size": size,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads[0],
        "num_key_value_heads": heads[1],
        **(short if is_small else long),
        **values,
    }
    return text if is_small else _composite(text, "gemma3")


def _nemotron3(pattern: str, **values: Any) -> dict[str, Any]:
    """One member of the family, with what all of them share."""
    return {
        "model_type": "nemotron_h",
        "hybrid_override_pattern": pattern,
        "num_hidden_layers": len(pattern),
        "num_attention_heads": 32,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "mamba_head_dim": 64,
        "n_groups": 8,
        "ssm_state_size": 128,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "mamba_ssm_cache_dtype": "float32",
        "n_group": 1,
        "topk_group": 1,
        "norm_topk_prob": True,
        "n_shared_experts": 1,
        "vocab_size": 131072,
        "max_position_embeddings": 262144,
        "layer_norm_epsilon": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": [2, 11],
        "pad_token_id": 0,
        "dtype": "bfloat16",
        **values,
    }


def _deepseek_v4(ratios: list[int], **values: Any) -> dict[str, Any]:
    """One member of the family: `compress_ratios` of its layers and of the one that drafts, with what both share."""
    return {
        "model_type": "deepseek_v4",
        "compress_ratios": [*ratios, 0],
        "num_hidden_layers": len(ratios),
        "num_nextn_predict_layers": 1,
        "num_hash_layers": 3,
        "num_key_value_heads": 1,
        "head_dim": 512,
        "qk_rope_head_dim": 64,
        "o_lora_rank": 1024,
        "sliding_window": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "n_shared_experts": 1,
        "num_experts_per_tok": 6,
        "scoring_func": "sqrtsoftplus",
        "norm_topk_prob": True,
        "topk_method": "noaux_tc",
        "swiglu_limit": 10.0,
        "hc_mult": 4,
        "hc_sinkhorn_iters": 20,
        "hc_eps": 1e-6,
        "vocab_size": 129280,
        "max_position_embeddings": 1048576,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 16,
            "beta_fast": 32,
            "beta_slow": 1,
            "original_max_position_embeddings": 65536,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
        "expert_dtype": "fp4",
        "quantization_config": {
            "quant_method": "fp8",
            "fmt": "e4m3",
            "scale_fmt": "ue8m0",
            "weight_block_size": [128, 128],
            "activation_scheme": "dynamic",
        },
        **values,
    }


def _composite(text: dict[str, Any], model_type: str) -> dict[str, Any]:
    """The multimodal release around a text model; its towers are not read."""
    return {"model_type": model_type, "dtype": "bfloat16", "tie_word_embeddings": True, "text_config": text}


# Gemma 4 26B-A4B and DiffusionGemma share this stack; a DiffusionGemma config implies K = V and experts.
MIXTURE_26B = _gemma4(
    5,
    hidden_size=2816,
    intermediate_size=2112,
    num_hidden_layers=30,
    num_attention_heads=16,
    num_key_value_heads=8,
    num_global_key_value_heads=2,
    sliding_window=1024,
    num_experts=128,
    top_k_experts=8,
    moe_intermediate_size=704,
    use_bidirectional_attention="vision",
)

RELEASED: dict[str, dict[str, Any]] = {
    "gemma-3-270m": _gemma3(640, 2048, 18, (4, 1)),
    "gemma-3-1b": _gemma3(1152, 6912, 26, (4, 1)),
    "gemma-3-4b": _gemma3(2560, 10240, 34, (8, 4)),
    "gemma-3-12b": _gemma3(3840, 15360, 48, (16, 8)),
    "gemma-3-27b": _gemma3(5376, 21504, 62, (32, 16), head_dim=128, query_pre_attn_scalar=168),
    "gemma-4-e2b": _composite(
        _gemma4(
            4,
            hidden_size=1536,
            intermediate_size=6144,
            num_hidden_layers=35,
            num_attention_heads=8,
            num_key_value_heads=1,
            sliding_window=512,
            num_kv_shared_layers=20,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=256,
            max_position_embeddings=131072,
        ),
        "gemma4",
    ),
    "gemma-4-e4b": _composite(
        _gemma4(
            5,
            hidden_size=2560,
            intermediate_size=10240,
            num_hidden_layers=42,
            num_attention_heads=8,
            num_key_value_heads=2,
            sliding_window=512,
            num_kv_shared_layers=18,
            hidden_size_per_layer_input=256,
            max_position_embeddings=131072,
        ),
        "gemma4",
    ),
    "gemma-4-12b": _composite(
        _gemma4(
            5,
            model_type="gemma4_unified_text",
            hidden_size=3840,
            intermediate_size=15360,
            num_hidden_layers=48,
            num_attention_heads=16,
            num_key_value_heads=8,
            num_global_key_value_heads=1,
            attention_k_eq_v=True,
            sliding_window=1024,
            use_bidirectional_attention="vision",
        ),
        "gemma4_unified",
    ),
    "gemma-4-26b-a4b": _composite({**MIXTURE_26B, "attention_k_eq_v": True, "enable_moe_block": True}, "gemma4"),
    "gemma-4-31b": _composite(
        _gemma4(
            5,
            hidden_size=5376,
            intermediate_size=21504,
            num_hidden_layers=60,
            num_attention_heads=32,
            num_key_value_heads=16,
            num_global_key_value_heads=4,
            attention_k_eq_v=True,
            sliding_window=1024,
            use_bidirectional_attention="vision",
        ),
        "gemma4",
    ),
    "diffusiongemma-26b-a4b": {
        **_composite({**MIXTURE_26B, "model_type": "diffusion_gemma_text"}, "diffusion_gemma"),
        "canvas_length": 256,
    },
    "nemotron-3-nano": _nemotron3(
        "MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        hidden_size=2688,
        mamba_num_heads=64,
        n_routed_experts=128,
        num_experts_per_tok=6,
        moe_intermediate_size=1856,
        moe_shared_expert_intermediate_size=3712,
        routed_scaling_factor=2.5,
    ),
    "nemotron-3-super": _nemotron3(
        "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME",
        hidden_size=4096,
        mamba_num_heads=128,
        n_routed_experts=512,
        num_experts_per_tok=22,
        moe_intermediate_size=2688,
        moe_shared_expert_intermediate_size=5376,
        moe_latent_size=1024,
        routed_scaling_factor=5.0,
        num_nextn_predict_layers=1,
        mtp_hybrid_override_pattern="*E",
    ),
    "nemotron-3-ultra": _nemotron3(
        "MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
        hidden_size=8192,
        num_attention_heads=64,
        mamba_num_heads=256,
        n_routed_experts=512,
        num_experts_per_tok=22,
        moe_intermediate_size=5120,
        moe_shared_expert_intermediate_size=10240,
        moe_latent_size=2048,
        routed_scaling_factor=5.0,
        num_nextn_predict_layers=1,
        mtp_hybrid_override_pattern="*E",
    ),
    "deepseek-v4-pro": _deepseek_v4(
        [128, 128] + [4, 128] * 29 + [4],
        hidden_size=7168,
        num_attention_heads=128,
        q_lora_rank=1536,
        o_groups=16,
        index_topk=1024,
        n_routed_experts=384,
        moe_intermediate_size=3072,
        routed_scaling_factor=2.5,
    ),
    "deepseek-v4-flash": _deepseek_v4(
        [0, 0] + [4, 128] * 20 + [4],
        hidden_size=4096,
        num_attention_heads=64,
        q_lora_rank=1024,
        o_groups=8,
        index_topk=512,
        n_routed_experts=256,
        moe_intermediate_size=2048,
        routed_scaling_factor=1.5,
    ),
    "deepseek-v3.2": {
        "model_type": "deepseek_v32",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "moe_intermediate_size": 2048,
        "num_hidden_layers": 61,
        "first_k_dense_replace": 3,
        "num_attention_heads": 128,
        "num_key_value_heads": 128,
        "q_lora_rank": 1536,
        "kv_lora_rank": 512,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "v_head_dim": 128,
        "index_n_heads": 64,
        "index_head_dim": 128,
        "index_topk": 2048,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "num_experts_per_tok": 8,
        "n_group": 8,
        "topk_group": 4,
        "vocab_size": 129280,
        "max_position_embeddings": 163840,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {
            "type": "yarn",
            "factor": 40,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 1.0,
            "mscale_all_dim": 1.0,
            "original_max_position_embeddings": 4096,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 0,
        "eos_token_id": 1,
        "dtype": "bfloat16",
        "quantization_config": {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [128, 128]},
    },
    "llama-3.1-8b": {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": {
            "rope_type": "llama3",
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
        "tie_word_embeddings": False,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "dtype": "bfloat16",
    },
    "qwen3-8b": {
        "model_type": "qwen3",
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 151643,
        "eos_token_id": 151645,
        "dtype": "bfloat16",
    },
    "mistral-7b": {
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "sliding_window": 4096,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "dtype": "bfloat16",
    },
}

# A row of TurboQuant's tables. No model of that name has been published: a Mistral of 7 B is the only one it can mean.
RELEASED["ministral-7b"] = RELEASED["mistral-7b"]
