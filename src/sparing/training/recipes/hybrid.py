"""A small Nemotron 3 that tells fairy tales and drafts its own next tokens: `sparing train recipes/hybrid --out DIR`.

Mamba-2, attention and mixtures of experts in a latent space, and the drafting head with its own attention and mixture,
trained with the model. Matrices multiply in bfloat16, or with `--set products=nvfp4` as Nemotron 3 Super was trained:
in NVFP4, except latent, attention and Mamba output projections, the last layer and the drafting head.
The data and its order are those of the seed alone, so the two arithmetics can be compared step by step.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparing.config.roles import KEY, LATENT_IN, LATENT_OUT, OUTPUT, QUERY, VALUE, Role
from sparing.models.base import LanguageModel
from sparing.models.nemotron3 import Nemotron3
from sparing.models.nemotron3_mtp import MTPHead
from sparing.training.balance import watch_experts
from sparing.training.block_diffusion import Examples
from sparing.training.data import TextData
from sparing.training.initialise import initialise
from sparing.training.masters import use_bfloat16
from sparing.training.next_token import NextTokenLosses, next_token_loss
from sparing.training.nvfp4 import draw_from, use_nvfp4
from sparing.training.recipe import Recipe

VOCABULARY = 1024
PRODUCTS = ("bfloat16", "nvfp4", "float32")
DENSE = {QUERY, KEY, VALUE, OUTPUT, LATENT_IN, LATENT_OUT}


def data(recipe: Recipe, seed: int) -> TextData:
    """Sequences of `length` tokens, the first of them <bos>."""
    options = recipe.options
    blocks = options["length"] - 1
    return TextData(options["corpus"], recipe.config["vocab_size"], 1, recipe.batch_size, (1, 1), blocks, seed)


def is_dense(name: str, role: Role) -> bool:
    """What Nemotron 3 Super keeps out of NVFP4. Its Mamba output projections are MXFP8, here bfloat16."""
    return name.startswith("mtp.") or role in DENSE


def prepare(model: LanguageModel, options: Mapping[str, Any], generator: torch.Generator) -> None:
    """Add the drafting head, let deep residuals start small, and choose the arithmetic of the products."""
    assert isinstance(model, Nemotron3)
    products = options["products"]
    if products not in PRODUCTS:
        raise ValueError(f"products is {products!r}, use {', '.join(PRODUCTS)}")
    head = MTPHead(model)
    initialise(head, generator)
    model.add_module("mtp", head)
    layers = model.config.num_hidden_layers
    with torch.no_grad():
        for _, role, _, tensor in model.parts():
            if role is not None and role.is_residual:
                tensor.mul_(layers**-0.5)
    watch_experts(model)
    if products == "nvfp4":
        use_nvfp4(model, dense=is_dense, dtype=torch.bfloat16)
    if products != "float32":
        use_bfloat16(model)


def loss(recipe: Recipe, model: LanguageModel, examples: Examples, generator: torch.Generator) -> NextTokenLosses:
    draw_from(model, generator)
    head = model.get_submodule("mtp")
    assert isinstance(model, Nemotron3) and isinstance(head, MTPHead)
    return next_token_loss(model, head, examples, recipe.options["mtp_depth"], recipe.options["mtp_scale"])


RECIPE = Recipe(
    name="recipes/hybrid",
    config={
        "architectures": ["NemotronHForCausalLM"],
        "model_type": "nemotron_h",
        "vocab_size": VOCABULARY,
        "hidden_size": 128,
        "hybrid_override_pattern": "MEM*EME",
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "mamba_num_heads": 16,
        "mamba_head_dim": 16,
        "n_groups": 2,
        "ssm_state_size": 32,
        "conv_kernel": 4,
        "use_conv_bias": True,
        "time_step_limit": [0.0, {"__float__": "Infinity"}],
        "n_routed_experts": 16,
        "num_experts_per_tok": 4,
        "moe_latent_size": 64,
        "moe_intermediate_size": 64,
        "moe_shared_expert_intermediate_size": 128,
        "routed_scaling_factor": 2.5,
        "mlp_hidden_act": "relu2",
        "layer_norm_epsilon": 1e-5,
        "num_nextn_predict_layers": 1,
        "mtp_hybrid_override_pattern": "*E",
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "bos_token_id": 2,
    },
    generation_config={
        "do_sample": True,
        "temperature": 0.8,
        "max_new_tokens": 256,
        "pad_token_id": 0,
        "eos_token_id": [1],
    },
    data=data,
    options={
        "corpus": "fairy_tales.txt",
        "length": 256,
        "products": "bfloat16",
        "mtp_depth": 2,
        "mtp_scale": 0.3,
    },
    prepare=prepare,
    loss=loss,
    steps=1000,
    batch_size=8,
    learning_rate=4e-3,
    warmup=50,
    decay=0.3,
    beta2=0.95,
    weight_decay=0.1,
    average=0.99,
    validate_every=100,
)
