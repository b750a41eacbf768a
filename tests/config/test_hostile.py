"""Configs of every family with anything anywhere: accepted, or refused in a line, before a model is built."""

import copy
import json
import math
import random
import time

import pytest
from safetensors.torch import save_file

import sparing
from sparing.config import parse_config
from sparing.errors import CheckpointError
from sparing.inspection import inspect
from sparing.models import loading
from tests.tiny import CONFIGS, DRAFTER

FAMILIES = CONFIGS | {
    "wrapped": {"model_type": "gemma4", "text_config": CONFIGS["shared"], "image_token_id": 3},
    "yarn": CONFIGS["dense"] | {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}},
    "windows": CONFIGS["dense"]
    | {"model_type": "qwen2", "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    "drafter": DRAFTER,
}
STRANGE = [
    None, "", "x", -1, 0, 1, 2, 7, 2**14, 2**31, 10**400, 1.5, -0.5, 1e-300, 1e300, math.inf, math.nan, True, False,
    [], [""], [None], [1], [["a"]], {}, {"": ""}, {"rope_type": ["x"]}, {"type": "linear", "factor": "8"},
    {"rope_type": "dynamic", "factor": 2.0}, {"full_attention": {"rope_theta": 0}}, ["full_attention"] * 6,
    "M" * 20000, "x" * 10**5, [0] * 10**4, {str(i): i for i in range(2000)}, "float8_e4m3fn", ["float32"], "\ud800",
]  # fmt: skip
KEYS = [
    "rope_theta", "rope_scaling", "rope_parameters", "sliding_window", "layer_types", "eos_token_id", "bos_token_id",
    "dtype", "torch_dtype", "head_dim", "tie_word_embeddings", "per_layer_config", "num_kv_shared_layers",
    "text_config", "llm_config", "partial_rotary_factor", "hybrid_override_pattern", "layers_block_type",
    "time_step_limit", "image_token_id", "num_experts", "is_causal", "final_logit_softcapping", "canvas_length",
]  # fmt: skip


def paths(config, prefix=()):
    for key, value in config.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from paths(value, (*prefix, key))


@pytest.mark.parametrize("seed", range(20))
def test_mutations(seed):
    choose = random.Random(seed)
    for _ in range(20):
        config = copy.deepcopy(choose.choice(list(FAMILIES.values())))
        for _ in range(choose.randint(1, 3)):
            *parents, last = choose.choice(list(paths(config)))
            place = config
            for key in parents:
                place = place[key]
            place[last if choose.random() < 0.7 else choose.choice(KEYS)] = choose.choice(STRANGE)
        for look in (lambda raw: sparing.plan(raw, context=16).table(), lambda raw: inspect(raw).table()):
            began = time.process_time()
            assert len(outcome(look, config)) < 1000, config
            assert time.process_time() - began < 5, config


def outcome(look, config) -> str:
    """What a refusal says; empty where there is none."""
    try:
        look(config)
    except CheckpointError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("shared", {"layer_types": ["", "full_attention"] * 3}, "layer_types holds '', supported"),
        ("dense", {"layer_types": ["", ""]}, "layer_types holds '', supported"),
        ("dense", {"rms_norm_eps": -1.0}, r"rms_norm_eps is -1.0, expected a number of at least 0"),
        ("hybrid", {"layer_norm_epsilon": -1e-5}, r"layer_norm_epsilon is -1e-05, expected"),
        ("dense", {"rope_theta": -1e4}, r"rope_theta is -10000.0, expected a number above 0"),
        ("dense", {"dtype": ["float32"]}, r"dtype is \['float32'\], supported: 'bfloat16'"),
        ("dense", {"dtype": "bfloat"}, "dtype is 'bfloat', supported: 'bfloat16'"),
        ("shared", {"final_logit_softcapping": 0}, "final_logit_softcapping is 0, expected a number above 0"),
        ("wrapped", {"torch_dtype": 16}, "torch_dtype is 16, supported"),
        ("wrapped", {"tie_word_embeddings": "no"}, "tie_word_embeddings is 'no', expected true or false"),
        ("wrapped", {"image_token_id": "x"}, "image_token_id is 'x', expected an integer"),
        (
            "hybrid",
            {"hybrid_override_pattern": "M" * 100_000},
            "hybrid_override_pattern has 100000 letters, over 16384",
        ),
        ("hybrid", {"layers_block_type": ["mamba"] * 20_000}, "layers_block_type has 20000 entries, over 16384"),
        (
            "denoiser",
            {"text_config": CONFIGS["denoiser"]["text_config"] | {"hidden_size_per_layer_input": 8}},
            "no per",
        ),
        (
            "shared",
            {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 60},
            "vocab_size_per_layer_input is 60, vocab_size 61",
        ),
        ("shared", {"per_layer_config": {"9" * 5000: {}}}, "per_layer_config names layer '999"),
        ("shared", {"per_layer_config": {"²": {}}}, "per_layer_config names layer '²'"),
    ],
)
def test_what_was_found_by_mutating(family, change, message):
    with pytest.raises(CheckpointError, match=message) as error:
        parse_config(FAMILIES[family] | change)
    assert len(str(error.value)) < 400


@pytest.mark.parametrize(
    ("spelling", "dtype"),
    [
        ({"dtype": "bfloat16"}, "bfloat16"),
        ({"torch_dtype": "torch.float16"}, "float16"),
        ({"dtype": None, "torch_dtype": "half"}, "float16"),
        ({"dtype": "auto"}, "float32"),
        ({"dtype": "float8_e4m3fn"}, "float8_e4m3fn"),
        ({}, "float32"),
    ],
)
def test_types_by_every_name(spelling, dtype):
    for family, raw in FAMILIES.items():
        bare = {key: value for key, value in raw.items() if key != "dtype"}
        assert parse_config(without_inner_type(bare) | spelling).stored_dtype == dtype
        if "text_config" in raw and family != "wrapped":
            continue
        if "text_config" in raw:
            inner = without_inner_type(bare)
            inner["text_config"] |= spelling
            assert parse_config(inner).stored_dtype == dtype


def without_inner_type(raw):
    text = {key: value for key, value in raw.get("text_config", {}).items() if key != "dtype"}
    return raw | ({"text_config": text} if text else {})


def test_ids_beyond_the_vocabulary_are_none():
    raw = CONFIGS["dense"] | {"eos_token_id": [1, 61, 10**6], "bos_token_id": 61, "pad_token_id": 2**31 - 1}
    config = parse_config(raw)
    assert (config.eos_token_ids, config.bos_token_id, config.pad_token_id) == ((1,), None, None)
    assert parse_config(FAMILIES["wrapped"] | {"image_token_id": 258880}).refused_token_ids == ()
    assert parse_config(FAMILIES["wrapped"] | {"image_token_id": -1, "audio_token_id": 5}).refused_token_ids == (5,)


def test_names_are_compared_before_a_model_is_built(tmp_path, monkeypatch):
    model = loading.build(parse_config(CONFIGS["dense"])).to_empty(device="cpu")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    monkeypatch.setattr(loading, "build", lambda config: pytest.fail("built"))
    for change in ({"num_hidden_layers": 16384}, {"vocab_size": 2**31 - 1}, {"intermediate_size": 2**30}):
        (tmp_path / "config.json").write_text(json.dumps(CONFIGS["dense"] | change))
        with pytest.raises(CheckpointError, match=r"are missing|has shape"):
            sparing.load(tmp_path)


def test_experts_that_a_file_lacks_are_not_all_named():
    from sparing.config.names import names_in_file

    config = parse_config(CONFIGS["hybrid"] | {"n_routed_experts": 16384, "n_group": 1, "topk_group": 1})
    parameter = next(name for name in config.tensors() if name.endswith("experts.up_proj"))
    stored = [f"{parameter.removesuffix('.up_proj')}.{e}.up_proj.weight" for e in range(3)]
    names = names_in_file(config, stored)
    assert set(stored) < set(names)
    assert sum(".experts." in name and name.endswith(".weight") for name in names) == 4


def test_a_large_file_and_a_key_given_twice(tmp_path):
    path = tmp_path / "config.json"
    text = json.dumps(CONFIGS["dense"])
    path.write_text(text[:-1] + ', "vocab_size": 61}')  # the same again
    assert inspect(tmp_path).vocab_size == 61
    path.write_text(text[:-1] + ', "vocab_size": 62}')
    with pytest.raises(CheckpointError, match=r"config.json: not valid JSON: 'vocab_size' is both 61 and 62"):
        inspect(tmp_path)
    path.write_text(text + " " * (16 << 20))
    with pytest.raises(CheckpointError, match=r"config.json: has \d+ bytes, over 16777216"):
        inspect(tmp_path)
    path.write_text(json.dumps(CONFIGS["dense"] | {"x_softcapping" * 9 + str(i): 5.0 for i in range(5000)}))
    began = time.process_time()
    assert len(inspect(tmp_path).unknown_keys) == 5000
    assert time.process_time() - began < 3
