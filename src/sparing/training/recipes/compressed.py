"""A small DeepSeek-V4 that tells tales and drafts its own next tokens: `sparing train recipes/compressed --out DIR`.

Four streams, a window of 32 tokens, entries of 4 tokens that an indexer chooses and entries of 16, experts by id in the
first two layers and by score after them, and the drafting head, trained with the model by Muon.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from sparing.models.base import LanguageModel
from sparing.models.deepseek_v4 import DeepseekV4, Experts, HyperConnection, StreamHead
from sparing.models.deepseek_v4_mtp import DeepseekV4MTP
from sparing.training.balance import watch_experts
from sparing.training.block_diffusion import Examples
from sparing.training.initialise import initialise
from sparing.training.masters import use_bfloat16
from sparing.training.next_token import NextTokenLosses, next_token_loss
from sparing.training.recipe import Recipe
from sparing.training.recipes.hybrid import data

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
PRODUCTS = ("bfloat16", "float32")
GATING = 0.01  # what the mappings depend on the streams at first: they start as nearly constant
READ, UNREAD, KEPT = 2.0, -3.0, 4.0  # logits: of the stream that a layer reads, of the others, of a stream to itself


def prepare(model: LanguageModel, options: Mapping[str, Any], generator: torch.Generator) -> None:
    """Add the drafting head, draw the experts of each id, and let streams start as nearly plain residuals."""
    assert isinstance(model, DeepseekV4)
    if options["products"] not in PRODUCTS:
        raise ValueError(f"products is {options['products']!r}, use {', '.join(PRODUCTS)}")
    head = DeepseekV4MTP(model)
    initialise(head, generator)
    model.add_module("mtp", head)
    start_as_residuals(model)
    for part in model.modules():
        if isinstance(part, Experts) and hasattr(part.gate, "tid2eid"):
            table = part.gate.get_buffer("tid2eid")
            order = torch.rand(len(table), len(part.gate.get_parameter("weight")), generator=generator).argsort(-1)
            table.copy_(order[:, : table.shape[1]])
    watch_experts(model)
    if options["products"] == "bfloat16":
        use_bfloat16(model)


@torch.no_grad()
def start_as_residuals(model: torch.nn.Module) -> None:
    """Mappings under which every stream stays what it is, gets what a layer adds, and is read by another layer in turn.

    Source: hyper-connections (arXiv 2409.19606) for who reads which stream, mHC (arXiv 2512.24880) for small gates.
    """
    connections = [part for part in model.modules() if isinstance(part, HyperConnection)]
    for i, part in enumerate(connections):
        n = math.isqrt(len(part.base) + 1) - 1  # (2 + n) n mappings
        part.scale.fill_(GATING)
        part.base.zero_()
        part.base[:n] = UNREAD
        part.base[i % n] = READ
        part.base[2 * n :] = KEPT * torch.eye(n).flatten()
    for part in model.modules():
        if isinstance(part, StreamHead):
            part.hc_scale.fill_(GATING)
            part.hc_base.zero_()


def loss(recipe: Recipe, model: LanguageModel, examples: Examples, generator: torch.Generator) -> NextTokenLosses:
    head = model.get_submodule("mtp")
    assert isinstance(head, DeepseekV4MTP)
    options = recipe.options
    return next_token_loss(
        model, head, examples, options["mtp_depth"], options["mtp_scale"], options["sequence_balance"]
    )


RECIPE = Recipe(
    name="recipes/compressed",
    config={
        "architectures": ["DeepseekV4ForCausalLM"],
        "model_type": "deepseek_v4",
        "vocab_size": 1024,
        "hidden_size": 128,
        "num_hidden_layers": 6,
        "layer_types": [SLIDING, CSA, HCA, CSA, HCA, CSA],
        "mlp_layer_types": ["hash_moe"] * 2 + ["moe"] * 4,
        "compress_rates": {CSA: 4, HCA: 16},
        "num_attention_heads": 4,
        "head_dim": 64,
        "qk_rope_head_dim": 32,
        "q_lora_rank": 96,
        "o_groups": 2,
        "o_lora_rank": 64,
        "sliding_window": 32,
        "index_n_heads": 16,
        "index_head_dim": 32,
        "index_topk": 16,
        "n_routed_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "routed_scaling_factor": 1.0,
        "swiglu_limit": 10.0,
        "hc_mult": 4,
        "num_nextn_predict_layers": 1,
        "rope_theta": 10000.0,
        "compress_rope_theta": 160000.0,
        "max_position_embeddings": 4096,
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
        "products": "float32",
        "mtp_depth": 1,
        "mtp_scale": 0.3,
        "sequence_balance": 1e-4,
    },
    prepare=prepare,
    loss=loss,
    steps=1000,
    batch_size=8,
    optimizer="muon",
    learning_rate=4e-3,
    warmup=50,
    decay=0.3,
    beta2=0.95,
    weight_decay=0.1,
    average=0.99,
    validate_every=100,
)
