"""DiffusionGemma's config: what it implies and what it refuses."""

import pytest

from sparing.config import parse_config
from sparing.errors import CheckpointError
from tests.tiny import CONFIGS


def test_the_stack_always_has_experts_and_shares_projections():
    """Whatever its text_config says or leaves out: the two keys do not exist for this model."""
    config = parse_config(CONFIGS["denoiser"])
    assert config.num_experts == 5
    assert [layer.value_is_key for layer in config.layers] == [False, True]
    assert config.text.final_logit_softcapping == 30.0
    assert config.vocab_size == config.text.vocab_size


def test_defaults():
    text = {"num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 8}
    config = parse_config({"model_type": "diffusion_gemma", "text_config": text})
    assert config.canvas_length == 256
    assert config.text.final_logit_softcapping == 30.0
    assert config.text.hidden_size_per_layer_input == 0
    assert config.num_hidden_layers == 30


def test_untied_weights_are_refused():
    """They would also untie the encoder from the denoiser."""
    with pytest.raises(CheckpointError, match="tie_word_embeddings is false"):
        parse_config(CONFIGS["denoiser"] | {"tie_word_embeddings": False})


def test_text_config_must_be_there():
    with pytest.raises(CheckpointError, match="text_config is missing"):
        parse_config({"model_type": "diffusion_gemma"})


def test_both_modes_have_their_own_scalars():
    names = parse_config(CONFIGS["denoiser"]).tensors()
    for i in range(2):
        assert f"model.decoder.layers.{i}.layer_scalar" in names
        assert f"model.encoder.language_model.layers.{i}.layer_scalar" in names
    assert "model.decoder.layers.1.self_attn.v_proj.weight" not in names
    assert "model.decoder.layers.0.self_attn.v_proj.weight" in names
