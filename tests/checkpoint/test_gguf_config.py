"""The config that a GGUF header stands for: read back from models that were written as llama.cpp writes them."""

import copy
import math

import gguf
import pytest
import torch

import sparing
from sparing.checkpoint.gguf.file import open_gguf
from sparing.errors import CheckpointError
from tests import tiny
from tests.checkpoint.gguf_files import gguf_name, write_gguf
from tests.checkpoint.test_gguf import LLAMA


def config_of(tmp_path, changes, tensors=None):
    tensors = {"token_embd.weight": torch.ones(5, 256)} if tensors is None else tensors
    return open_gguf(write_gguf(tmp_path / "m.gguf", "llama", LLAMA | changes, tensors)).config


def test_float32_settings_come_back_as_the_decimals_they_were(tmp_path):
    config = config_of(tmp_path, {"attention.layer_norm_rms_epsilon": 1e-5, "rope.freq_base": 500000.0})
    assert config["rms_norm_eps"] == 1e-5
    assert config["rope_theta"] == 500000.0
    assert config["head_dim"] == 64


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({}, None),
        ({"rope.scaling.type": "none"}, None),
        ({"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0, "rope.scaling.original_context_length": 32},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32},
        ),
        (
            {
                "rope.scaling.type": "yarn",
                "rope.scaling.factor": 2.0,
                "rope.scaling.original_context_length": 32,
                "rope.scaling.attn_factor": 0.5,
                "rope.scaling.yarn_beta_fast": 16.0,
            },
            {
                "rope_type": "yarn",
                "factor": 2.0,
                "original_max_position_embeddings": 32,
                "beta_fast": 16.0,
                "attention_factor": 0.5 * (0.1 * math.log(2.0) + 1.0),
            },
        ),
    ],
)
def test_rope_scaling(tmp_path, changes, expected):
    assert config_of(tmp_path, changes)["rope_scaling"] == expected


@pytest.mark.parametrize("factor", [8.0, 32.0])
def test_llama_3_stretching_is_recognised_from_its_factors(tmp_path, factor):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "factor": factor, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    reference = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=scaling)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](reference, "cpu")
    plain = 500000.0 ** (-torch.arange(0, 64, 2) / 64)
    tensors = {"token_embd.weight": torch.ones(5, 256), "rope_freqs.weight": plain / theirs}
    config = config_of(tmp_path, {"rope.freq_base": 500000.0}, tensors)
    assert config["rope_scaling"] == {k: v for k, v in scaling.items() if k != "rope_theta"}
    tensors["rope_freqs.weight"][10] *= 1.1
    with pytest.raises(CheckpointError, match=r"not Llama 3\.1's stretching"):
        config_of(tmp_path, {"rope.freq_base": 500000.0}, tensors)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"rope.scaling.type": "longrope"}, "rope scaling 'longrope' is not supported"),
        ({"expert_count": 8}, "mixture of experts is not supported"),
        ({"rope.dimension_count": 32}, "partial rotation is not supported"),
        ({"block_count": "two"}, r"llama\.block_count is 'two', must be a count"),
        ({"attention.layer_norm_rms_epsilon": -1.0}, "must be a positive number"),
        ({"attention.head_count": [4, 4]}, r"head_count is \[4, 4\], must be a count"),
    ],
)
def test_what_is_not_understood_is_refused(tmp_path, changes, reason):
    with pytest.raises(CheckpointError, match=reason):
        config_of(tmp_path, changes)


def test_a_file_without_a_vocabulary_is_no_language_model(tmp_path):
    with pytest.raises(CheckpointError, match="holds no language model"):
        config_of(tmp_path, {}, {"output_norm.weight": torch.ones(256)})


def test_ends_of_text_and_sampling_become_a_generation_config(tmp_path):
    tokens = ["a", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "b"]
    metadata = LLAMA | {
        "tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.token_type": [1, 3, 3, 1, 1],
        "tokenizer.ggml.eos_token_id": 1, "general.sampling.temp": 0.7, "general.sampling.top_k": 64,
    }  # fmt: skip
    tensors = {"token_embd.weight": torch.ones(5, 256)}
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", "llama", metadata, tensors))
    expected = {"temperature": 0.7, "top_k": 64, "do_sample": True, "eos_token_id": [1, 2]}
    assert checkpoint.generation_config == expected
    assert checkpoint.eos_ids == (1, 2)


GEMMA3 = {"hidden_size": 32, "head_dim": 12, "query_pre_attn_scalar": 12, "max_position_embeddings": 256}
SECOND = ["sliding_attention", "full_attention"] * 2
GEMMA3_FILES = {  # what a model says -> what its file says
    "every sixth layer sees all": ({"num_hidden_layers": 7}, {}),
    "every second": ({"layer_types": SECOND}, {"attention.sliding_window_pattern": 2}),
    "a list of layers": (
        {"layer_types": ["full_attention", "sliding_attention", "sliding_attention", "full_attention"]},
        {"attention.sliding_window_pattern": [False, True, True, False]},
    ),
    "the larger sizes": (
        {"rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
            "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
        }},
        {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0},
    ),
    "another rotation of windows": (
        {"rope_parameters": {
            "sliding_attention": {"rope_type": "default", "rope_theta": 500.0},
            "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
        }},
        {"rope.freq_base_swa": 500.0},
    ),
    "a soft cap": ({"final_logit_softcapping": 20.0}, {"final_logit_softcapping": 20.0}),
    "the 27B": ({"num_hidden_layers": 62, "query_pre_attn_scalar": 8, "intermediate_size": 8}, {}),
}  # fmt: skip


def gemma3_model(changes):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    settings = tiny.GEMMA3 | GEMMA3 | {"num_hidden_layers": 4, "final_logit_softcapping": None} | changes
    model = Gemma3ForCausalLM(Gemma3TextConfig(**copy.deepcopy(settings))).eval()
    tiny.randomise(model, 0, tiny.zero_centred_scale)
    return model, settings


def gemma3_file(path, model, settings, changes):
    """A Gemma 3 as llama.cpp's converter writes it: norms with the 1 that the model adds."""
    metadata = {
        "context_length": 256, "embedding_length": 32, "block_count": settings["num_hidden_layers"],
        "feed_forward_length": settings["intermediate_size"], "attention.head_count": 4, "attention.head_count_kv": 2,
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 12, "attention.value_length": 12,
        "attention.sliding_window": settings["sliding_window"], "rope.freq_base": 1000000.0,
    } | changes  # fmt: skip
    tensors = {
        gguf_name(gguf.MODEL_ARCH.GEMMA3, settings["num_hidden_layers"], name): tensor + name.endswith("norm.weight")
        for name, tensor in model.state_dict().items()
        if name != "lm_head.weight"
    }
    return write_gguf(path, "gemma3", metadata, tensors)


@pytest.mark.parametrize("variant", GEMMA3_FILES)
def test_a_gemma_3_comes_back(tmp_path, variant):
    """Its tensors, its config, and what it computes."""
    from transformers import Gemma3TextConfig

    said, written = GEMMA3_FILES[variant]
    model, settings = gemma3_model(said)
    path = gemma3_file(tmp_path / "m.gguf", model, settings, written)
    checkpoint = open_gguf(path)
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert set(checkpoint.files.names()) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(checkpoint.files.read(name), tensor, rtol=0, atol=2e-7)
        assert checkpoint.files.is_mapped(name) is not name.endswith("norm.weight")
    config = checkpoint.config
    for key, value in settings.items():
        assert key in ("layer_types", "model_type", "dtype", "bos_token_id", "eos_token_id") or config[key] == value, (
            key
        )
    again = Gemma3TextConfig(**{key: value for key, value in config.items() if key != "model_type"})
    assert (again.layer_types, again.rope_parameters) == (model.config.layer_types, model.config.rope_parameters)
    ours = sparing.load(path, device="cpu")
    tokens = tiny.random_ids(13)
    with torch.no_grad():
        theirs = model(tokens[None]).logits[0]
    torch.testing.assert_close(ours.logits(tokens), theirs, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        (
            {"attention.sliding_window_pattern": [True]},
            r"sliding_window_pattern must be a count, or 4 of true or false",
        ),
        ({"rope.scaling.type": "yarn", "rope.scaling.factor": 2.0}, "gemma3 is supported with linear scaling"),
        ({"attention.causal": False}, r"attention\.causal is False, which says what a token sees"),
        ({"attention.scale": 0.5}, r"attention\.scale is 0\.5, which scales numbers"),
        ({"attn_logit_softcapping": 50.0}, r"attn_logit_softcapping is 50\.0, which caps numbers"),
    ],
)
def test_a_gemma_3_that_is_not_understood_is_refused(tmp_path, changes, reason):
    model, settings = gemma3_model({})
    with pytest.raises(CheckpointError, match=reason):
        open_gguf(gemma3_file(tmp_path / "m.gguf", model, settings, changes))


def test_a_gemma_3_without_windows_sees_all(tmp_path):
    model, settings = gemma3_model({})
    config = open_gguf(gemma3_file(tmp_path / "m.gguf", model, settings, {"attention.sliding_window": 0})).config
    assert set(config["layer_types"]) == {"full_attention"} and config["sliding_window"] is None


GEMMA4 = {
    "dense": {},
    "shared": {
        "num_kv_shared_layers": 2, "use_double_wide_mlp": True, "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 32,
    },
    "experts": {
        "attention_k_eq_v": True, "num_global_key_value_heads": 1, "enable_moe_block": True, "num_experts": 4,
        "top_k_experts": 2, "moe_intermediate_size": 12,
    },
}  # fmt: skip


def gemma4_model(changes):
    from transformers import Gemma4ForCausalLM, Gemma4TextConfig

    settings = {
        "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 8, "global_head_dim": 16, "sliding_window": 8, "vocab_size": 32,
        "layer_types": ["sliding_attention", "full_attention"] * 2, "hidden_size_per_layer_input": 0,
        "final_logit_softcapping": 30.0, "max_position_embeddings": 256,
    } | changes  # fmt: skip
    model = Gemma4ForCausalLM(Gemma4TextConfig(**settings))
    for tensor in model.state_dict().values():
        tensor.normal_()
    return model, settings


def gemma4_file(path, model, settings, split_experts, held=lambda name, tensor: tensor):
    """A Gemma 4 as llama.cpp's converter writes it. held: what a tensor of GGUF's name becomes in the file."""
    layers = settings["num_hidden_layers"]
    sliding = [kind == "sliding_attention" for kind in settings["layer_types"]]
    shared = settings.get("num_kv_shared_layers", 0)
    wide = settings.get("use_double_wide_mlp", False)
    width = settings["intermediate_size"]
    widths = [width * (2 if i >= layers - shared else 1) for i in range(layers)]
    ple = settings["hidden_size_per_layer_input"]
    metadata = {
        "context_length": 256, "embedding_length": 32, "block_count": layers,
        "feed_forward_length": widths if wide else width,
        "attention.head_count": 4,
        "attention.head_count_kv": [2 if s else 1 for s in sliding] if "num_global_key_value_heads" in settings else 2,
        "attention.layer_norm_rms_epsilon": 1e-6, "attention.key_length": 16, "attention.key_length_swa": 8,
        "attention.sliding_window": 8, "attention.sliding_window_pattern": sliding,
        "attention.shared_kv_layers": shared, "embedding_length_per_layer_input": ple,
        "rope.freq_base": 1000000.0, "rope.freq_base_swa": 10000.0, "final_logit_softcapping": 30.0,
    }  # fmt: skip
    if settings.get("enable_moe_block"):
        metadata |= {
            "expert_count": 4,
            "expert_used_count": 2,
            "expert_feed_forward_length": settings["moe_intermediate_size"],
        }
    tensors: dict = {"rope_freqs.weight": torch.tensor([1.0] * 2 + [1e30] * 6)}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue
        layer = name.split(".")[2] if ".layers." in name else ""
        if name.endswith("router.scale"):
            tensors[f"blk.{layer}.ffn_gate_inp.scale"] = tensor
        elif name.endswith("router.per_expert_scale"):
            tensors[f"blk.{layer}.ffn_down_exps.scale"] = tensor
        elif split_experts and name.endswith("experts.gate_up_proj"):
            half = tensor.shape[1] // 2
            tensors[f"blk.{layer}.ffn_gate_exps.weight"] = tensor[:, :half]
            tensors[f"blk.{layer}.ffn_up_exps.weight"] = tensor[:, half:]
        else:
            suffixed = name if name.endswith(".weight") else f"{name}.weight"
            tensors[gguf_name(gguf.MODEL_ARCH.GEMMA4, layers, suffixed)] = tensor
    return write_gguf(path, "gemma4", metadata, {name: held(name, tensor) for name, tensor in tensors.items()})


@pytest.mark.parametrize("split_experts", [False, True])
@pytest.mark.parametrize("variant", GEMMA4)
def test_a_gemma_4_comes_back(tmp_path, variant, split_experts):
    from transformers import Gemma4TextConfig

    model, settings = gemma4_model(GEMMA4[variant])
    checkpoint = open_gguf(gemma4_file(tmp_path / "m.gguf", model, settings, split_experts))
    expected = {name: tensor for name, tensor in model.state_dict().items() if name != "lm_head.weight"}
    assert set(checkpoint.files.names()) == set(expected)
    for name, tensor in expected.items():
        assert checkpoint.files.shape(name) == tuple(tensor.shape), name
        assert torch.equal(checkpoint.files.read(name), tensor), name
    config = checkpoint.config
    assert config["model_type"] == "gemma4_text"
    for key, value in settings.items():
        assert config.get(key) == value, key
    again = Gemma4TextConfig(**{key: value for key, value in config.items() if key != "model_type"})
    assert again.rope_parameters == model.config.rope_parameters
    assert again.tie_word_embeddings == model.config.tie_word_embeddings


@pytest.mark.parametrize(
    ("tokens", "named", "ends"),
    [
        (["a", "<|end|>", "<end_of_turn>"], {}, [1, 2]),
        (["a", "b", "c", "d"], {"eos": 3, "eot": 1, "eom": 2}, [3, 1, 2]),
        (["a", "b", "c", "d"], {"fim_pad": 1, "fim_rep": 2, "fim_sep": 3}, [1, 2, 3]),
        (["<|end|>", "<|return|>", "<|call|>"], {}, [1, 2]),
        (["</s>", "<|tool_response>", "<eos>", "<turn|>"], {"eos": 2}, [2, 3, 1]),
        (["a", "b"], {"eos": 2**32 - 1}, None),
    ],
)
def test_ends_of_text_are_those_of_llama_cpp(tmp_path, tokens, named, ends):
    metadata = LLAMA | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens}
    metadata |= {"tokenizer.ggml.token_type": [3] * len(tokens)}
    metadata |= {f"tokenizer.ggml.{name}_token_id": i for name, i in named.items()}
    tensors = {"token_embd.weight": torch.ones(len(tokens), 256)}
    checkpoint = open_gguf(write_gguf(tmp_path / "m.gguf", "llama", metadata, tensors))
    assert checkpoint.generation_config.get("eos_token_id") == ends


def test_tokens_that_a_file_suppresses_are_in_its_generation_config(tmp_path):
    key = "tokenizer.ggml.suppress_tokens"
    metadata = LLAMA | {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": ["a", "b"]}
    tensors = {"token_embd.weight": torch.ones(2, 256)}
    path = tmp_path / "m.gguf"
    assert open_gguf(write_gguf(path, "llama", metadata | {key: [1, 9]}, tensors)).generation_config == {
        "suppress_tokens": [1]
    }
    with pytest.raises(CheckpointError, match=r"suppress_tokens is \['x'\], must be a list of ids"):
        open_gguf(write_gguf(path, "llama", metadata | {key: ["x"]}, tensors))
