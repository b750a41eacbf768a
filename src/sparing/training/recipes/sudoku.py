"""Sudoku, solved everywhere at once: `sparing train sudoku --out DIR`.

Puzzles never run out, so nothing is seen twice and nothing regularises. The grid is 9x9; `--set size=4` or 6, with
`canvas_length`, `vocab_size`, `givens_min` and `givens_max` to suit, trains the smaller ones in minutes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from sparing.models.diffusion_gemma import DiffusionGemma
from sparing.training.recipe import Recipe
from sparing.training.sudoku import BOXES, DIGIT, SudokuData, cell_id

SIZE = 9


def data(recipe: Recipe, seed: int) -> SudokuData:
    options, size = recipe.options, recipe.options["size"]
    found = {"canvas_length": recipe.config["canvas_length"], "vocab_size": recipe.config["text_config"]["vocab_size"]}
    needed = {"canvas_length": size * (size + 1), "vocab_size": DIGIT + size + size**2 * (size + 1)}
    for name, value in needed.items():
        if found[name] != value:
            raise ValueError(f"{name} is {found[name]}, a grid of size {size} needs {value}: --set {name}={value}")
    return SudokuData(size, recipe.batch_size, (options["givens_min"], options["givens_max"]), seed)


@torch.no_grad()
def share_embeddings(model: DiffusionGemma, options: Mapping[str, Any], generator: torch.Generator) -> None:
    """Start the embedding of a cell as the sum of its row, column, box and content, which 810 cells then share."""
    size, table = options["size"], model.output_table()
    height, width = BOXES[size]
    rows, columns, boxes, contents = (
        torch.randn(4, size + 1, table.shape[1], generator=generator) * table.shape[1] ** -0.5
    )
    for row in range(size):
        for column in range(size):
            box = row // height * (size // width) + column // width
            place = rows[row] + columns[column] + boxes[box]
            first = cell_id(size, row, column, 0)
            cells = table[first : first + size + 1]
            cells.mul_(0.1).add_((place + contents) / 2)
    table[DIGIT : DIGIT + size] = contents[1:]


RECIPE = Recipe(
    name="sudoku",
    config={
        "architectures": ["DiffusionGemmaForBlockDiffusion"],
        "model_type": "diffusion_gemma",
        "canvas_length": SIZE * (SIZE + 1),
        "tie_word_embeddings": True,
        "eos_token_id": [1],
        "text_config": {
            "model_type": "diffusion_gemma_text",
            "vocab_size": DIGIT + SIZE + SIZE * SIZE * (SIZE + 1),
            "hidden_size": 96,
            "intermediate_size": 192,
            "num_hidden_layers": 4,
            "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": 24,
            "global_head_dim": 32,
            "num_global_key_value_heads": 1,
            "num_experts": 4,
            "top_k_experts": 2,
            "moe_intermediate_size": 32,
            "sliding_window": 256,
            "max_position_embeddings": 512,
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
        "max_new_tokens": SIZE * (SIZE + 1),
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
    options={"size": SIZE, "givens_min": 32, "givens_max": 72},
    prepare=share_embeddings,
    steps=5600,
    batch_size=16,
    draws=2,
    learning_rate=3e-3,
    warmup=100,
)
