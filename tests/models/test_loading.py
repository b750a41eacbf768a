"""`sparing.load`: arguments, refusals, and the per-layer embedding table left in its file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import sparing
from sparing.config import ARCHITECTURES
from tests.tiny import CONFIGS, saved


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny E-series model: per-layer inputs and shared keys and values."""
    return saved(CONFIGS["shared"], tmp_path_factory.mktemp("gemma4"))


def test_a_mapped_embedding_table_gives_the_same_logits(folder: Path) -> None:
    tokens = [3, 1, 4, 1, 5, 9, 2, 6]
    copied, mapped = sparing.load(folder), sparing.load(folder, map_embeddings=True)
    assert torch.equal(copied.logits(tokens), mapped.logits(tokens))


def test_a_mapped_table_keeps_its_stored_type(folder: Path) -> None:
    model = sparing.load(folder, dtype="bfloat16", map_embeddings=True)
    kinds = {name: tensor.dtype for name, tensor in model.named_parameters()}
    assert kinds.pop("model.embed_tokens_per_layer.weight") == torch.float32
    assert set(kinds.values()) == {torch.bfloat16}
    assert model.logits([1, 2, 3]).isfinite().all()


@pytest.mark.parametrize(("dtype", "expected"), [("auto", torch.float32), ("bfloat16", torch.bfloat16)])
def test_dtype(folder: Path, dtype: str, expected: torch.dtype) -> None:
    assert sparing.load(folder, dtype=dtype).dtype == expected


def test_bad_arguments_name_the_way_out(folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype='float23' is not known, use auto, float32, bfloat16, float16"):
        sparing.load(folder, dtype="float23")
    with pytest.raises(ValueError, match="weights='int3' is not known"):
        sparing.load(folder, weights="int3")


@pytest.mark.parametrize("device", ["nonsense", "cuda:99", "meta", "", 1.5])
def test_a_device_that_is_not_there_lists_those_that_are(device) -> None:
    with pytest.raises(ValueError, match=rf"^device='{device}' is not there, use auto, cpu"):
        sparing.load("org/not-asked-for", device=device)


def test_an_unsupported_architecture_lists_the_supported_ones(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mamba9"}))
    with pytest.raises(sparing.CheckpointError) as error:
        sparing.load(tmp_path)
    assert "'mamba9'" in str(error.value)
    assert all(name in str(error.value) for name in ARCHITECTURES)


def test_a_contradictory_config_is_named(folder: Path, tmp_path: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"] = config["layer_types"][:-1]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(sparing.CheckpointError, match="layer_types has 5 entries, num_hidden_layers is 6"):
        sparing.load(tmp_path)


def test_a_model_does_not_train_unasked(folder: Path) -> None:
    model = sparing.load(folder)
    assert not model.training
    assert not any(parameter.requires_grad for parameter in model.parameters())
