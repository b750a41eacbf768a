"""`inspect`: what it says of whole, incomplete and damaged checkpoints."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from sparing.config import parse_config, planned_config
from sparing.config.released import RELEASED
from sparing.errors import CheckpointError
from sparing.inspection import inspect
from sparing.planning import plan
from tests.tiny import FULL, GEMMA, KEYS_ARE_VALUES, SLIDING, VOCAB

CONFIG = (
    GEMMA
    | KEYS_ARE_VALUES
    | {
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "global_head_dim": 16,
        "num_kv_shared_layers": 1,
        "max_position_embeddings": 256,
    }
)


def write(folder: Path, config: dict, tensors: dict[str, torch.Tensor] | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        save_file(tensors, folder / "model.safetensors")
    return folder


def zeros(config: dict) -> dict[str, torch.Tensor]:
    return {name: torch.zeros(shape) for name, (shape, _) in parse_config(config).tensors().items()}


def test_a_whole_checkpoint(tmp_path):
    found = inspect(write(tmp_path, CONFIG, zeros(CONFIG)))
    assert found.problems == ()
    assert found.tensors is not None
    assert found.tensors.dtypes == {"F32": len(zeros(CONFIG))}
    assert found.parameters == sum(t.numel() for name, t in zeros(CONFIG).items() if "layer_scalar" not in name)
    assert [layer.kind for layer in found.layers] == ["sliding", "value_only", "sliding", "shared"]
    assert [layer.shared_with for layer in found.layers] == [None, None, None, 1]
    assert [layer.nbytes for layer in found.layers] == [2 * 4 * 2 * 8 * 4, 1024 * 16 * 4, 2 * 4 * 2 * 8 * 4, 0]
    assert [layer.bits_per_coordinate for layer in found.layers] == [None, 16.0, None, None]  # values alone, of 32
    assert (found.vocabulary, found.chat_template, found.generation_config) == (None, False, {})


def test_names_of_multimodal_files_and_dead_tensors_are_understood(tmp_path):
    tensors = {name.replace("model.", "model.language_model.", 1): t for name, t in zeros(CONFIG).items()}
    tensors["model.vision_tower.patch.weight"] = torch.zeros(3)
    tensors["model.language_model.layers.3.self_attn.k_proj.weight"] = torch.zeros(3)
    assert inspect(write(tmp_path, CONFIG, tensors)).problems == ()


def test_missing_unexpected_and_misshapen_tensors(tmp_path):
    tensors = zeros(CONFIG)
    del tensors["model.norm.weight"]
    tensors["model.layers.0.self_attn.sinks"] = torch.zeros(4)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(24, 15)
    found = inspect(write(tmp_path, CONFIG, tensors)).tensors
    assert found is not None
    assert found.missing == ("model.norm.weight",)
    assert found.unexpected == ("model.layers.0.self_attn.sinks",)
    assert found.misshapen == ("model.layers.1.mlp.up_proj.weight: [24, 15], expected [24, 32]",)
    assert len(inspect(tmp_path).problems) == 3


def test_unknown_keys_and_generation_config_are_shown(tmp_path):
    write(tmp_path, CONFIG | {"rope_wobble": 3})
    (tmp_path / "generation_config.json").write_text(json.dumps({"top_k": 64, "transformers_version": "9.9"}))
    found = inspect(tmp_path)
    assert found.unknown_keys == {"rope_wobble": 3}
    text = found.table()
    assert "rope_wobble=3" in text
    assert "top_k=64" in text
    assert "9.9" not in text


def test_tokenizer_and_chat_template(tmp_path):
    write(tmp_path, CONFIG)
    vocabulary = {f"w{i}": i for i in range(VOCAB + 1)}
    Tokenizer(WordLevel(vocabulary, unk_token="w0")).save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "chat_template.jinja").write_text("{{ messages[0].content }}")
    found = inspect(tmp_path)
    assert (found.vocabulary, found.chat_template) == (VOCAB + 1, True)
    assert found.problems == (f"the tokenizer has {VOCAB + 1} tokens, config.json says {VOCAB}",)


def test_damaged_files_are_problems_not_failures(tmp_path):
    write(tmp_path, CONFIG)
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 64)
    (tmp_path / "tokenizer.json").write_text("{")
    found = inspect(tmp_path)
    assert found.tensors is None
    assert ["model.safetensors" in found.problems[0], "tokenizer.json" in found.problems[1]] == [True, True]


def test_a_config_that_is_not_supported_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="model_type is 'rnn'"):
        inspect(write(tmp_path, {"model_type": "rnn"}))


@pytest.mark.parametrize("name", RELEASED)
def test_released_models_are_described_without_files(name):
    found = inspect(name)
    assert found.tensors is None
    assert found.to_dict() == json.loads(json.dumps(found.to_dict()))
    assert len(found.layers) == planned_config(RELEASED[name]).num_hidden_layers


def test_equal_layers_in_a_row_are_one_line():
    lines = inspect("gemma-4-e2b").table().splitlines()
    assert any(line.split()[:3] == ["0-3", "sliding", "8"] for line in lines)
    assert any("layer 13" in line and line.split()[:2] == ["15-18", "shared"] for line in lines)


@pytest.mark.parametrize(
    ("kv", "bits"),
    [
        ("turboquant:4", 4.125),  # 2 bytes of scale for 128 numbers
        ("turboquant:k4v3", 3.625),
        ("int8", 8.125),
        ("triattention:1024", 1024 * (2 * 128 * 2 + 4) * 8 / (2 * 128 * 16000)),  # after a round, and positions
        ("dense", 16.0),
    ],
)
def test_real_bits_of_a_policy(kv, bits):
    """Everything is counted: what `plan` says of the same policy and context."""
    found = inspect("qwen3-8b", kv=kv, context=16000)
    assert {layer.bits_per_coordinate for layer in found.layers} == {bits}
    assert found.memory_bytes == plan("qwen3-8b", context=16000, kv=kv).memory_bytes
    assert f"{bits:.4g}" in found.table() and kv in found.table()
    assert found.to_dict()["memory_bytes"] == found.memory_bytes


def test_bits_count_what_is_not_a_code_yet():
    tail = inspect("qwen3-8b", kv="turboquant:4", context=63)
    assert {layer.bits_per_coordinate for layer in tail.layers} == {16.0}


def test_a_policy_the_model_cannot_have():
    with pytest.raises(ValueError, match="is not a memory policy"):
        inspect("qwen3-8b", kv="codes")
    with pytest.raises(ValueError, match="context is 0"):
        inspect("qwen3-8b", context=0)
