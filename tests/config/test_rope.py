"""Every spelling of a rotation: frequencies and factor are those that the reference computes, or it is refused."""

import itertools

import pytest
import torch
from transformers import Gemma4TextConfig, LlamaConfig
from transformers.models.gemma4.modeling_gemma4 import Gemma4TextRotaryEmbedding
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from sparing.config import parse_config
from sparing.errors import CheckpointError
from sparing.kernels import inverse_frequencies
from tests.tiny import CONFIGS

LLAMA = CONFIGS["dense"] | {"head_dim": 16, "max_position_embeddings": 256}
SCALINGS = {
    "default": {},
    "linear": {"factor": 3.0},
    "yarn": {"factor": 4.0},
    "yarn, all of it": {
        "factor": 4,
        "beta_fast": 16.0,
        "beta_slow": 2,
        "mscale": 0.7,
        "mscale_all_dim": 1.3,
        "truncate": False,
    },
    "yarn, given factor": {"factor": 4.0, "attention_factor": 1.25, "original_max_position_embeddings": 64},
    "yarn, ramp upside down": {"factor": 4.0, "beta_fast": 1.0, "beta_slow": 8.0},
    "llama3": {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
    "llama3, own context": {
        "factor": 8.0,
        "low_freq_factor": 2,
        "high_freq_factor": 3.0,
        "original_max_position_embeddings": 32,
    },
    "proportional": {"partial_rotary_factor": 0.5, "factor": 2.0},
}
BESIDE = [
    {},
    {"rope_theta": 500.0},
    {"rope_theta": 500},
    {"original_max_position_embeddings": 128},
    {"partial_rotary_factor": 1.0},
]


@pytest.mark.parametrize("scaling", SCALINGS)
def test_as_the_reference(scaling):
    for place, key, beside, theta in itertools.product(
        ("rope_scaling", "rope_parameters"), ("type", "rope_type"), BESIDE, ({}, {"rope_theta": 900.0})
    ):
        turning = {key: scaling.split(",")[0], **SCALINGS[scaling], **theta}
        raw = LLAMA | beside | {place: turning}
        theirs = LlamaRotaryEmbedding(LlamaConfig.from_dict(raw | {place: dict(turning)}))
        inv_freq, sharpness = inverse_frequencies(parse_config(raw).rope, 16)
        torch.testing.assert_close(inv_freq, theirs.inv_freq, rtol=1e-6, atol=0)
        assert sharpness == pytest.approx(theirs.attention_scaling, abs=1e-12)


def test_a_share_of_a_head():
    """The reference's plain rotation turns all of it; scaled ones of these models cannot turn less."""
    for raw in ({"partial_rotary_factor": 0.5}, {"rope_parameters": {"rope_theta": 1e4, "partial_rotary_factor": 0.5}}):
        inv_freq, _ = inverse_frequencies(parse_config(LLAMA | raw).rope, 16)
        assert torch.equal(inv_freq, LlamaRotaryEmbedding(LlamaConfig.from_dict(LLAMA | raw)).inv_freq)
    with pytest.raises(CheckpointError, match=r"partial_rotary_factor is 0.5: with rope_type 'linear' whole heads"):
        parse_config(LLAMA | {"partial_rotary_factor": 0.5, "rope_scaling": {"type": "linear", "factor": 2.0}})


@pytest.mark.parametrize("full", ["default", "linear", "llama3", "proportional"])
def test_each_kind_of_layer_for_itself(full):
    ropes = {
        "full_attention": {"rope_type": full, "rope_theta": 5e4, **SCALINGS[full]},
        "sliding_attention": {"rope_type": "default", "rope_theta": 300.0, "partial_rotary_factor": 0.5},
    }
    if full == "llama3":
        ropes["full_attention"]["original_max_position_embeddings"] = 64
    raw = CONFIGS["shared"] | {"rope_parameters": ropes}
    theirs, config = Gemma4TextRotaryEmbedding(Gemma4TextConfig.from_dict(raw)), parse_config(raw)
    for kind, head_dim in (("full_attention", 12), ("sliding_attention", 8)):
        inv_freq, _ = inverse_frequencies(config.rope[kind], head_dim)
        torch.testing.assert_close(inv_freq, getattr(theirs, f"{kind}_inv_freq"), rtol=1e-6, atol=0)


REFUSED = {
    "rope_type is 'longrope', supported": {"rope_type": "longrope", "short_factor": [1.0], "long_factor": [1.0]},
    "type is 'su', supported": {"type": "su", "factor": 2.0},
    "rope_type is None, supported": {"rope_type": None},
    "rope_type is \\['yarn'\\], supported": {"rope_type": ["yarn"]},
    "needs a factor": {"rope_type": "linear"},
    "factor is 0, expected a number above 0": {"rope_type": "linear", "factor": 0},
    "factor is -2.0, expected a number above 0": {"rope_type": "yarn", "factor": -2.0},
    "rope_theta is -1.0, expected a number above 0": {"rope_theta": -1.0},
    "rope_theta is 1.0": {"rope_type": "yarn", "factor": 2.0, "rope_theta": 1.0},
    "beta_fast is -1, expected": {"rope_type": "yarn", "factor": 2.0, "beta_fast": -1},
    "attention_factor is -1.0, expected": {"rope_type": "yarn", "factor": 2.0, "attention_factor": -1.0},
    "low_freq_factor 4.0 is not below": {"rope_type": "llama3", "factor": 2.0, "low_freq_factor": 4.0},
    "partial_rotary_factor is 1.5": {"rope_type": "proportional", "partial_rotary_factor": 1.5},
    "llama_4_scaling_beta is 0.1": {"rope_type": "default", "llama_4_scaling_beta": 0.1},
    "full_attention holds an object": {"full_attention": {"rope_type": "default"}},
}


@pytest.mark.parametrize("message", REFUSED)
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_what_is_refused_names_the_object(message, place):
    with pytest.raises(CheckpointError, match=f"config.json: {place}: .*{message}"):
        parse_config(LLAMA | {place: REFUSED[message]})


def test_heads_that_cannot_turn():
    with pytest.raises(CheckpointError, match="head_dim is 7: rotation pairs dimensions"):
        parse_config(LLAMA | {"head_dim": 7})
    with pytest.raises(CheckpointError, match="'dynamic' stretches pairs against each other, head_dim is 2"):
        parse_config(LLAMA | {"head_dim": 2, "rope_scaling": {"type": "dynamic", "factor": 2.0}})


def test_gemma_has_one_object_a_kind():
    for ropes in ({"rope_type": "default", "rope_theta": 1e4}, ["x"], {"full_attention": 3}):
        with pytest.raises(CheckpointError, match="rope_parameters"):
            parse_config(CONFIGS["shared"] | {"rope_parameters": ropes})
    for kind in ("dynamic", "yarn", "longrope"):
        turning = {"full_attention": {"rope_type": kind, "factor": 2.0, "rope_theta": 1e4}}
        with pytest.raises(CheckpointError, match=rf"rope_parameters.full_attention: rope_type is '{kind}', supported"):
            parse_config(CONFIGS["shared"] | {"rope_parameters": turning})
    with pytest.raises(CheckpointError, match=r"rope_parameters.full_attention: the key rope_theta is missing"):
        parse_config(CONFIGS["shared"] | {"rope_parameters": {"full_attention": {"rope_type": "default"}}})
    text = CONFIGS["shared"] | {"rope_scaling": {"type": "linear", "factor": 8.0}}
    with pytest.raises(CheckpointError, match="text_config: rope_scaling is"):
        parse_config({"model_type": "gemma4", "text_config": text})


def test_keys_that_nobody_reads_are_shown():
    raw = LLAMA | {"rope_scaling": {"type": "yarn", "factor": 2.0, "finetuned": True}}
    assert parse_config(raw).unknown == {"rope_scaling.finetuned": True}
