"""The models that ship, themselves: small, in the released layout, and able to do what they are for."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest

import sparing
from sparing.checkpoint.source import BUNDLED
from sparing.inspection import against_transformers
from sparing.training import RECIPES
from sparing.training.data import split_books
from sparing.training.evaluate import answers, solve_sudoku, words_of
from sparing.training.recipes.sudoku import SudokuData

ASSETS = Path(str(resources.files("sparing") / "assets"))
MODELS = ("sudoku", "tales")


@pytest.fixture(scope="module", params=MODELS)
def name(request) -> str:
    return request.param


def test_all_of_them_take_at_most_16_mib():
    files = [file for name in BUNDLED for file in (ASSETS / name).iterdir()]
    assert sum(file.stat().st_size for file in files) <= 16 * 2**20


def test_the_config_is_spelled_as_released(name):
    config = json.loads((ASSETS / name / "config.json").read_text())
    text = config["text_config"]
    assert (config["model_type"], text["model_type"]) == ("diffusion_gemma", "diffusion_gemma_text")
    assert {"global_head_dim", "num_global_key_value_heads"} <= text.keys() and "per_layer_config" not in text
    assert {"sliding_attention", "full_attention"} == set(text["layer_types"])
    generation = json.loads((ASSETS / name / "generation_config.json").read_text())
    released = {"max_denoising_steps": 48, "t_min": 0.4, "t_max": 0.8, "stability_threshold": 1}
    released |= {"confidence_threshold": 0.005, "pad_token_id": 0}
    assert released.items() <= generation.items()
    assert generation["sampler_config"] == {"_cls_name": "EntropyBoundSamplerConfig", "entropy_bound": 0.1}


@pytest.mark.parametrize("name", BUNDLED)
def test_the_config_is_that_of_its_recipe(name):
    assert json.loads((ASSETS / name / "config.json").read_text()) == {
        **RECIPES[f"recipes/{name}"].config,
        "dtype": "bfloat16",
    }


def test_transformers_opens_the_hybrid_and_computes_the_same():
    result = against_transformers("hybrid")
    assert result.agrees and len(result.stages) == 9


def test_the_log_of_its_training_is_beside_it(name):
    records = [json.loads(line) for line in (ASSETS / name / "log.jsonl").read_text().splitlines()]
    losses = [record["validation_diffusion"] for record in records if "validation_diffusion" in record]
    assert losses and losses[-1] <= losses[0]


def test_sudokus_are_solved_at_once_and_better_than_left_to_right():
    model = sparing.load("sudoku", dtype="float32")
    puzzles = SudokuData(9, 1, (50, 50), seed=7).held_out(12)
    at_once = solve_sudoku(model, puzzles, "block_diffusion")
    in_order = solve_sudoku(model, puzzles, "autoregressive")
    assert at_once["solved"] >= 0.75  # 97 % of many
    assert at_once["solved"] > in_order["solved"]
    assert in_order["tokens_per_forward"] == 1.0
    assert at_once["tokens_per_forward"] == pytest.approx(90 / at_once["forwards"])
    assert at_once["forwards"] < 48


def test_a_tale_is_told_in_words():
    model = sparing.load(dtype="float32")
    options = {"decoder": "autoregressive", "temperature": 0.7, "max_new_tokens": 48}
    (tale,) = answers(model, ["Once upon a time there was a king who had"], seed=1, **options)
    assert len(tale.ids) == tale.forwards == 48
    common = {"the", "and", "a", "to", "of", "he", "she", "was", "that", "in", "his", "her", "it", "had"}
    assert sum(word in common for word in words_of(tale.text)) >= 5


def test_books_lose_their_last_share_to_measuring():
    book = "\n\n".join(f"Paragraph {i:03} of a book." for i in range(100))
    training, held = split_books(f"{book}\n\n\n{book}")
    assert len(training) == len(held) == 2
    assert f"{training[0]}\n\n{held[0]}" == book
    assert 0.02 < len(held[0]) / len(book) < 0.06
