"""The spellings of a Nemotron 3 config.json that must mean the same, and those that must be refused."""

import json
import math

import pytest

from sparing.config import parse_config
from sparing.config.names import names_in_file
from sparing.config.released import RELEASED
from sparing.errors import CheckpointError
from tests.tiny import CONFIGS

TINY = CONFIGS["hybrid"]
WITHOUT_LAYERS = {key: value for key, value in TINY.items() if key != "hybrid_override_pattern"}
KINDS = ("mamba", "moe", "attention", "mlp", "moe", "mamba")


@pytest.mark.parametrize(
    "spelling",
    [
        {"hybrid_override_pattern": "ME*-EM", "num_hidden_layers": 6},
        {"layers_block_type": list(KINDS)},
        {"layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "moe", "linear_attention"]},
        {"layer_types": list(KINDS), "num_hidden_layers": None},
        {"layers_block_type": list(KINDS), "hybrid_override_pattern": "M*"},  # the list wins
        {"hybrid_override_pattern": "ME*-EM", "num_hidden_layers": 52},  # the length wins
    ],
)
def test_layers_in_every_dialect(spelling):
    config = parse_config(WITHOUT_LAYERS | spelling)
    assert config.layers == KINDS
    assert config.num_hidden_layers == 6
    assert config == parse_config(TINY)


@pytest.mark.parametrize(
    "text",
    [
        '{"time_step_limit": [0.0, Infinity]}',
        '{"time_step_limit": [0.0, {"__float__": "Infinity"}]}',
        '{"time_step_limit": [0, "inf"]}',
        '{"mamba_dt_limit": [0.0, "Infinity"]}',
        '{"time_step_limit": null}',
        "{}",
    ],
)
def test_infinity_in_every_spelling(text):
    assert parse_config(TINY | json.loads(text)).time_step_limit == (0.0, math.inf)


def test_finite_limits():
    assert parse_config(TINY | {"time_step_limit": [0.01, 0.5]}).time_step_limit == (0.01, 0.5)


def test_either_name_of_epsilon():
    for given in ({"norm_eps": 1e-6}, {"layer_norm_epsilon": 1e-6}, {"norm_eps": 1e-6, "layer_norm_epsilon": 1e-6}):
        assert parse_config(TINY | given).rms_norm_eps == 1e-6
    assert parse_config(TINY).rms_norm_eps == 1e-5


def test_old_names_of_keys():
    renamed = {"mamba_n_groups": 3, "mamba_d_conv": 4, "mamba_conv_bias": True, "mamba_dt_min": 0.1, "mamba_expand": 2}
    raw = {key: value for key, value in TINY.items() if key not in ("n_groups", "conv_kernel")} | renamed
    assert parse_config(raw) == parse_config(TINY)
    assert not parse_config(raw).unknown


@pytest.mark.parametrize(("key", "wrapper"), [("llm_config", "NemotronH_Nano_VL_V2"), ("text_config", "llava")])
def test_a_vision_model_around_it(key, wrapper):
    config = parse_config({"model_type": wrapper, key: TINY, "vision_config": {}, "eos_token_id": 12})
    assert config.layers == KINDS
    assert config.eos_token_ids == (12,)
    names = [f"language_model.{name}" for name in config.tensors()]
    assert list(names_in_file(config, names)) == names


def test_drafting_head():
    assert parse_config(TINY).mtp_layers == ()
    one = TINY | {"num_nextn_predict_layers": 1}
    assert parse_config(one).mtp_layers == ("attention", "moe")
    assert parse_config(one | {"mtp_hybrid_override_pattern": "*-E"}).mtp_layers == ("attention", "mlp", "moe")
    words = {"mtp_layers_block_type": ["full_attention", "moe"], "mtp_hybrid_override_pattern": "*-E"}
    assert parse_config(one | words).mtp_layers == ("attention", "moe")


@pytest.mark.parametrize(("pattern", "head"), [("M-M*-", "*E"), ("ME*E", "*-"), ("*E*E", "ME"), ("*", "ME-")])
def test_a_head_has_the_numbers_of_mixers_that_the_layers_lack(pattern, head):
    settings = {"num_nextn_predict_layers": 1, "mtp_hybrid_override_pattern": head}
    whole, config = (parse_config(TINY | settings | {"hybrid_override_pattern": p}) for p in ("ME*-EM", pattern))
    assert config.mtp.tensors() == whole.mtp.tensors()
    assert config.mtp.text.memory_specs() == whole.mtp.text.memory_specs()
    if "E" in head:
        with pytest.raises(CheckpointError, match="topk_group is 9"):
            parse_config(TINY | settings | {"hybrid_override_pattern": pattern, "topk_group": 9})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"hybrid_override_pattern": "ME*XEM"}, r"hybrid_override_pattern\[3\] is 'X', supported: M \* E -"),
        ({"layers_block_type": ["mamba", "mamba2"]}, r"layers_block_type\[1\] is 'mamba2', supported: 'mamba'"),
        ({"layers_block_type": []}, "layers_block_type is empty"),
        ({"hybrid_override_pattern": None}, "neither hybrid_override_pattern nor layers_block_type"),
        ({"hybrid_override_pattern": "E-"}, "no layer is mamba or attention"),
        ({"block_configs": [{}]}, "block_configs .* is not supported"),
        ({"n_groups": 4}, "mamba_num_heads 6 is not a multiple of n_groups 4"),
        ({"mamba_n_groups": 6}, "n_groups is 3, mamba_n_groups is 6"),
        ({"num_key_value_heads": 3}, "num_attention_heads 4 is not a multiple of num_key_value_heads 3"),
        ({"n_group": 3}, "n_routed_experts 8 is not a multiple of n_group 3"),
        ({"topk_group": 5}, "topk_group is 5, there are only 4 groups"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok is 5, but 2 groups of 2 experts hold only 4"),
        ({"time_step_limit": [1.0, 0.5]}, "time_step_limit is .*, expected two bounds"),
        ({"time_step_limit": [float("nan"), 1]}, "expected two bounds"),
        ({"time_step_limit": [0.0]}, "expected two bounds"),
        ({"time_step_limit": [0, 10**400]}, 'time_step_limit holds a number that no step reaches: write "inf"'),
        ({"time_step_limit": [0, 10**9000]}, 'time_step_limit holds a number that no step reaches: write "inf"'),
        ({"norm_eps": 1e-6, "layer_norm_epsilon": 1e-5}, "norm_eps is 1e-06, layer_norm_epsilon is 1e-05"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act is 'silu', supported: 'relu2'"),
        ({"attention_bias": True}, "attention_bias is True"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings is True"),
        ({"n_shared_experts": 2}, "n_shared_experts is 2"),
        ({"mamba_ssm_cache_dtype": "int8"}, "mamba_ssm_cache_dtype is 'int8', supported: 'float32'"),
        ({"model_type": "nemotron_h_puzzle"}, "nemotron_h_puzzle"),
    ],
)
def test_contradictions_are_named(change, message):
    with pytest.raises(CheckpointError, match=message):
        parse_config(TINY | change)


@pytest.mark.parametrize(
    ("name", "counts"),
    [("nano", (23, 23, 6)), ("super", (40, 40, 8)), ("ultra", (48, 48, 12))],
)
def test_released_layers(name, counts):
    config = parse_config(RELEASED[f"nemotron-3-{name}"])
    assert tuple(config.layers.count(kind) for kind in ("mamba", "moe", "attention")) == counts
    assert sum(counts) == config.num_hidden_layers
    assert not config.unknown


def test_released_shapes():
    released = (parse_config(RELEASED[f"nemotron-3-{name}"]).tensors() for name in ("super", "nano"))
    super_, nano = ({name: shape for name, (shape, _) in tensors.items()} for tensors in released)
    first = "backbone.layers.0.mixer."
    assert super_[f"{first}in_proj.weight"] == (18560, 4096)
    assert super_[f"{first}conv1d.weight"] == (10240, 1, 4)
    assert super_[f"{first}out_proj.weight"] == (4096, 8192)
    assert nano[f"{first}in_proj.weight"] == (10304, 2688)
    assert nano[f"{first}conv1d.weight"] == (6144, 1, 4)


def test_layers_that_do_not_exist_need_no_numbers():
    config = parse_config({**WITHOUT_LAYERS, "hybrid_override_pattern": "*-", "n_groups": 7, "topk_group": 9})
    assert (config.num_experts, config.mamba_num_heads) == (0, 0)
    assert config.memory_layers == (0,)
    assert [spec is None for spec in config.memory_specs()] == [False, True]
