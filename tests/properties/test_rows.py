"""A row's result depends on its own tokens: not on its neighbours, their order, or how it was cut into chunks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.config.memory import AttentionSpec, CompressedSpec
from sparing.config.policy import apply_policy, parse_policy
from sparing.memory.attention import AttentionGroup, AttentionRows
from sparing.models.batch import Row
from tests.tiny import CONFIGS, STORED_CASES, WINDOW, filled, model, random_ids, same, snapshot, takes

names = pytest.mark.parametrize("name", CONFIGS)
few = settings(max_examples=8)
ROUNDING = {"rtol": 1e-5, "atol": 5e-5}
EXACT = [case for case in STORED_CASES if case[1] != "released"]  # whose codes may fall on either side of a middle


@pytest.mark.parametrize(("name", "kv", "options"), EXACT)
@few
@given(data=st.data())
def test_a_batch_equals_its_rows_alone(name, kv, options, data):
    count = data.draw(st.integers(2, 4))
    lengths = data.draw(st.lists(st.integers(1, 8), min_size=count, max_size=count))
    held = data.draw(st.lists(st.sampled_from([0, 1, WINDOW - 1, WINDOW, 11]), min_size=count, max_size=count))
    order = data.draw(st.permutations(range(count)))
    wanted = data.draw(st.lists(st.sampled_from([None, 0, 1, 2, 99]), min_size=count, max_size=count))

    def run(indices):
        memories = [filled(name, held[i], i, kv, **options) for i in indices]
        batch = [
            Row(random_ids(lengths[i], seed=10 + i), memory, wanted=wanted[i])
            for i, memory in zip(indices, memories, strict=True)
        ]
        hidden = model(name).run(batch)
        for row in batch:
            row.memory.commit(len(row.tokens))
        return dict(zip(indices, hidden.split([row.num_wanted for row in batch]), strict=True)), memories

    together, _ = run(range(count))
    permuted, permuted_memories = run(order)
    for place, i in enumerate(order):
        alone, memories = run([i])
        full = random_ids(lengths[i], seed=10 + i)
        assert together[i].shape[0] == (len(full) if wanted[i] is None else min(wanted[i], len(full)))
        torch.testing.assert_close(together[i], alone[i], **ROUNDING)
        torch.testing.assert_close(permuted[i], alone[i], **ROUNDING)
        assert same(snapshot(permuted_memories[place]), snapshot(memories[0]), 5e-5)


@names
@few
@given(data=st.data())
def test_every_chunking_gives_the_same_logits(name, data):
    total = data.draw(st.integers(1, 18))
    cuts = sorted(data.draw(st.sets(st.integers(1, max(total - 1, 1)), max_size=total)) - {total})
    chunks = [b - a for a, b in zip([0, *cuts], [*cuts, total], strict=True)]
    ids = random_ids(total, seed=total)
    whole, pieces = model(name).memory(), model(name).memory()
    expected = model(name).logits(ids, whole)
    logits = torch.cat([model(name).logits(chunk, pieces) for chunk in ids.split(chunks)])
    torch.testing.assert_close(logits, expected, **ROUNDING)
    assert same(snapshot(whole), snapshot(pieces), 5e-5)


@names
@pytest.mark.parametrize("wanted", [1, 3])
def test_positions_nobody_reads_do_not_change_the_others(name, wanted):
    memories = [filled(name, 6), filled(name, 6)]
    ids = random_ids(9, 1)
    every = model(name).run([Row(ids, memories[0])])
    some = model(name).run([Row(ids, memories[1], wanted=wanted)])
    torch.testing.assert_close(some, every[-wanted:], **ROUNDING)
    assert len(model(name).run([Row(ids, filled(name, 6), wanted=0)])) == 0
    for memory in memories:
        memory.commit(9)
    assert same(snapshot(memories[0]), snapshot(memories[1]))


@pytest.mark.parametrize(
    ("name", "kv"),
    [
        (name, kv)
        for name in CONFIGS
        for kv in ("dense", "released", "window:3", "turboquant:k4v3", "turboquant:2.5")
        if takes(name, kv)
    ],
)
def test_bytes_held_are_the_bytes_planned(name, kv):
    layers = apply_policy(model(name).config.memory_specs(), parse_policy(kv))
    specs = [spec for spec in layers if spec is not None]
    memory = model(name).memory(kv)
    for length in range(1, 2 * WINDOW + 2):
        model(name).logits(random_ids(1, length), memory)
        assert memory.length == length
        assert memory.nbytes == sum(spec.nbytes(length, 4) for spec in specs)
        for i, spec in enumerate(layers):
            if isinstance(spec, CompressedSpec):
                continue  # tests/memory/test_compressed.py
            if not isinstance(spec, AttentionSpec):
                with pytest.raises(ValueError, match=f"layer {i} has no keys"):
                    memory.entries(i)
                continue
            source = layers[i if spec.shared_with is None else spec.shared_with]
            assert isinstance(source, AttentionSpec)
            expected = torch.arange(length - source.entries(length), length)
            assert torch.equal(memory.entries(i), expected.expand(source.num_key_value_heads, -1))
    jump = model(name).memory(kv)
    model(name).logits(random_ids(300), jump)  # beyond one growth of the buffers
    assert jump.nbytes == sum(spec.nbytes(300, 4) for spec in specs)


@pytest.mark.parametrize("name", ["value-only", "shared value-only mixture", "denoiser"])
@pytest.mark.parametrize("kv", ["dense", "window:4"])
def test_rebuilt_keys_are_the_staged_keys_bit_for_bit(name, kv, monkeypatch):
    staged: dict[int, list] = {}
    write = AttentionRows.write

    def recording(self, layer, k, v):
        staged.setdefault(layer, []).append((k, v))
        write(self, layer, k, v)

    monkeypatch.setattr(AttentionRows, "write", recording)
    memory = model(name).memory(kv)
    for chunk in random_ids(17).split([6, 1, 1, 9]):
        model(name).logits(chunk, memory)
    checked = 0
    for layer in memory.own:
        assert isinstance(layer.group, AttentionGroup)
        if layer.group.keys_from_values:
            keys, values = layer.read()
            all_keys, all_values = (torch.cat(parts) for parts in zip(*staged[layer.layer], strict=True))
            assert torch.equal(keys.transpose(0, 1), all_keys[-layer.held :])
            assert torch.equal(values.transpose(0, 1), all_values[-layer.held :])
            checked += 1
    assert checked
