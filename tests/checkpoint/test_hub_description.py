"""`plan` and `inspect` of a model on the hub: its weights stay there."""

import json

import pytest
import torch

import sparing
from sparing.checkpoint import open_checkpoint, save_safetensors
from sparing.config import parse_config
from sparing.errors import CheckpointError
from sparing.inspection import inspect
from sparing.weights.stored import stored_weights
from tests.checkpoint.hub_server import Hub, serving
from tests.checkpoint.tokenizer_files import write_folder
from tests.tiny import LLAMA

CONFIG = LLAMA | {"vocab_size": 600, "hidden_size": 128, "intermediate_size": 96, "max_position_embeddings": 64}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    path = tmp_path / "model.safetensors"
    tensors = {name: torch.randn(shape) for name, (shape, _) in parse_config(CONFIG).tensors().items()}
    save_safetensors(path, tensors)
    write_folder(tmp_path / "tokenizer")
    files = {
        "config.json": json.dumps(CONFIG).encode(),
        "model.safetensors": path.read_bytes(),
        "tokenizer.json": (tmp_path / "tokenizer" / "tokenizer.json").read_bytes(),
    }
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    with serving(Hub(files)) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        yield running


def fetched(hub: Hub) -> set[str]:
    return {name for method, name, _ in hub.requests if method == "GET"}


def test_a_plan_needs_the_config_alone(hub):
    plan = sparing.plan("org/model", context=8)
    assert plan.model == "model" and plan.weight_bytes == sparing.plan(CONFIG, context=8).weight_bytes
    assert fetched(hub) == {"config.json"}


def test_inspecting_reads_the_headers_of_the_weights_and_the_tokenizer(hub):
    found = inspect("org/model")
    assert found.tensors is not None and not found.problems and found.vocabulary
    assert found.tensors.dtypes == {"F32": len(parse_config(CONFIG).tensors())}
    assert fetched(hub) == {"config.json", "tokenizer.json", "model.safetensors"}
    assert hub.sent["model.safetensors"] <= 100_001 < len(hub.files["model.safetensors"])
    weights = stored_weights(open_checkpoint("org/model", weights=False))
    with pytest.raises(CheckpointError, match=r"org/model: .* was not downloaded; load the model"):
        weights.read(weights.names()[0])


def test_a_plan_of_a_quantised_model_reads_the_headers(hub, tmp_path):
    tensors = {name: torch.randn(shape) for name, (shape, _) in parse_config(CONFIG).tensors().items()}
    for name in [name for name in tensors if "proj" in name]:
        tensors[name] = tensors[name].clamp(-1, 1).mul(100).to(torch.int8)
        tensors[f"{name}_scale"] = torch.rand(len(tensors[name]), 1)
    save_safetensors(tmp_path / "packed.safetensors", tensors)
    hub.files["model.safetensors"] = (tmp_path / "packed.safetensors").read_bytes()
    hub.files["config.json"] = json.dumps(CONFIG | {"quantization_config": {"quant_method": "x"}}).encode()
    plan = sparing.plan("org/model", context=8)
    dense = sum(tensor.nbytes for name, tensor in tensors.items() if "proj" not in name)
    packed = sum(tensor.nbytes for name, tensor in tensors.items() if "proj" in name)
    assert plan.weight_bytes == dense + packed
    assert "tokenizer.json" not in fetched(hub)


def test_what_was_looked_at_is_downloaded_once_and_the_rest_when_it_is_loaded(hub):
    sparing.plan("org/model", context=8)
    before = len(hub.requests)
    sparing.plan("org/model", context=8)
    assert len(hub.requests) == before
    assert sparing.load("org/model", device="cpu").logits([1, 2]).shape == (2, 600)
    assert inspect("org/model").tensors is not None


def test_the_description_in_the_cache_is_not_enough_to_load(hub, monkeypatch):
    sparing.plan("org/model", context=8)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert sparing.plan("org/model", context=8).parameters
    with pytest.raises(CheckpointError, match="cannot be reached and the local cache is not complete"):
        sparing.load("org/model")


def test_a_model_without_safetensors(hub):
    del hub.files["model.safetensors"]
    assert any("safetensors files are missing" in problem for problem in inspect("org/model").problems)
