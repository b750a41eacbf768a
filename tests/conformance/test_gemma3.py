"""Every branch of Gemma 3 against transformers, on tiny random models loaded from saved checkpoints."""

import copy
import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma3Config,
    Gemma3ForCausalLM,
    Gemma3ForConditionalGeneration,
    Gemma3TextConfig,
)

from sparing import CheckpointError
from sparing.config import parse_config
from sparing.kernels import dispatch
from sparing.models.batch import Row
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
from tests.kernel_sets import using
from tests.tiny import FULL, GEMMA3, SLIDING, random_ids, zero_centred_scale

s, f = SLIDING, FULL
BASE = GEMMA3 | {
    "vocab_size": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "num_hidden_layers": 4,
    "layer_types": [s, s, f, s],
}


def turning(sliding: dict | None = None, full: dict | None = None) -> dict:
    """rope_parameters of both kinds of layer, in which slow pairs turn within a short text."""
    return {
        s: {"rope_type": "default", "rope_theta": 30.0} | (sliding or {}),
        f: {"rope_type": "default", "rope_theta": 500.0} | (full or {}),
    }


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 8}
LLAMA3 = YARN | {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}
CASES = {
    "as released": BASE | {"final_logit_softcapping": None},
    "soft cap": BASE,
    "one key head": BASE | {"num_key_value_heads": 1},
    "as many key heads": BASE | {"num_key_value_heads": 4},
    "heads of a size of their own": BASE | {"head_dim": 20, "query_pre_attn_scalar": 31},
    "untied head": BASE | {"tie_word_embeddings": False},
    "biases": BASE | {"attention_bias": True},
    "window of 1": BASE | {"sliding_window": 1},
    "window of 2": BASE | {"sliding_window": 2},
    "window beyond everything": BASE | {"sliding_window": 200},
    "layer types by default": BASE | {"layer_types": None, "num_hidden_layers": 7},
    "all layers see all": BASE | {"layer_types": [f] * 4},
    "all layers have windows": BASE | {"layer_types": [s] * 4},
    "first layer sees all": BASE | {"layer_types": [f, s, s, s]},
    "plain rotation": BASE | {"rope_parameters": turning()},
    "linear rotation": BASE | {"rope_parameters": turning(full={"rope_type": "linear", "factor": 8.0})},
    "both scaled": BASE
    | {"rope_parameters": turning({"rope_type": "linear", "factor": 2.0}, LLAMA3)},
    "YaRN": BASE | {"rope_parameters": turning(full=YARN)},
    "large epsilon": BASE | {"rms_norm_eps": 0.1},
}  # fmt: skip


def ids(length: int, seed: int = 1) -> Tensor:
    return random_ids(length, seed, BASE["vocab_size"])


def save(config: dict, folder: Path, **options) -> Gemma3ForCausalLM:
    return save_random(Gemma3ForCausalLM, Gemma3TextConfig(**config), folder, 1, scale=zero_centred_scale, **options)


@cache
def pair(case: str):
    """(the reference, our model loaded from its checkpoint)"""
    with TemporaryDirectory() as folder:
        theirs = save(copy.deepcopy(CASES[case]), Path(folder))
        return theirs, load(Path(folder))


@cache
def both_references(case, length):
    """What the reference computes of `ids(length)` in float32 and in float64."""
    theirs = pair(case)[0]
    return run_reference(theirs, ids(length)), run_reference(copy.deepcopy(theirs).double(), ids(length))


def largest(x):
    return x.abs().max().item()


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernels", dispatch.available())
def test_hidden_states_and_logits(case, kernels):
    """Within the rounding of one order of sums, or three times what the reference is off by, against float64."""
    of_hidden, of_logits = (2e-5, 5e-5) if kernels == dispatch.REFERENCE else (8e-5, 1e-4)
    _, ours = pair(case)
    with using(kernels):
        for length in (1, 4, 5, 6, 17):
            tokens = ids(length)
            reference, exact = both_references(case, length)
            hidden = ours.hidden_states(tokens)
            assert len(hidden) == len(reference.hidden_states) == CASES[case]["num_hidden_layers"] + 1
            with torch.no_grad():  # the reference's last entry has the final norm applied
                hidden[-1] = ours.model.norm(hidden[-1])
            off = max(largest(a - b) for a, b in zip(reference.hidden_states, exact.hidden_states, strict=True))
            for mine, other in zip(hidden, reference.hidden_states, strict=True):
                assert_same(mine, other[0], max(of_hidden, 3 * off))
            off = largest(reference.logits - exact.logits)
            assert_same(ours.logits(tokens), reference.logits[0], max(of_logits, 3 * off))


@pytest.mark.parametrize("case", CASES)
def test_chunks_and_only_wanted_positions(case):
    theirs, ours = pair(case)
    tokens = ids(19)
    reference = run_reference(theirs, tokens).logits[0]
    for chunks in ([3, 6, *[1] * 10], [1] * 19, [12, 1, 1, 5]):
        assert_same(run_chunked(ours, tokens, chunks), reference, 1e-4)
    for wanted in (1, 4):
        hidden = ours.run([Row(tokens, ours.memory(), wanted=wanted)])
        assert_same(ours.head(hidden), reference[-wanted:], 1e-4)


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case]["sliding_window"] > 1])
def test_cached_logits_and_what_is_held(case):
    """The reference's own cache, step by step. With a window of 1 its cached run is wrong."""
    theirs, ours = pair(case)
    cache, memory = DynamicCache(config=theirs.config), ours.memory()
    for chunk in ids(13).split([3, 6, 1, 1, 1, 1]):
        with torch.no_grad():
            reference = theirs(input_ids=chunk[None], past_key_values=cache).logits[0]
        assert_same(ours.logits(chunk, memory), reference, 1e-4)
        for i in range(ours.config.num_hidden_layers):
            _, kv_heads, held, _ = cache.layers[i].keys.shape
            assert memory.entries(i).shape == (kv_heads, held)


def test_left_padded_reference_rows():
    """Rows that the reference pads on the left are, for us, rows of different lengths."""
    theirs, ours = pair("soft cap")
    rows = [ids(length, seed=length) for length in (11, 4, 7)]
    padded, mask = torch.zeros(3, 11, dtype=torch.long), torch.zeros(3, 11, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, 11 - len(row) :], mask[i, 11 - len(row) :] = row, 1
    with torch.no_grad():
        reference = theirs(input_ids=padded, attention_mask=mask, use_cache=False).logits
    logits = ours.head(ours.run([Row(row, ours.memory()) for row in rows])).split([len(row) for row in rows])
    for mine, other, row in zip(logits, reference, rows, strict=True):
        assert_same(mine, other[-len(row) :], 1e-4)


@pytest.mark.parametrize("way", ["torch's products", "our kernels"])
def test_bfloat16_file(way, tmp_path, monkeypatch):
    """Bit for bit the reference where products are torch's; else as close as it is.

    Of scores it rounds the product before it scales it: here by a power of two, as in all sizes but one.
    """
    if way == "torch's products":
        multiply_as_torch_does(monkeypatch)
    theirs = save(BASE | {"dtype": "bfloat16", "query_pre_attn_scalar": 16}, tmp_path, dtype=torch.bfloat16)
    tokens, exact = ids(17), reload(Gemma3ForCausalLM, tmp_path, torch.float32)
    reference, reference32 = run_reference(theirs, tokens), run_reference(exact, tokens)
    ours = load(tmp_path)
    assert ours.dtype == torch.bfloat16
    assert_same(ours.hidden_states(tokens)[0], reference.hidden_states[0][0], 0)  # the scale itself is rounded
    for logits in (ours.logits(tokens), run_chunked(ours, tokens, [3, 6, *[1] * 8])):
        if way == "torch's products":
            assert_same(logits, reference.logits[0], 0)
        error, reference_error = (x - reference32.logits[0] for x in (logits, reference.logits[0]))
        assert error.abs().mean() <= 1.1 * reference_error.abs().mean()
    ours = load(tmp_path, "float32")
    assert_same(ours.hidden_states(tokens)[0], reference32.hidden_states[0][0], 0)
    assert_same(ours.logits(tokens), reference32.logits[0], 5e-5)


# Spellings ----------------------------------------------------------------------------------------------------------


def test_older_spelling_of_the_rotations(tmp_path):
    """As released: two bases and a scaling of the layers that see all, beside each other; a pattern for the kinds."""
    save(CASES["linear rotation"] | {"layer_types": [s, s, f, s]}, tmp_path)
    expected = load(tmp_path).logits(ids(17))

    def older(config):
        del config["rope_parameters"], config["layer_types"], config["_sliding_window_pattern"]
        config |= {"rope_theta": 500.0, "rope_local_base_freq": 30.0, "sliding_window_pattern": 3}
        config["rope_scaling"] = {"rope_type": "linear", "factor": 8.0}
        config["cache_implementation"] = "hybrid"

    rewrite(tmp_path, older)
    theirs = reload(Gemma3ForCausalLM, tmp_path, torch.float32)
    assert_same(load(tmp_path).logits(ids(17)), run_reference(theirs, ids(17)).logits[0], 1e-4)
    assert_same(load(tmp_path).logits(ids(17)), expected, 0)


@pytest.mark.parametrize("prefix", ["model.language_model.", "language_model.model."])
def test_the_text_of_a_multimodal_checkpoint(prefix, tmp_path):
    """Its tower is left aside; the placeholder of an image is no token of a text."""
    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    vision |= {"image_size": 28, "patch_size": 14, "model_type": "siglip_vision_model"}
    skipped = ("model_type", "dtype", "final_logit_softcapping")  # the last one is not read by that class
    text = {key: value for key, value in BASE.items() if key not in skipped}
    config = Gemma3Config(
        text_config=text,
        vision_config=vision,
        image_token_index=96,
        boi_token_index=95,
        eoi_token_index=94,
        mm_tokens_per_image=4,
    )
    theirs = save_random(Gemma3ForConditionalGeneration, config, tmp_path, scale=zero_centred_scale)
    rewrite(
        tmp_path,
        tensors=lambda tensors: {
            name.replace("model.language_model.", prefix).replace("lm_head", "language_model.lm_head"): tensor
            for name, tensor in tensors.items()
        },
    )
    ours = load(tmp_path)
    tokens = random_ids(17, 1, 94)
    assert_same(ours.logits(tokens), run_reference(theirs, tokens).logits[0], 1e-4)
    assert ours.config.refused_token_ids == (96,)
    with pytest.raises(ValueError, match="96"):
        ours.logits([3, 96])


def test_what_a_released_config_leaves_out_is_what_transformers_takes():
    config, theirs = (
        parse_config({"model_type": "gemma3", "text_config": {"model_type": "gemma3_text"}}),
        Gemma3TextConfig(),
    )
    names = (
        "hidden_size intermediate_size vocab_size num_attention_heads num_key_value_heads head_dim "
        "query_pre_attn_scalar rms_norm_eps max_position_embeddings final_logit_softcapping tie_word_embeddings "
        "attention_bias bos_token_id pad_token_id"
    )
    for name in names.split():
        assert getattr(config, name) == getattr(theirs, name), name
    assert (list(config.kinds), config.window) == (theirs.layer_types, theirs.sliding_window)
    assert config.eos_token_ids == (theirs.eos_token_id,)
    for kind, rope in config.rope.items():
        assert rope.rope_theta == theirs.rope_parameters[kind]["rope_theta"]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"use_bidirectional_attention": True}, "use_bidirectional_attention is true .*an embedding model"),
        ({"attn_logit_softcapping": 50.0}, "attn_logit_softcapping is 50: .*set it to null"),
        ({"hidden_activation": "silu"}, "hidden_activation is 'silu', supported: 'gelu_pytorch_tanh'"),
        ({"layer_types": [s]}, "layer_types has 1 entries, num_hidden_layers is 4"),
        ({"layer_types": ["chunked_attention"] * 4}, "layer_types holds 'chunked_attention'"),
        ({"sliding_window": None}, "sliding_window is null"),
        ({"head_dim": 7}, "head_dim is 7: rotation pairs dimensions"),
        ({"num_key_value_heads": 3}, "4 is not a multiple of num_key_value_heads 3"),
        ({"query_pre_attn_scalar": 0}, "query_pre_attn_scalar is 0, expected a number above 0"),
        ({"rope_parameters": {"rope_type": "default"}}, "rope_parameters is .* expected an object with an entry"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}, "rope_type is 'dynamic', supported: 'default'"),
        ({"layer_types": None, "_sliding_window_pattern": 3}, "_sliding_window_pattern is 3, which hides tokens"),
        ({"altup_num_inputs": 4}, "altup_num_inputs is 4"),
    ],
)
def test_refusals_name_the_setting(change, reason):
    with pytest.raises(CheckpointError, match=reason):
        parse_config(json.loads(json.dumps(BASE | change)))
