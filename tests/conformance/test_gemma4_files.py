"""The spellings of Gemma 4 checkpoints: types, composite files, both geometry dialects, dead tensors."""

import json

import pytest
import torch
from transformers import (
    Gemma4Config,
    Gemma4ForCausalLM,
    Gemma4ForConditionalGeneration,
    Gemma4TextConfig,
    Gemma4UnifiedConfig,
    Gemma4UnifiedForConditionalGeneration,
)

from sparing import CheckpointError
from tests.conformance.reference import (
    assert_same,
    load,
    multiply_as_torch_does,
    reload,
    rewrite,
    run_chunked,
    run_reference,
    save_random,
)
from tests.conformance.test_gemma4 import CASES, DENSE, E_SERIES, MOE, ids
from tests.tiny import VISION, random_ids

PLACEHOLDERS = {
    "image_token_id": 96,
    "boi_token_id": 95,
    "eoi_token_id": 94,
    "audio_token_id": 93,
    "boa_token_id": 92,
    "eoa_token_id": 91,
    "eoa_token_index": 91,
    "video_token_id": 90,
}
# The experts' default product in the reference wants rows of a multiple of 16 bytes.
BF16_CASES = {"E-series": E_SERIES, "dense K=V": DENSE, "mixture of experts": MOE | {"moe_intermediate_size": 24}}


@pytest.mark.parametrize("way", ["torch's products", "our kernels"])
@pytest.mark.parametrize("case", BF16_CASES)
def test_bfloat16_file(case, way, tmp_path, monkeypatch):
    """Loaded as stored and in float32.

    In bfloat16 the E-series is the reference bit for bit, in any chunks. Where keys are rebuilt from rounded values
    (K = V) they may differ in the last bit, and our own kernels round less often: the logits are then as close to the
    float32 ones as the reference's are.
    """
    if way == "torch's products":
        multiply_as_torch_does(monkeypatch)
    theirs = save_random(Gemma4ForCausalLM, Gemma4TextConfig(**BF16_CASES[case]), tmp_path, dtype=torch.bfloat16)
    exact = reload(Gemma4ForCausalLM, tmp_path, torch.float32)
    tokens = ids(17)
    reference, reference32 = run_reference(theirs, tokens), run_reference(exact, tokens)

    ours = load(tmp_path)
    assert ours.dtype == torch.bfloat16
    assert_same(ours.hidden_states(tokens)[0], reference.hidden_states[0][0], 0)  # the scale itself is rounded
    for logits in (ours.logits(tokens), run_chunked(ours, tokens, [3, 6, *[1] * 8])):
        if case == "E-series" and way == "torch's products":
            assert_same(logits, reference.logits[0], 0)
        else:
            error, reference_error = (x - reference32.logits[0] for x in (logits, reference.logits[0]))
            assert error.abs().mean() <= 1.1 * reference_error.abs().mean()
            largest = 1.3 if way == "torch's products" else 1.5  # of a few hundred errors, in another order of sums
            assert error.abs().max() <= largest * reference_error.abs().max()

    # The same file in float32: the embedding scale is then not rounded.
    ours = load(tmp_path, "float32")
    assert ours.dtype == torch.float32
    assert_same(ours.hidden_states(tokens)[0], reference32.hidden_states[0][0], 0)
    assert_same(ours.logits(tokens), reference32.logits[0], 5e-5)


@pytest.mark.parametrize("case", ["E-series", "dense K=V", "equal head sizes", "eleven layers of everything"])
def test_both_geometry_dialects(case, tmp_path):
    """`per_layer_config` as recent transformers write it, its keys zero-padded, and the scalar keys of the releases."""
    save_random(Gemma4ForCausalLM, Gemma4TextConfig(**CASES[case]), tmp_path)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert "per_layer_config" in raw
    assert "global_head_dim" not in raw
    tokens = random_ids(9)
    expected = load(tmp_path).logits(tokens)

    def pad_keys(config):
        config["per_layer_config"] = {key.zfill(2): value for key, value in config["per_layer_config"].items()}
        config["global_head_dim"] = 512  # must not matter beside per_layer_config

    def release(config):
        del config["per_layer_config"]
        for key in ("global_head_dim", "num_global_key_value_heads"):
            config[key] = CASES[case].get(key)

    for change in (pad_keys, release):
        rewrite(tmp_path, config=change)
        assert torch.equal(load(tmp_path).logits(tokens), expected)


def test_dead_tensors_of_consumer_layers(tmp_path):
    """The first uploads carry keys and values that no layer uses; neither their presence nor absence may matter."""
    theirs = save_random(Gemma4ForCausalLM, Gemma4TextConfig(**E_SERIES), tmp_path)
    tokens = random_ids(9)
    expected = run_reference(theirs, tokens).logits[0]

    def add_dead(tensors):
        for i in (4, 5, 6):
            for name, shape in (("k_proj", (8, 48)), ("v_proj", (8, 48)), ("k_norm", (8,)), ("v_norm", (8,))):
                tensors[f"model.layers.{i}.self_attn.{name}.weight"] = torch.randn(shape)
        tensors["model.rotary_emb.inv_freq"] = torch.randn(4)
        return tensors

    rewrite(tmp_path, tensors=add_dead)
    assert_same(load(tmp_path).logits(tokens), expected, 5e-5)


def test_unexpected_and_missing_tensors_are_named(tmp_path):
    save_random(Gemma4ForCausalLM, Gemma4TextConfig(**E_SERIES), tmp_path)
    name = "model.layers.0.self_attn.k_norm.weight"
    rewrite(tmp_path, tensors=lambda tensors: {k: v for k, v in tensors.items() if k != name})
    with pytest.raises(CheckpointError, match=name):
        load(tmp_path)
    rewrite(tmp_path, tensors=lambda tensors: tensors | {name: torch.ones(8), "model.layers.0.surprise": torch.ones(2)})
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.surprise"):
        load(tmp_path)


def test_padded_layer_numbers_in_tensor_names(tmp_path):
    theirs = save_random(Gemma4ForCausalLM, Gemma4TextConfig(**CASES["eleven layers of everything"]), tmp_path)
    rewrite(
        tmp_path,
        tensors=lambda tensors: {
            ".".join(part.zfill(2) if part.isdigit() else part for part in name.split(".")): tensor
            for name, tensor in tensors.items()
        },
    )
    assert_same(load(tmp_path).logits(random_ids(9)), run_reference(theirs, random_ids(9)).logits[0], 2e-4)


@pytest.mark.parametrize("eos", [1, [1, 6]])
def test_composite_file(eos, tmp_path):
    """Towers are ignored; text output equals the whole model's; ids that stand for an image or sound are refused."""
    config = Gemma4Config(
        text_config=dict(E_SERIES), vision_config=VISION, audio_config=None, eos_token_id=eos, **PLACEHOLDERS
    )
    theirs = save_random(Gemma4ForConditionalGeneration, config, tmp_path)
    ours = load(tmp_path)
    tokens = random_ids(17, vocab_size=min(PLACEHOLDERS.values()))
    assert_same(ours.logits(tokens), run_reference(theirs, tokens).logits[0], 5e-5)
    assert ours.config.eos_token_ids == ((1,) if eos == 1 else (1, 6))
    for refused in (96, 93, 90):
        with pytest.raises(ValueError, match=str(refused)):
            ours.logits([3, refused])


def test_composite_file_of_the_unified_model(tmp_path):
    text = {k: v for k, v in DENSE.items() if not k.endswith("per_layer_input")}
    config = Gemma4UnifiedConfig(text_config=text, audio_config=None, **PLACEHOLDERS)
    theirs = save_random(Gemma4UnifiedForConditionalGeneration, config, tmp_path)
    tokens = random_ids(17, vocab_size=min(PLACEHOLDERS.values()))
    assert_same(load(tmp_path).logits(tokens), run_reference(theirs, tokens).logits[0], 5e-5)
