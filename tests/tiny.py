"""Small random models of every family and kind of memory, without files: the one home of their configs."""

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparing.checkpoint import save_weights, write_json
from sparing.config import parse_config
from sparing.config.memory import AttentionSpec
from sparing.memory.sequence import Memory
from sparing.models.loading import build

# Configs. A test states what it adds to one of these: `LLAMA | {"head_dim": 12}`.

SLIDING, FULL = s, f = "sliding_attention", "full_attention"
VOCAB, WINDOW = 61, 5
Config = dict[str, Any]
# What a config of any family has, ours and transformers' alike.
SIZES: Config = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
ENDLESS: Config = {"bos_token_id": None, "eos_token_id": None}  # no token ends a text
LLAMA: Config = SIZES | {"model_type": "llama", "dtype": "float32", "num_hidden_layers": 2}
GEMMA: Config = SIZES | {
    "model_type": "gemma4_text",
    "dtype": "float32",
    "vocab_size_per_layer_input": VOCAB,
    "head_dim": 8,
    "global_head_dim": 12,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 30.0,
    "hidden_size_per_layer_input": 0,
}
GEMMA3: Config = SIZES | {
    "model_type": "gemma3_text",
    "dtype": "float32",
    "head_dim": 12,
    "sliding_window": WINDOW,
    "query_pre_attn_scalar": 9,
    "final_logit_softcapping": 30.0,
}
# Of the tower beside a Gemma whose files we read.
VISION: Config = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "patch_size": 4,
    "position_embedding_size": 16,
    "pooling_kernel_size": 1,
}
KEYS_ARE_VALUES: Config = {"attention_k_eq_v": True, "num_global_key_value_heads": 1}
EXPERTS: Config = {"num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 10}
HYBRID: Config = SIZES | {
    "model_type": "nemotron_h",
    "dtype": "float32",
    "head_dim": 8,
    "mamba_num_heads": 6,
    "mamba_head_dim": 5,
    "n_groups": 3,
    "ssm_state_size": 7,
    "conv_kernel": 4,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 10,
    "moe_shared_expert_intermediate_size": 12,
    "moe_latent_size": 9,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 2.5,
}
# Compressed attention of every kind: HCA windows of 8 tokens, overlapping CSA windows of 4 with an indexer.
HCA, CSA = "heavily_compressed_attention", "compressed_sparse_attention"
COMPRESSED: Config = {
    "model_type": "deepseek_v4",
    "dtype": "float32",
    "vocab_size": VOCAB,
    "hidden_size": 48,
    "num_hidden_layers": 5,
    "layer_types": [s, HCA, CSA, HCA, CSA],
    "mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 3,
    "compress_rates": {CSA: 4, HCA: 8},
    "num_attention_heads": 4,
    "head_dim": 32,
    "partial_rotary_factor": 0.25,
    "q_lora_rank": 20,
    "o_groups": 2,
    "o_lora_rank": 12,
    "sliding_window": WINDOW,
    "index_n_heads": 16,
    "index_head_dim": 32,
    "index_topk": 3,
    "n_routed_experts": 8,
    "num_experts_per_tok": 3,
    "moe_intermediate_size": 24,
    "swiglu_limit": 1.5,
    "hc_mult": 3,
    "num_nextn_predict_layers": 1,
    "rope_theta": 10000.0,
    "compress_rope_theta": 160000.0,
    "rope_parameters": {
        "rope_type": "yarn",
        "factor": 16.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
    },
    "max_position_embeddings": 4096,
}
# One config for every kind of memory.
CONFIGS: dict[str, Config] = {
    "dense": LLAMA,
    "sliding": LLAMA | {"model_type": "mistral", "sliding_window": WINDOW},
    "value-only": GEMMA | KEYS_ARE_VALUES | {"num_hidden_layers": 4, "layer_types": [s, f, s, f]},
    "shared": GEMMA
    | {
        "num_hidden_layers": 6,
        "layer_types": [s, f, s, f, s, f],
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 6,
    },
    "shared value-only mixture": GEMMA
    | EXPERTS
    | {
        "num_hidden_layers": 5,
        "layer_types": [f, s, f, s, f],
        "num_kv_shared_layers": 2,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
    },
    "gemma3": GEMMA3 | {"num_hidden_layers": 3, "layer_types": [s, s, f]},
    "hybrid": HYBRID | {"hybrid_override_pattern": "ME*-EM"},
    "hybrid, attention last": HYBRID | {"hybrid_override_pattern": "*MM*E", "moe_latent_size": None, "n_groups": 1},
    "recurrent": HYBRID | {"hybrid_override_pattern": "M-M", "conv_kernel": 2, "n_groups": 6},
    "compressed": COMPRESSED,
    "denoiser": {
        "model_type": "diffusion_gemma",
        "dtype": "float32",
        "canvas_length": 8,
        "text_config": GEMMA
        | EXPERTS
        | {
            "model_type": "diffusion_gemma_text",
            "num_hidden_layers": 2,
            "layer_types": [s, f],
            "num_global_key_value_heads": 1,
        },
    },
}
# Of a drafter that reads the entries of "shared" and looks nothing up.
DRAFTER: Config = {
    "model_type": "gemma4_assistant",
    "text_config": {key: value for key, value in CONFIGS["shared"].items() if "per_layer" not in key}
    | {"num_kv_shared_layers": 6},
}
# Settings of a training run of recipes/sudoku that takes a second.
SUDOKU_RUN: Config = {
    "size": 4,
    "canvas_length": 20,
    "vocab_size": 89,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "global_head_dim": 8,
    "moe_intermediate_size": 8,
    "givens_min": 5,
    "givens_max": 9,
    "batch_size": 2,
    "warmup": 2,
    "validate_every": 2,
}
# Rows of whole blocks in every format that weights are packed in, and one with rows that are not ("odd").
_WIDE = {"hidden_size": 64, "intermediate_size": 96, "head_dim": 16}
PACKABLE: dict[str, Config] = {
    "llama": LLAMA | _WIDE | {"tie_word_embeddings": False},
    "gemma": CONFIGS["shared value-only mixture"]
    | _WIDE
    | {"moe_intermediate_size": 32, "hidden_size_per_layer_input": 32},
    "gemma3": GEMMA3 | _WIDE | {"num_hidden_layers": 2, "layer_types": [s, f]},
    "hybrid": HYBRID
    | _WIDE
    | {
        "hybrid_override_pattern": "ME*",
        "dtype": "bfloat16",
        "ssm_state_size": 16,
        "mamba_num_heads": 4,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
        "moe_shared_expert_intermediate_size": 64,
        "moe_latent_size": 32,
        "n_group": 1,
        "topk_group": 1,
        "routed_scaling_factor": 1.0,
    },
    "odd": LLAMA | {"hidden_size": 48, "intermediate_size": 40, "head_dim": 12},
}


# Weights.


def autoregressive_scale(name: str, tensor: Tensor, noise: Tensor) -> Tensor:
    """Weights that let every term of a layer matter: logits have a size of about 7.

    Large gates on tiny inner sizes put GELU into its cancelling tail, which amplifies rounding.
    """
    if name.endswith("bias"):
        return 0.3 * noise
    if tensor.ndim == 1:  # norms, layer scalars, router scales start at exactly 1, which hides a missing product
        return 0.9 + 0.3 * noise
    if "embed" in name:
        return 0.3 * noise
    return (0.4 if "gate" in name else 1.5) * noise / tensor.shape[-1] ** 0.5


def denoiser_scale(name: str, tensor: Tensor, noise: Tensor) -> Tensor:
    """Weights under which rounding does not flip samples for the length of a denoising run."""
    if tensor.ndim == 1:
        return 1 + 0.3 * noise
    return (0.35 if "embed_tokens" in name else 0.1) * noise


def hybrid_scale(name: str, tensor: Tensor, noise: Tensor) -> Tensor:
    """Weights of Nemotron 3 under which states live for several tokens and every term matters: logits of about 5."""
    if name.endswith("A_log") or "conv1d" in name or "embeddings" in name:
        return 0.5 * noise
    if name.endswith("dt_bias"):
        return -2 + 1.5 * noise
    if name.endswith(".D"):
        return 1 + 0.5 * noise
    if tensor.ndim > 1:
        return 1.3 * noise / tensor.shape[-1] ** 0.5
    return 0.3 * noise if name.endswith("bias") else 0.9 + 0.3 * noise


def compressed_scale(name: str, tensor: Tensor, noise: Tensor) -> Tensor:
    """Weights of DeepSeek-V4 under which no mapping, gate, bias or sink is what it starts as: logits of about 4."""
    if name.endswith(("base", "position_bias", "correction_bias", "sinks", "embed_tokens.weight")):
        return 0.5 * noise
    if tensor.ndim == 1:
        return 0.9 + 0.3 * noise
    return 1.3 * noise / tensor.shape[-1] ** 0.5


def zero_centred_scale(name: str, tensor: Tensor, noise: Tensor) -> Tensor:
    """As `autoregressive_scale`, of models whose norms add 1 to their weights."""
    return 0.3 * noise - 0.1 if name.endswith("norm.weight") else autoregressive_scale(name, tensor, noise)


SCALES = {
    "gemma3": zero_centred_scale,
    "nemotron_h": hybrid_scale,
    "deepseek_v4": compressed_scale,
}  # of model types that need their own
CONSTANTS = ("inv_freq", "embed_scale")  # tensors that are computed from the config, not weights


def randomise(model: Any, seed: int, scale: Callable[[str, Tensor, Tensor], Tensor] = autoregressive_scale) -> None:
    """Give every parameter and buffer of a module new random values; each row of a table of experts names several."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if name.endswith("tid2eid"):
                experts = model.get_parameter(name.removesuffix("tid2eid") + "weight").shape[0]
                tensor.copy_(torch.rand(len(tensor), experts, generator=generator).argsort(-1)[:, : tensor.shape[1]])
            if tensor.is_floating_point() and not any(constant in name for constant in CONSTANTS):
                noise = torch.randn(tensor.shape, generator=generator)
                tensor.copy_(scale(name, tensor, noise))


# Models and what they remember.


def built(config: Config, seed: int = 0) -> Any:
    """A random model of a config, ready for inference."""
    model = build(parse_config(config)).to_empty(device="cpu").eval().requires_grad_(False)
    randomise(model, seed, SCALES.get(model.config.model_type, autoregressive_scale))
    return model


def saved(config: Config, folder: Path, seed: int = 0) -> Path:
    """The folder of a checkpoint with random weights, in the type that the config names."""
    dtype = getattr(torch, config["dtype"])
    save_weights(folder, {name: tensor.to(dtype) for name, tensor in built(config, seed).state_dict().items()})
    write_json(folder / "config.json", config)
    return folder


@cache
def model(name: str) -> Any:
    """The random model of one of CONFIGS."""
    return built(CONFIGS[name])


@cache
def near(name: str) -> Any:
    """A copy of a model with slightly other weights: a drafter that is often right and often wrong."""
    drafter = copy.deepcopy(model(name))
    generator = torch.Generator().manual_seed(5)
    for parameter in drafter.parameters():
        if parameter.ndim > 1:
            parameter.mul_(1 + 0.08 * torch.randn(parameter.shape, generator=generator))
    return drafter


def random_ids(length: int, seed: int = 0, vocab_size: int = VOCAB) -> Tensor:
    """Random ids of tokens [length]."""
    return torch.randint(0, vocab_size, (length,), generator=torch.Generator().manual_seed(seed))


# Policy and options, of memories that must keep the promises of the dense one.
STORED: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "codes": ("turboquant:4", {"block": 1, "scale_dtype": "float32"}),
}


def takes(name: str, kv: str) -> bool:
    """Whether a policy is defined for one of CONFIGS: those of single tokens are not for entries of several."""
    return name != "compressed" or kv in ("dense", "released")


# (name, policy, options): every model with each of these that it takes, and what names the case.
STORED_CASES = [(name, *stored) for name in CONFIGS for stored in STORED.values() if takes(name, stored[0])]
STORED_CASES.append(("compressed", "released", {}))
STORED_IDS = [f"{name}-{kv}" for name, kv, _ in STORED_CASES]


def filled(name: str, length: int, seed: int = 0, kv: str = "dense", **options: Any) -> Memory:
    """A memory that holds `length` random tokens."""
    memory = model(name).memory(kv, **options)
    if length:
        model(name).logits(random_ids(length, seed), memory)
    return memory


def snapshot(memory: Memory) -> list[Any]:
    """All that a memory holds, copied: to be compared with `same`."""
    return [
        (
            layer.length,
            layer.held if isinstance(layer.spec, AttentionSpec) else None,
            layer.staged,
            {k: v.clone() for k, v in layer.state().items()},
        )
        for layer in memory.own
    ]


def same(left: list[Any], right: list[Any], tolerance: float = 0.0) -> bool:
    """Whether two snapshots hold the same, to the bit or within a tolerance."""
    return len(left) == len(right) and all(
        a[:3] == b[:3]
        and a[3].keys() == b[3].keys()
        and all(
            a[3][k].shape == b[3][k].shape and torch.allclose(a[3][k], b[3][k], rtol=0, atol=tolerance) for k in a[3]
        )
        for a, b in zip(left, right, strict=True)
    )
