"""Compressed memories: bytes as planned, and as released; any cut to the bit; files that are damaged."""

import re

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparing.config.deepseek_v4_dialects import CSA, HCA
from sparing.errors import CheckpointError
from sparing.models.batch import Row
from sparing.planning.memory import memory_by_kind
from tests.tiny import COMPRESSED, built, random_ids, snapshot

WIDE = COMPRESSED | {"head_dim": 64, "partial_rotary_factor": 0.25, "index_head_dim": 32}  # as released codes need


@pytest.fixture(scope="module")
def model():
    return built(WIDE)


@pytest.mark.parametrize("kv", ["dense", "released"])
def test_bytes_are_those_of_the_plan(model, kv):
    memory = model.memory(kv)
    for length in (1, 3, 4, 5, 8, 31, 64):
        model.logits(random_ids(length - memory.length), memory)
        assert memory.nbytes == sum(memory_by_kind(model.memory_plan(kv).specs, length, 4).values())


def test_bytes_are_those_of_the_plan_where_an_entry_stands_for_one_token():
    model = built(WIDE | {"compress_rates": {CSA: 1, HCA: 1}})
    for kv in ("dense", "released"):
        memory = model.memory(kv)
        model.logits(random_ids(9), memory)
        by_kind = memory_by_kind(model.memory_plan(kv).specs, 9, 4)
        assert memory.nbytes == sum(by_kind.values())
        assert "sparse" not in by_kind


def test_released_entries_have_the_bytes_of_the_release(model):
    spec = model.config.memory_specs()[2]
    assert (spec.released.entry_bytes(512, 64), spec.released.key_bytes(128)) == (584, 68)


@pytest.mark.parametrize("kv", ["dense", "released"])
def test_every_cut_leaves_the_same_bits(model, kv):
    """Entries depend on hidden states, whose products round differently with the number of rows: those of a pass token
    by token are compared with those of other cuts into at most eight."""
    tokens = random_ids(40)
    states = []
    for cuts in ([1] * 40, [2, 1, 3, 4, 8, 8, 7, 7], [5, 3, 8, 8, 8, 8]):
        memory = model.memory(kv)
        for chunk in tokens.split(cuts):
            model.logits(chunk, memory)
        states.append(snapshot(memory))
    for other in states[1:]:
        for mine, theirs in zip(states[0], other, strict=True):
            for name, tensor in mine[3].items():
                close = torch.allclose(tensor.float(), theirs[3][name].float(), atol=1e-4, equal_nan=True)
                assert close or kv == "released", name  # codes may fall on either side of a middle


def test_released_entries_are_near_the_others(model):
    tokens = random_ids(60)
    memories = model.memory(), model.memory("released")
    exact, coded = (model.logits(tokens, memory) for memory in memories)
    assert 0 < (exact - coded).abs().mean() < 0.4
    assert memories[1].nbytes < 0.6 * memories[0].nbytes


@pytest.mark.parametrize("kv", ["dense", "released"])
def test_a_partial_commit_is_a_text_of_that_length(model, kv):
    tokens = random_ids(50)
    memory, plain = model.memory(kv), model.memory(kv)
    at = 0
    for kept, more in ((9, 4), (0, 3), (1, 7), (2, 0), (13, 20), (25, 0)):
        model.run([Row(torch.cat([tokens[at : at + kept], random_ids(more, seed=more)]), memory)])
        memory.commit(kept)
        at += kept
    for chunk in tokens.split([9, 1, 2, 13, 25]):
        model.run([Row(chunk, plain)])
        plain.commit(len(chunk))
    for mine, theirs in zip(snapshot(memory), snapshot(plain), strict=True):
        assert mine[:3] == theirs[:3]
        for name, tensor in mine[3].items():
            if tensor.is_floating_point():
                torch.testing.assert_close(tensor, theirs[3][name], rtol=1e-4, atol=1e-4)


def test_positions_of_what_is_held(model):
    memory = model.memory()
    model.logits(random_ids(21), memory)
    window = list(range(16, 21))
    assert memory.entries(0).tolist() == [window]
    assert memory.entries(1).tolist() == [[0, 8, *window]]
    assert memory.entries(2).tolist() == [[0, 4, 8, 12, 16, *window]]


@pytest.mark.parametrize("kv", ["dense", "released"])
def test_a_saved_memory_goes_on(model, kv, tmp_path):
    memory = model.memory(kv)
    model.logits(random_ids(23), memory)
    memory.save(tmp_path / "memory")
    again = model.load_memory(tmp_path / "memory", kv)
    more = random_ids(9, seed=4)
    assert torch.equal(model.logits(more, again), model.logits(more, memory))


DAMAGE = {
    "2.compressed": (lambda t: t[:-1], "compressed holds 4 entries, 23 tokens leave 5"),
    "0.window": (lambda t: torch.cat([t, t]), "window holds 10 entries, 23 tokens leave 5"),
    "2.keys": (lambda t: t.index_fill(0, torch.tensor([1]), float("nan")), "keys holds numbers that are not finite"),
    "1.compressed_state": (lambda t: -t.abs(), "compressed_state holds numbers that no softmax leaves"),
    "2.keys_state": (lambda t: t[:1], "keys_state is float32 [1, 3, 32], expected float32 [2, 3, 32]"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damaged_files_are_refused(model, name, tmp_path):
    change, message = DAMAGE[name]
    memory = model.memory()
    model.logits(random_ids(23), memory)
    path = tmp_path / "memory.safetensors"
    memory.save(path)
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, path, metadata=metadata)
    with pytest.raises(CheckpointError, match=re.escape(message)):
        model.load_memory(path)


@pytest.mark.parametrize("kv", ["window:8", "turboquant:4", "triattention:16", "int8"])
def test_policies_of_single_tokens_are_refused(model, kv):
    with pytest.raises(ValueError, match=r"compresses its memory itself|stand for several tokens"):
        model.memory(kv)
