"""A memory knows whose entries it holds: another model's is refused, in a file too."""

import copy

import pytest
import torch

from sparing.errors import CheckpointError
from sparing.models.batch import Row
from tests.tiny import CONFIGS, filled, model, random_ids

names = pytest.mark.parametrize("name", CONFIGS)


def another(name: str):
    """The same architecture with other weights."""
    twin = copy.deepcopy(model(name))
    twin.__dict__.pop("entries_digest", None)
    generator = torch.Generator().manual_seed(1)
    for parameter in twin.parameters():
        parameter.mul_(1 + 0.1 * torch.rand(parameter.shape, generator=generator))
    return twin


@names
def test_a_memory_of_other_weights_is_refused(name, tmp_path):
    memory, other = filled(name, 5), another(name)
    with pytest.raises(ValueError, match="other weights"):
        other.logits(random_ids(2), memory)
    with pytest.raises(ValueError, match="other weights"):
        other.run([Row(random_ids(2), other.memory()), Row(random_ids(2), memory)])
    assert memory.length == 5 and memory.staged == 0
    memory.save(tmp_path / "memory.safetensors")
    with pytest.raises(CheckpointError, match="model is"):
        other.load_memory(tmp_path / "memory.safetensors")
    assert model(name).load_memory(tmp_path / "memory.safetensors").length == 5


def test_the_same_weights_in_another_type_are_the_same_model():
    half = copy.deepcopy(model("dense")).bfloat16()
    half.__dict__.pop("entries_digest", None)
    assert half.entries_digest == model("dense").entries_digest
    assert len({model(name).entries_digest for name in CONFIGS}) == len(CONFIGS)


def test_a_canvas_over_a_memory_of_other_weights_is_refused():
    with pytest.raises(ValueError, match="other weights"):
        another("denoiser").denoise(random_ids(8), filled("denoiser", 5))
