"""Whatever stands in a config.json: it parses, or one line says what is wrong with it."""

import copy
import math
from typing import Any

import pytest

from sparing.config import ARCHITECTURES, parse_config
from sparing.errors import CheckpointError
from tests.tiny import CONFIGS, GEMMA

COMPLETE = CONFIGS | {
    "per-layer dialect": CONFIGS["value-only"]
    | {
        "per_layer_config": {"1": {"head_dim": 12, "num_key_value_heads": 1}, "03": {"head_dim": 12}},
        "rope_parameters": {
            "full_attention": {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 1e4},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e3},
        },
        "eos_token_id": [1, 2],
    },
    "composite": {"model_type": "gemma4", "text_config": CONFIGS["shared"], "image_token_id": 3, "vision_config": {}},
    "scaled rotation": CONFIGS["dense"]
    | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}},
    "gated window": CONFIGS["dense"]
    | {
        "model_type": "qwen2",
        "sliding_window": 5,
        "use_sliding_window": True,
        "layer_types": ["full_attention", "sliding_attention"],
    },
}
STRANGE: list[Any] = [None, "x", -1, 0, 3, 1.5, True, [], [1], ["a"], {}, {"a": 1}, 10**12, 10**400, math.inf, math.nan]


def paths(config, prefix=()):
    for key, value in config.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


@pytest.mark.parametrize("name", COMPLETE)
def test_every_key_with_every_strange_value(name):
    parse_config(COMPLETE[name])
    for *parents, last in paths(COMPLETE[name]):
        for value in (*STRANGE, "missing"):
            config = copy.deepcopy(COMPLETE[name])
            place = config
            for key in parents:
                place = place[key]
            if value == "missing":
                del place[last]
            else:
                place[last] = value
            assert outcome(config).startswith("config.json: "), (*parents, last, value)


def outcome(config) -> str:
    """What the refusal says, or what was parsed."""
    try:
        parsed = parse_config(config)
    except CheckpointError as error:
        return str(error) if "\n" not in str(error) else f"more than a line: {error}"
    return f"config.json: {len(parsed.tensors())} tensors, {len(parsed.memory_specs())} memories"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"layer_types": ["full_attention"] * 3}, "layer_types has 3 entries, num_hidden_layers is 6"),
        ({"layer_types": ["full_attention"] * 5 + ["linear"]}, "layer_types holds 'linear', supported"),
        ({"num_kv_shared_layers": 6}, "lower num_kv_shared_layers"),
        ({"num_kv_shared_layers": 7}, "num_kv_shared_layers is 7, the model has 6 layers"),
        ({"num_key_value_heads": 3}, "layer 0: num_attention_heads 4 is not a multiple of 3"),
        ({"head_dim": 7}, "head_dim is 7"),
        ({"hidden_size": "64"}, "hidden_size is '64', expected an integer"),
        ({"hidden_size": 10**12}, "hidden_size is over 2147483647"),
        ({"num_hidden_layers": 10**9, "layer_types": None}, "num_hidden_layers is over 16384"),
        ({"rms_norm_eps": math.nan}, "rms_norm_eps is nan, expected a finite number"),
        ({"use_bidirectional_attention": "all"}, "only causal text models"),
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu', supported: 'gelu_pytorch_tanh'"),
        ({"enable_moe_block": True}, "num_experts is missing"),
        (
            {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 5, "moe_intermediate_size": 8},
            "only 4 experts",
        ),
        ({"per_layer_config": {"9": {}}}, "names layer '9', the model has 6 layers"),
        ({"per_layer_config": {"1": {"sliding_window": 3}}}, "'sliding_window' is not supported"),
        ({"per_layer_config": [1]}, r"per_layer_config is \[1\]"),
        ({"rope_parameters": {"full_attention": {"rope_type": "spiral"}}}, "rope_type is 'spiral', supported"),
        ({"model_type": "gemma5"}, "model_type is 'gemma5', supported: deepseek_v4, diffusion_gemma"),
    ],
)
def test_the_message_names_key_value_and_way_out(change, message):
    with pytest.raises(CheckpointError, match=message):
        parse_config(CONFIGS["shared"] | change)


def test_every_architecture_is_listed():
    with pytest.raises(CheckpointError) as error:
        parse_config({})
    assert all(name in str(error.value) for name in ARCHITECTURES)


def test_unknown_keys_are_kept_for_show():
    assert parse_config(GEMMA | {"num_hidden_layers": 1, "mystery": 7}).unknown == {"mystery": 7}
    assert parse_config(CONFIGS["dense"] | {"mystery": 7}).unknown == {"mystery": 7}
    composite = parse_config(COMPLETE["composite"] | {"mystery": 7})
    assert composite.unknown == {"mystery": 7}
