"""Settings of GGUF files: stretched rotations as llama.cpp reads them, what nobody reads, and what no model has."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Kind

import sparing
from sparing.checkpoint.gguf.file import open_gguf
from sparing.errors import CheckpointError
from sparing.inspection.report import inspect
from tests.checkpoint.gguf_files import write_gguf
from tests.checkpoint.test_gguf import LLAMA, convert, llama_model


def config_of(tmp_path, changes, tensors=None, architecture="llama"):
    tensors = {"token_embd.weight": torch.ones(5, 256)} if tensors is None else tensors
    return open_gguf(write_gguf(tmp_path / "m.gguf", architecture, LLAMA | changes, tensors)).config


@pytest.mark.parametrize(
    "changes",
    [
        {"rope.scaling.factor": 8.0},
        {"rope.scale_linear": 8.0},
        {"rope.scaling.factor": 8.0, "rope.scale_linear": 2.0},
        {"rope.scaling.type": "linear", "rope.scale_linear": 8.0, "rope.scaling.finetuned": True},
    ],
)
def test_a_factor_without_a_type_is_linear(tmp_path, changes):
    model = llama_model(rope_parameters={"rope_type": "linear", "factor": 8.0, "rope_theta": 10000.0})
    path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA | changes, convert(model))
    ids = torch.randint(0, 40, (30,), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        theirs = model(ids[None]).logits[0]
    torch.testing.assert_close(sparing.load(path, dtype="float32").logits(ids), theirs, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"rope.scaling.factor": 0.0}, None),
        ({"rope.scaling.type": "none", "rope.scaling.factor": 8.0}, None),
        ({"rope.scaling.type": "linear"}, None),
        ({"rope.scaling.yarn_ext_factor": -1.0, "rope.scaling.yarn_attn_factor": 1.0}, None),
        (
            {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0},
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_what_is_left_out_has_the_value_that_llama_cpp_gives_it(tmp_path, changes, expected):
    assert config_of(tmp_path, changes)["rope_scaling"] == expected


@pytest.mark.parametrize("kind", [Kind.F16, Kind.BF16, Kind.Q8_0])
def test_factors_of_any_type_stretch(tmp_path, kind):
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192, "rope_theta": 500000.0,
    }  # fmt: skip
    reference = LlamaConfig(hidden_size=256, num_attention_heads=4, rope_parameters=scaling)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](reference, "cpu")
    freqs = (500000.0 ** (-torch.arange(0, 64, 2) / 64) / theirs).numpy()
    raw = gguf.quants.quantize(freqs[None], kind).reshape(-1).view(np.uint8)
    tensors = {"token_embd.weight": torch.ones(5, 256), "rope_freqs.weight": (raw, kind)}
    config = config_of(tmp_path, {"rope.freq_base": 500000.0}, tensors)
    assert config["rope_scaling"] == {k: v for k, v in scaling.items() if k != "rope_theta"}
    with pytest.raises(CheckpointError, match="the two together are not supported"):
        config_of(tmp_path, {"rope.freq_base": 500000.0, "rope.scaling.factor": 2.0}, tensors)


@pytest.mark.parametrize(
    ("architecture", "projections"),
    [("llama", ("q", "k", "v")), ("llama", ("k",)), ("llama", ("q", "k", "v", "output"))],
)
def test_biases_that_a_file_leaves_out_are_zeros(tmp_path, architecture, projections):
    model = llama_model(attention_bias=True)
    for layer in model.model.layers:
        for name, projection in zip("qkvo", ("q_proj", "k_proj", "v_proj", "o_proj"), strict=True):
            if name not in [p[0] for p in projections]:
                getattr(layer.self_attn, projection).bias.data.zero_()
    tensors = {
        name: tensor
        for name, tensor in convert(model).items()
        if not name.endswith(".bias") or name.split(".")[2].removeprefix("attn_") in projections
    }
    path = write_gguf(tmp_path / "m.gguf", architecture, LLAMA, tensors)
    ids = torch.arange(20)
    with torch.no_grad():
        theirs = model(ids[None]).logits[0]
    torch.testing.assert_close(sparing.load(path, dtype="float32").logits(ids), theirs, atol=2e-4, rtol=1e-4)
    assert inspect(path).problems == ()
    assert sparing.plan(path, context=8).weight_bytes == sum(4 * parameter.numel() for parameter in model.parameters())


@pytest.mark.parametrize(
    "changes",
    [
        {"attention.causal": False}, {"logit_scale": 0.5}, {"residual_scale": 0.2}, {"embedding_scale": 12.0},
        {"attention.scale": 0.1}, {"attn_logit_softcapping": 50.0}, {"final_logit_softcapping": 30.0},
        {"attention.sliding_window": 16}, {"attention.clamp_kqv": 8.0}, {"attention.max_alibi_bias": 8.0},
        {"use_parallel_residual": True}, {"attention.value_length": 32}, {"rope.scaling.attn_factor": 1.5},
        {"rope.scaling.yarn_log_multiplier": 0.1}, {"rope.scaling.alpha": 1000.0}, {"nextn_predict_layers": 1},
        {"rope.scaling.yarn_ext_factor": 0.5}, {"expert_count": 4}, {"full_attention_interval": 4},
        {"attention.q_lora_rank": 8}, {"expert_weights_scale": 2.5},
    ],
)  # fmt: skip
def test_what_changes_results_and_is_not_read_is_refused(tmp_path, changes):
    with pytest.raises(CheckpointError, match=rf"{next(iter(changes)).replace('.', '.')}|mixture of experts"):
        config_of(tmp_path, changes)


def test_what_does_nothing_is_listed(tmp_path):
    neutral = {
        "attention.causal": True, "logit_scale": 1.0, "attention.sliding_window": 64, "attention.scale": 0.125,
        "final_logit_softcapping": 0.0, "pooling_type": 3, "expert_used_count": 0,
    }  # fmt: skip
    path = write_gguf(tmp_path / "m.gguf", "llama", LLAMA | neutral, convert(llama_model()))
    assert set(inspect(path).unknown_keys) >= {f"llama.{key}" for key in neutral}
    assert not {f"llama.{key}" for key in LLAMA} & set(inspect(path).unknown_keys)
    sparing.load(path)


HOSTILE = {
    "no blocks": ({"block_count": 0}, {}, "block_count is 0"),
    "too many blocks": ({"block_count": 2**31}, {}, "block_count is 2147483648"),
    "heads of nothing": ({"attention.key_length": 0}, {}, "key_length is 0"),
    "odd heads": ({"attention.key_length": 63}, {}, "key_length is 63"),
    "no heads": ({"attention.head_count": 0}, {}, "head_count is 0"),
    "standing still": ({}, {"rope_freqs.weight": torch.zeros(32)}, r"rope_freqs\.weight holds \[0\.0"),
    "no number": ({}, {"rope_freqs.weight": torch.full((32,), float("nan"))}, r"rope_freqs\.weight holds \[nan"),
    "a list of ends": ({"tokenizer.ggml.eos_token_id": [1]}, {}, r"eos_token_id \[1\] is not one of"),
    "an adapter": ({"general.type": "adapter"}, {}, "holds a 'adapter'"),
    "a flat table": ({}, {"token_embd.weight": torch.ones(5)}, "no token_embd.weight of two dimensions"),
    "half a row of pairs": ({}, {"blk.0.attn_q.weight": torch.ones(63, 256)}, "no 4 heads of pairs"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_what_no_model_has_is_refused(tmp_path, case):
    changes, tensors, reason = HOSTILE[case]
    with pytest.raises(CheckpointError, match=reason):
        config_of(tmp_path, changes, {"token_embd.weight": torch.ones(5, 256)} | tensors)


def test_an_end_of_32_ones_is_none(tmp_path):
    config = config_of(tmp_path, {"tokenizer.ggml.eos_token_id": 2**32 - 1, "tokenizer.ggml.bos_token_id": 2**32 - 1})
    assert "eos_token_id" not in config
    assert "bos_token_id" not in config
