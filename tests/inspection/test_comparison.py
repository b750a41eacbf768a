"""`against_transformers`: agrees on models that are right, and names the first layer that is not."""

import json
import sys

import pytest
import torch
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
)

from sparing.inspection import against_transformers
from sparing.models import loading
from tests.conformance.reference import save_random
from tests.conformance.test_diffusion_gemma import save_denoiser
from tests.tiny import CONFIGS, EXPERTS, LLAMA, VOCAB


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    save_random(LlamaForCausalLM, LlamaConfig(**LLAMA | {"num_hidden_layers": 4}), root / "llama")
    gemma = CONFIGS["value-only"] | EXPERTS | {"enable_moe_block": True}
    save_random(Gemma4ForCausalLM, Gemma4TextConfig(**gemma), root / "gemma4")
    save_denoiser(root / "diffusion")
    return root


@pytest.mark.parametrize(("name", "stages"), [("llama", 6), ("gemma4", 6), ("diffusion", 5 + 2 * 6)])
def test_right_models_agree_at_every_stage(folders, name, stages):
    result = against_transformers(folders / name)
    assert result.agrees, result.table()
    assert len(result.stages) == stages
    assert f"{stages} stages agree" in result.table()
    assert json.loads(json.dumps(result.to_dict()))["first"] is None


@pytest.mark.parametrize(
    ("name", "parameter", "stage"),
    [
        ("llama", "model.layers.2.mlp.up_proj.weight", "layer 2"),
        ("llama", "model.norm.weight", "layer 3 and final norm"),
        ("llama", "lm_head.weight", "logits"),
        ("gemma4", "model.layers.1.self_attn.k_norm.weight", "layer 1"),
        ("diffusion", "model.decoder.layers.0.mlp.up_proj.weight", "encoding layer 0"),
        ("diffusion", "model.decoder.layers.1.layer_scalar", "denoising layer 1"),
        ("diffusion", "model.decoder.self_conditioning.up_proj.weight", "denoising again input"),
    ],
)
def test_the_first_stage_that_differs_is_named(folders, monkeypatch, name, parameter, stage):
    load = loading.load

    def load_wrongly(*args, **options):
        model = load(*args, **options)
        model.state_dict()[parameter][0] += 0.5  # one row: a norm would undo a factor on all
        return model

    monkeypatch.setattr(loading, "load", load_wrongly)
    result = against_transformers(folders / name, [5, 3, 8, 1, 1, 40, 57, 2, 9])
    assert result.first is not None
    assert result.first.name == stage
    assert f"is in {stage}," in result.table()
    assert not result.agrees


def test_numbers_that_are_none_count_as_a_difference(folders, monkeypatch):
    load = loading.load

    def load_wrongly(*args, **options):
        model = load(*args, **options)
        model.state_dict()["model.layers.1.mlp.up_proj.weight"].fill_(torch.nan)
        return model

    monkeypatch.setattr(loading, "load", load_wrongly)
    first = against_transformers(folders / "llama").first
    assert first is not None
    assert first.name == "layer 1"


def test_mistakes_are_explained(folders, monkeypatch):
    with pytest.raises(ValueError, match="no tokenizer"):
        against_transformers(folders / "llama", "once upon a time")
    with pytest.raises(ValueError, match=f"{VOCAB} is out of range"):
        against_transformers(folders / "llama", [VOCAB])
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ValueError, match="not installed"):
        against_transformers(folders / "llama", [1])
