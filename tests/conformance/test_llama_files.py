"""How config.json may be written: old spellings, keys left out, contradictions. The reference reads the same files."""

import pytest
import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparing.config import parse_config
from sparing.errors import CheckpointError
from tests.conformance.reference import assert_same, load, reload, rewrite, run_reference, save_random
from tests.tiny import ENDLESS, FULL, SIZES, SLIDING, random_ids

COMMON = SIZES | ENDLESS | {"num_hidden_layers": 4, "max_position_embeddings": 64}
YARN = {"factor": 4.0, "original_max_position_embeddings": 16}

ROTATIONS = {
    "theta alone": {"rope_theta": 500.0},
    "nothing": {},
    "null": {"rope_theta": 500.0, "rope_scaling": None},
    "yarn without original context": {"rope_theta": 500.0, "rope_scaling": {"type": "yarn", "factor": 4.0}},
    "yarn without factor": {"rope_scaling": {"rope_type": "yarn", **YARN, "factor": None}},
    "yarn of factor 1": {"rope_scaling": {"type": "yarn", **YARN, "factor": 1.0}},
    "yarn with mscale alone": {"rope_scaling": {"type": "yarn", **YARN, "mscale": 0.7}},
    "dynamic beside an original context": {
        "rope_scaling": {"type": "dynamic", "factor": 4.0, "original_max_position_embeddings": 16},
        "max_position_embeddings": 8,
    },
    "yarn beside the original context": {
        "original_max_position_embeddings": 16,
        "rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
    },
    "a share that plain rotation does not look at": {
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0, "partial_rotary_factor": 0.5},
    },
    "both spellings": {
        "rope_theta": 900.0,
        "rope_scaling": {"type": "linear", "factor": 3.0},
        "rope_parameters": {"rope_type": "default", "rope_theta": 500.0},
    },
}


@pytest.mark.parametrize("spelling", ROTATIONS)
def test_spellings_of_a_rotation(spelling, tmp_path):
    def respell(config):
        del config["rope_parameters"]
        config |= ROTATIONS[spelling]

    save_random(LlamaForCausalLM, LlamaConfig(**COMMON), tmp_path, seed=1)
    rewrite(tmp_path, config=respell)
    reference = run_reference(reload(LlamaForCausalLM, tmp_path, torch.float32), random_ids(17)).logits[0]
    assert_same(load(tmp_path).logits(random_ids(17)), reference, 1e-4)


@pytest.mark.parametrize(
    ("classes", "values", "left_out"),
    [
        (
            (LlamaConfig, LlamaForCausalLM),
            {"num_key_value_heads": 4},
            ["num_key_value_heads", "head_dim", "rms_norm_eps", "attention_bias", "mlp_bias"],
        ),
        (
            (MistralConfig, MistralForCausalLM),
            {"num_attention_heads": 8, "num_key_value_heads": 8},
            ["num_key_value_heads", "head_dim", "sliding_window"],
        ),
        (
            (Qwen2Config, Qwen2ForCausalLM),
            {},
            ["use_sliding_window", "sliding_window", "layer_types", "max_window_layers"],
        ),
        (
            (Qwen3Config, Qwen3ForCausalLM),
            {"head_dim": 128},
            ["head_dim", "attention_bias", "layer_types", "tie_word_embeddings"],
        ),
    ],
    ids=["llama", "mistral", "qwen2", "qwen3"],
)
def test_keys_left_out(classes, values, left_out, tmp_path):
    """A key that config.json leaves out has the reference's default."""
    config_class, model_class = classes
    save_random(model_class, config_class(**COMMON | values), tmp_path, seed=1)
    rewrite(tmp_path, config=lambda raw: [raw.pop(key, None) for key in ["max_position_embeddings", *left_out]])
    reference, ours = reload(model_class, tmp_path, torch.float32), load(tmp_path)
    assert_same(ours.logits(random_ids(17)), run_reference(reference, random_ids(17)).logits[0], 1e-4)
    assert ours.config.max_position_embeddings == reference.config.max_position_embeddings
    assert ours.config.windows == ((4096,) * 4 if config_class is MistralConfig else (None,) * 4)


@pytest.mark.parametrize(
    ("rope", "context"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 3.0}, 192),
        ({"rope_type": "dynamic", "factor": 2.0}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "yarn", "factor": 4.0}, 256),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 16}, 64),
    ],
)
def test_context_counts_the_stretch(rope, context):
    """What a sequence may hold: for all but Llama 3, whose files state it, the trained context times the factor."""
    config = parse_config(COMMON | {"model_type": "llama", "rope_parameters": rope})
    assert config.max_position_embeddings == context


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"hidden_size": 50}, "hidden_size 50 is not a multiple of num_attention_heads 4"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu', supported: 'silu'"),
        ({"rope_parameters": {"rope_type": "longrope"}}, "rope_type is 'longrope', supported: 'default'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "rope_type 'linear' needs a factor"),
        ({"rope_parameters": {FULL: {"rope_theta": 5.0}}}, "full_attention holds an object"),
        ({"layer_types": [FULL]}, "layer_types has 1 entries, num_hidden_layers is 4"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types holds 'chunked_attention', supported"),
        ({"model_type": "qwen2", "layer_types": [SLIDING] * 4}, "but use_sliding_window is not set"),
        ({"model_type": "mistral", "sliding_window": None, "layer_types": [SLIDING] * 4}, "sliding_window is null"),
        ({"vocab_size": "97"}, "vocab_size is '97', expected an integer of at least 1"),
    ],
)
def test_contradictions_are_named(change, message):
    with pytest.raises(CheckpointError, match=message):
        parse_config(COMMON | {"model_type": "llama"} | change)
