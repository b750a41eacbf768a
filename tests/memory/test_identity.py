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
    for name in ("entries_digest", "identity"):
        twin.__dict__.pop(name, None)
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


@names
def test_a_memory_of_another_type_is_refused(name):
    """The weights are the same, in another type; entries would be converted as they are read."""
    half = copy.deepcopy(model(name)).bfloat16()
    with pytest.raises(ValueError, match=r"in float32, here .* in bfloat16"):
        half.logits(random_ids(2), filled(name, 5))
    with pytest.raises(ValueError, match=r"in bfloat16, here .* in float32"):
        model(name).logits(random_ids(2), half.memory())
    assert half.logits(random_ids(2), half.memory()).shape[0] == 2


@names
def test_every_weight_that_entries_depend_on_tells_models_apart(name):
    twin = copy.deepcopy(model(name))
    roles = twin.roles()
    for weight, tensor in [*twin.named_parameters(), *twin.named_buffers()]:
        makes_entries = weight in roles and roles[weight].kind not in (None, "head")
        before = tensor.clone()
        tensor.copy_(tensor.flip(-1) if tensor.dtype == torch.int64 else 1.5 * tensor)
        twin.__dict__.pop("entries_digest", None)
        assert (twin.entries_digest != model(name).entries_digest) == makes_entries, weight
        tensor.copy_(before)


def test_the_same_weights_in_another_type_have_the_same_digest():
    half = copy.deepcopy(model("dense")).bfloat16()
    half.__dict__.pop("entries_digest", None)
    assert half.entries_digest == model("dense").entries_digest
    assert len({model(name).entries_digest for name in CONFIGS}) == len(CONFIGS)


def test_a_canvas_over_a_memory_of_other_weights_is_refused():
    with pytest.raises(ValueError, match="other weights"):
        another("denoiser").denoise(random_ids(8), filled("denoiser", 5))
