"""Sudoku, solved everywhere at once: `sparing train recipes/sudoku --out DIR`.

Puzzles never run out, so nothing is seen twice and nothing regularises. The grid is 9x9; `--set size=4` or 6, with
`canvas_length`, `vocab_size`, `givens_min` and `givens_max` to suit, trains the smaller ones in minutes.
"""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

from sparing.models.base import LanguageModel
from sparing.sudoku.puzzle import BOXES, Grid, is_held_out, make_puzzle, symmetric_image
from sparing.sudoku.text import BOS, DIGIT, EOS, NEWLINE, cell_id, make_tokenizer
from sparing.training.block_diffusion import Examples
from sparing.training.recipe import Recipe

SIZE = 9
VALIDATION_PUZZLES = 64  # of the validation curve
VARIANTS = 8  # symmetric images taken of each puzzle that was searched for


class SudokuData:
    """Batches by number: puzzle i of a seed is the same in every run, and never has a held-out solution."""

    def __init__(self, size: int, batch_size: int, givens: tuple[int, int], seed: int):
        """givens: the smallest and largest number of given cells, drawn evenly.

        Raises ValueError for a size that is not 4, 6 or 9, or givens that leave no cell empty.
        """
        if size not in BOXES:
            raise ValueError(f"size is {size}: use {', '.join(map(str, BOXES))}")
        if not 0 <= givens[0] <= givens[1] < size**2:
            raise ValueError(
                f"givens_min {givens[0]} and givens_max {givens[1]} do not suit a {size}x{size} grid:"
                f" use 0 <= givens_min <= givens_max < {size**2}"
            )
        self.size, self.batch_size, self.givens, self.seed = size, batch_size, givens, seed
        self._searched: dict[tuple[int, bool], tuple[Grid, Grid]] = {}  # the last one searched for

    def batch(self, step: int) -> Examples:
        first = step * self.batch_size
        return self.examples([self.puzzle(first + i) for i in range(self.batch_size)])

    def puzzle(self, index: int, held_out: bool = False) -> tuple[Grid, Grid]:
        """(puzzle, solution) number `index` of the training puzzles or of those held out."""
        source = (index // VARIANTS, held_out)
        if source not in self._searched:
            rng = random.Random(f"{self.seed} {source}")
            self._searched = {source: make_puzzle(self.size, rng.randint(*self.givens), rng)}
        rng = np.random.default_rng((self.seed, index, held_out))
        while True:
            puzzle, solution = symmetric_image(*self._searched[source], rng)
            if is_held_out(solution) == held_out:
                return puzzle, solution

    def examples(self, puzzles: Sequence[tuple[Grid, Grid]]) -> Examples:
        """Token ids of puzzles and solutions; the last newline of an answer is the end id."""
        size, n = self.size, len(puzzles)
        puzzle, solution = (np.stack(grids) for grids in zip(*puzzles, strict=True))
        ids = np.full((n, 2, size, size + 1), NEWLINE)
        ids[:, 0, :, :size] = DIGIT + size + np.arange(size * size).reshape(size, size) * (size + 1) + puzzle
        ids[:, 1, :, :size] = DIGIT + solution - 1
        ids[:, 1, -1, -1] = EOS
        ids = np.concatenate([np.full((n, 1), BOS), ids.reshape(n, -1)], 1)
        return Examples(torch.from_numpy(ids), 1 + size * (size + 1), torch.ones(n, 1, dtype=torch.bool))

    def held_out(self, count: int) -> list[tuple[Grid, Grid]]:
        """The first held-out puzzles, no two alike, each searched for on its own: none is made as another's image."""
        distinct: dict[bytes, tuple[Grid, Grid]] = {}
        index = 0
        while len(distinct) < count:
            puzzle, solution = self.puzzle(index, held_out=True)
            distinct.setdefault(puzzle.tobytes(), (puzzle, solution))
            index += VARIANTS
        return list(distinct.values())

    @property
    def tokenizer(self) -> Tokenizer:
        return make_tokenizer(self.size)

    def validation(self) -> list[Examples]:
        return [self.examples(self.held_out(VALIDATION_PUZZLES))]


def data(recipe: Recipe, seed: int) -> SudokuData:
    options, size = recipe.options, recipe.options["size"]
    found = {"canvas_length": recipe.config["canvas_length"], "vocab_size": recipe.config["text_config"]["vocab_size"]}
    needed = {"canvas_length": size * (size + 1), "vocab_size": DIGIT + size + size**2 * (size + 1)}
    for name, value in needed.items():
        if found[name] != value:
            raise ValueError(f"{name} is {found[name]}, a grid of size {size} needs {value}: --set {name}={value}")
    return SudokuData(size, recipe.batch_size, (options["givens_min"], options["givens_max"]), seed)


@torch.no_grad()
def share_embeddings(model: LanguageModel, options: Mapping[str, Any], generator: torch.Generator) -> None:
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
    name="recipes/sudoku",
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
