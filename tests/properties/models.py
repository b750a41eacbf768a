"""Tiny random models of every kind of memory, without files."""

import copy
from functools import cache
from typing import Any

import torch
from torch import Tensor

from sparing.config import parse_config
from sparing.memory.sequence import Memory
from sparing.models.loading import build
from tests.conformance.reference import FULL, SLIDING, autoregressive_scale, hybrid_scale, randomise

s, f = SLIDING, FULL
VOCAB, WINDOW = 61, 5
GEMMA = {
    "model_type": "gemma4_text",
    "dtype": "float32",
    "vocab_size": VOCAB,
    "vocab_size_per_layer_input": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "global_head_dim": 12,
    "sliding_window": WINDOW,
    "final_logit_softcapping": 30.0,
    "max_position_embeddings": 4096,
    "hidden_size_per_layer_input": 0,
}
LLAMA = {
    "model_type": "llama",
    "dtype": "float32",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}
HYBRID = {
    "model_type": "nemotron_h",
    "dtype": "float32",
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
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
    "max_position_embeddings": 4096,
}
MOE = {"num_experts": 5, "top_k_experts": 2, "moe_intermediate_size": 10}
CONFIGS: dict[str, dict[str, Any]] = {
    "dense": LLAMA,
    "sliding": LLAMA | {"model_type": "mistral", "sliding_window": WINDOW},
    "value-only": GEMMA
    | {
        "num_hidden_layers": 4,
        "layer_types": [s, f, s, f],
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "shared": GEMMA
    | {
        "num_hidden_layers": 6,
        "layer_types": [s, f, s, f, s, f],
        "num_kv_shared_layers": 3,
        "hidden_size_per_layer_input": 6,
    },
    "shared value-only mixture": GEMMA
    | MOE
    | {
        "num_hidden_layers": 5,
        "layer_types": [f, s, f, s, f],
        "num_kv_shared_layers": 2,
        "attention_k_eq_v": True,
        "enable_moe_block": True,
    },
    "hybrid": HYBRID | {"hybrid_override_pattern": "ME*-EM"},
    "hybrid, attention last": HYBRID | {"hybrid_override_pattern": "*MM*E", "moe_latent_size": None, "n_groups": 1},
    "recurrent": HYBRID | {"hybrid_override_pattern": "M-M", "conv_kernel": 2, "n_groups": 6},
    "denoiser": {
        "model_type": "diffusion_gemma",
        "dtype": "float32",
        "canvas_length": 8,
        "text_config": GEMMA
        | MOE
        | {
            "model_type": "diffusion_gemma_text",
            "num_hidden_layers": 2,
            "layer_types": [s, f],
            "num_global_key_value_heads": 1,
        },
    },
}


@cache
def model(name: str) -> Any:
    built = build(parse_config(CONFIGS[name])).to_empty(device="cpu").eval().requires_grad_(False)
    scale = hybrid_scale if built.config.model_type == "nemotron_h" else autoregressive_scale
    randomise(built, seed=0, scale=scale)
    return built


@cache
def near(name: str) -> Any:
    """A copy of a model with slightly other weights: a drafter that is often right and often wrong."""
    drafter = copy.deepcopy(model(name))
    generator = torch.Generator().manual_seed(5)
    for parameter in drafter.parameters():
        if parameter.ndim > 1:
            parameter.mul_(1 + 0.08 * torch.randn(parameter.shape, generator=generator))
    return drafter


def tokens(length: int, seed: int = 0) -> Tensor:
    return torch.randint(0, VOCAB, (length,), generator=torch.Generator().manual_seed(seed))


# Policy and options, of memories that must keep the promises of the dense one.
STORED: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {}),
    "codes": ("turboquant:4", {"block": 1, "scale_dtype": "float32"}),
}


def filled(name: str, length: int, seed: int = 0, kv: str = "dense", **options: Any) -> Memory:
    """A memory that holds `length` random tokens."""
    memory = model(name).memory(kv, **options)
    if length:
        model(name).logits(tokens(length, seed), memory)
    return memory


def snapshot(memory: Memory) -> list[Any]:
    """All that a memory holds, copied: to be compared with `same`."""
    return [
        (layer.length, getattr(layer, "held", None), layer.staged, {k: v.clone() for k, v in layer.state().items()})
        for layer in memory.own
    ]


def same(left: list[Any], right: list[Any], tolerance: float = 0.0) -> bool:
    return len(left) == len(right) and all(
        a[:3] == b[:3]
        and a[3].keys() == b[3].keys()
        and all(
            a[3][k].shape == b[3][k].shape and torch.allclose(a[3][k], b[3][k], rtol=0, atol=tolerance) for k in a[3]
        )
        for a, b in zip(left, right, strict=True)
    )
