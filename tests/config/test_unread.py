"""Settings that nobody reads: those that change what a model computes are refused, all others are shown."""

import pytest
from transformers import AutoConfig

from sparing.config import parse_config
from sparing.config.fields import Fields
from sparing.config.unread import refuse_unread
from sparing.errors import CheckpointError
from tests.tiny import CONFIGS

WRAPPED = {"model_type": "gemma4", "text_config": CONFIGS["shared"]}
FAMILIES = {"llama": CONFIGS["dense"], "gemma": CONFIGS["shared"], "hybrid": CONFIGS["hybrid"]}

CHANGING = {
    "attn_logit_softcapping": 50.0,
    "attn_logit_soft_cap": 30,
    "logits_soft_cap": 20.0,
    "clip_qkv": 8.0,
    "embedding_multiplier": 12.0,
    "residual_multiplier": 0.22,
    "attention_multiplier": 0.015625,
    "logit_scale": 0.0625,
    "logits_scaling": 16.0,
    "scale_emb": 12,
    "scale_depth": 1.4,
    "lm_head_multiplier": 0.04,
    "mlp_multipliers": [0.9, 0.2],
    "output_multiplier_scale": 5.0,
    "ssm_multipliers": [0.35, 0.25, 1.0, 1.0, 1.0],
    "ssm_out_multiplier": 0.2,
    "query_pre_attn_scalar": 17,
    "attention_window_size": 128,
    "attention_chunk_size": 8192,
    "is_causal": False,
    "causal": False,
    "use_bidirectional": True,
    "alibi": True,
    "rotary_pct": 0.25,
    "rope_interleaved": True,
    "no_rope_layers": [1, 1, 1, 0],
    "parallel_attn": True,
    "use_parallel_residual": True,
    "layer_norm_type": "low_precision_layernorm",
    "norm_after": True,
    "num_local_experts": 8,
    "attn_temperature_tuning": True,
}
HARMLESS = {
    "attn_logit_softcapping": None,
    "clip_qkv": 0,
    "embedding_multiplier": 1.0,
    "residual_multiplier": 1,
    "mlp_multipliers": [1.0, 1.0],
    "ssm_in_multiplier": 1.0,
    "ffn_dim_multiplier": 1.3,
    "hidden_size_multiplier": 4,
    "is_causal": True,
    "attention_window_size": None,
    "alibi": False,
    "rotary_pct": 1.0,
    "rope_interleaved": False,
    "layer_norm_type": "rmsnorm",
    "use_mrope": False,
    "num_local_experts": 0,
    "norm_type": "RMSNorm",
    "training_steps": 7,
    "transformers.js_config": {"dtype": "q4"},
    "unsloth_fixed": True,
    "attn_implementation": "flash_attention_2",
    "auto_map": {"AutoModel": "modeling.Model"},
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("key", CHANGING)
def test_what_changes_results_is_refused_by_name(family, key):
    with pytest.raises(CheckpointError, match=rf"config.json: {key} is .*; remove it if"):
        parse_config(FAMILIES[family] | {key: CHANGING[key]})


@pytest.mark.parametrize("key", CHANGING)
def test_inside_a_wrapper(key):
    with pytest.raises(CheckpointError, match=rf"config.json: text_config: {key} is "):
        parse_config(WRAPPED | {"text_config": WRAPPED["text_config"] | {key: CHANGING[key]}})


@pytest.mark.parametrize("family", FAMILIES)
def test_what_changes_nothing_is_kept_for_show(family):
    assert parse_config(FAMILIES[family] | HARMLESS).unknown == HARMLESS


def test_the_numbers_that_a_model_has_anyway():
    dense = CONFIGS["dense"] | {"head_dim": 8, "query_pre_attn_scalar": 8, "hidden_activation": "silu"}
    assert parse_config(dense).unknown == {"query_pre_attn_scalar": 8, "hidden_activation": "silu"}
    with pytest.raises(CheckpointError, match="hidden_activation is 'gelu'"):
        parse_config(dense | {"hidden_activation": "gelu"})
    with pytest.raises(CheckpointError, match="use_qk_norm is True"):
        parse_config(dense | {"use_qk_norm": True})
    assert parse_config(dense | {"model_type": "qwen3", "use_qk_norm": True}).qk_norm


def test_a_window_that_the_family_does_not_have():
    with pytest.raises(CheckpointError, match="sliding_window is 16, llama models see all"):
        parse_config(CONFIGS["dense"] | {"sliding_window": 16})
    for harmless in (None, 4096):  # all that the context holds
        assert parse_config(CONFIGS["dense"] | {"sliding_window": harmless}).windows == (None, None)
    assert parse_config(CONFIGS["dense"] | {"model_type": "mistral", "sliding_window": 16}).windows == (16, 16)


def test_names_of_gguf():
    for key in ("attention.causal", "logit_scale", "attention.max_alibi_bias", "attention.sliding_window"):
        with pytest.raises(CheckpointError, match=rf"x.gguf: {key} is "):
            refuse_unread({key: False if key.endswith("causal") else 8.0}, file="x.gguf", model_type="llama")
    refuse_unread({"attention.causal": True, "logit_scale": 1.0, "context": 9}, file="x.gguf", model_type="llama")


MODEL_TYPES = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "gemma3_text", "gemma4", "gemma4_text", "gemma4_unified"]


@pytest.mark.parametrize("model_type", [*MODEL_TYPES, "nemotron_h"])
def test_every_key_that_the_reference_writes_is_read(model_type):
    for diff in (False, True):
        written = (
            AutoConfig.for_model(model_type).to_dict() if not diff else AutoConfig.for_model(model_type).to_diff_dict()
        )
        assert parse_config({"model_type": model_type, **written}).unknown == {}


def test_a_value_in_a_message_is_short():
    for value in ("x" * 10**6, ["x"] * 10**6, {"x": "y" * 10**6}, 10**9000):
        for read in (
            lambda f: f.integer("k"),
            lambda f: f.boolean("k"),
            lambda f: f.number("k"),
            lambda f: f.choice("k", ("a",)),
        ):
            with pytest.raises(CheckpointError) as error:
                read(Fields({"k": value}))
            assert len(str(error.value)) < 300
