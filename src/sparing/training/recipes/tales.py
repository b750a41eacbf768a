"""Fairy tales, told canvas by canvas or word by word: `sparing train recipes/tales --out DIR`.

Thirteen books of 5.9 MB; the end of each is held out.
"""

from __future__ import annotations

from sparing.training.data import TextData
from sparing.training.recipe import Recipe

VOCABULARY = 1024
CANVAS = 32


def data(recipe: Recipe, seed: int) -> TextData:
    options = recipe.options
    return TextData(
        options["corpus"],
        recipe.config["text_config"]["vocab_size"],
        recipe.config["canvas_length"],
        recipe.batch_size,
        (options["prefix_min"], options["prefix_max"]),
        options["blocks"],
        seed,
    )


RECIPE = Recipe(
    name="recipes/tales",
    config={
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": CANVAS,
        "tie_word_embeddings": True,
        "eos_token_id": [1],
        "text_config": {
            "model_type": "diffusion_gemma_text",
            "vocab_size": VOCABULARY,
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": 5,
            "layer_types": ["sliding_attention"] * 2 + ["full_attention"] + ["sliding_attention"] + ["full_attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 64,
            "global_head_dim": 64,
            "num_global_key_value_heads": 2,
            "num_experts": 8,
            "top_k_experts": 2,
            "moe_intermediate_size": 64,
            "sliding_window": 128,
            "max_position_embeddings": 1024,
            "rope_parameters": {
                "sliding_attention": {"rope_type": "default", "rope_theta": 1000.0},
                "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 10000.0},
            },
            "final_logit_softcapping": 30.0,
            "rms_norm_eps": 1e-6,
            "pad_token_id": 0,
            "eos_token_id": 1,
            "bos_token_id": 2,
        },
    },
    generation_config={
        "max_new_tokens": 256,
        "max_denoising_steps": 48,
        "sampler_config": {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1},
        "t_min": 0.4,
        "t_max": 0.8,
        "stability_threshold": 1,
        "confidence_threshold": 0.005,
        "pad_token_id": 0,
        "eos_token_id": [1],
    },
    data=data,
    options={"corpus": "fairy_tales.txt", "prefix_min": 2, "prefix_max": 64, "blocks": 8},
    steps=3200,
    batch_size=6,
    learning_rate=2e-3,
    warmup=100,
    weight_decay=0.05,
)
