"""Stage, attend, commit: what is kept, what is forgotten, and that nothing else ever changes a memory."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sparing.errors import CheckpointError
from sparing.memory.sequence import resident_bytes
from sparing.models.batch import Row
from tests.tiny import CONFIGS, STORED_CASES, STORED_IDS, WINDOW, filled, model, random_ids, same, snapshot, takes

names = pytest.mark.parametrize("name", CONFIGS)
stored = pytest.mark.parametrize(("name", "kv", "options"), STORED_CASES, ids=STORED_IDS)
few = settings(max_examples=12)
ROUNDING = 2e-5


@stored
@few
@given(held=st.integers(0, 12), staged=st.integers(1, 9), data=st.data())
def test_committing_n_equals_staging_only_n(name, kv, options, held, staged, data):
    kept = data.draw(st.integers(0, staged))
    memory, other = filled(name, held, kv=kv, **options), filled(name, held, kv=kv, **options)
    model(name).run([Row(random_ids(staged, 1), memory)])
    assert memory.staged == staged
    assert memory.length == held
    memory.commit(kept)
    if kept:
        model(name).run([Row(random_ids(staged, 1)[:kept], other)])
        other.commit(kept)
    assert same(snapshot(memory), snapshot(other), ROUNDING)
    assert memory.nbytes == other.nbytes
    following = random_ids(3, 2)
    logits = [model(name).logits(following, m) for m in (memory, other)]
    torch.testing.assert_close(*logits, rtol=1e-5, atol=5e-5)


@stored
@few
@given(held=st.integers(0, 12), staged=st.integers(1, 9))
def test_rolling_back_equals_never_having_staged(name, kv, options, held, staged):
    memory = filled(name, held, kv=kv, **options)
    before = snapshot(memory)
    for undo in (memory.rollback, lambda: memory.commit(0)):
        model(name).run([Row(random_ids(staged, 1), memory)])
        undo()
        assert same(snapshot(memory), before)
    never = filled(name, held, kv=kv, **options)
    assert torch.equal(model(name).logits(random_ids(3, 2), memory), model(name).logits(random_ids(3, 2), never))


@names
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_raises_changes_nothing(name, error):
    parts = (getattr(model(name), part, None) for part in ("stack", "model", "backbone"))
    stack = next(part for part in parts if part is not None)
    memories = [filled(name, 7), filled(name, 2, seed=3)]
    before = [snapshot(memory) for memory in memories]

    def fail(*_):
        raise error

    for layer in stack.layers:
        part = layer.mixer if hasattr(layer, "mixer") else layer.mlp
        hook = part.register_forward_pre_hook(fail)
        with pytest.raises(error):
            model(name).run([Row(random_ids(4, i), memory) for i, memory in enumerate(memories)])
        with pytest.raises(error):
            model(name).logits(random_ids(4), memories[0])
        if name == "denoiser":
            with pytest.raises(error):
                model(name).denoise(random_ids(8), memories[0])
        hook.remove()
        assert all(same(snapshot(m), b) for m, b in zip(memories, before, strict=True))


@names
def test_a_head_that_raises_changes_nothing(name, monkeypatch):
    memory = filled(name, 7)
    before = snapshot(memory)

    def fail(hidden):
        raise MemoryError

    monkeypatch.setattr(model(name), "head", fail)
    with pytest.raises(MemoryError):
        model(name).logits(random_ids(4), memory)
    assert same(snapshot(memory), before)


@names
def test_refused_tokens_change_nothing(name):
    memory = filled(name, 7)
    before = snapshot(memory)
    for bad in ([], [10**6], [-1], [0.5], random_ids(5000)):
        with pytest.raises(ValueError):
            model(name).logits(bad, memory)
    assert same(snapshot(memory), before)


@names
def test_staged_tokens_must_be_settled_first(name, tmp_path):
    memory = filled(name, 7)
    model(name).run([Row(random_ids(3), memory)])
    for action in (
        lambda: model(name).run([Row(random_ids(2), memory)]),
        memory.fork,
        lambda: memory.save(tmp_path / "memory"),
        lambda: memory.commit(4),
        lambda: memory.commit(-1),
    ):
        with pytest.raises(ValueError, match="3 "):
            action()
    memory.commit(3)
    assert memory.length == 10


def test_denoising_changes_nothing():
    memory = filled("denoiser", 9)
    before = snapshot(memory)
    logits = model("denoiser").denoise(random_ids(8), memory)
    assert same(snapshot(memory), before)
    assert torch.equal(model("denoiser").denoise(random_ids(8), memory), logits)


@stored
@few
@given(held=st.integers(0, 12), mine=st.integers(1, 6), theirs=st.integers(1, 6))
def test_forks_are_independent(name, kv, options, held, mine, theirs):
    memory = filled(name, held, kv=kv, **options)
    before = snapshot(memory)
    twin = memory.fork()
    for first, second in ((memory, twin), (twin, memory)):
        unchanged = snapshot(second)
        model(name).logits(random_ids(mine, 1), first)
        assert same(snapshot(second), unchanged)
    # Both now continue as if they had been alone.
    alone = filled(name, held, kv=kv, **options)
    assert same(snapshot(alone), before)
    model(name).logits(random_ids(mine, 1), alone)
    for continued in (memory, twin):
        assert same(snapshot(continued), snapshot(alone))
    third = memory.fork()
    model(name).logits(random_ids(theirs, 2), third)
    assert third.length == memory.length + theirs


@names
def test_a_fork_holds_what_it_shares_once(name):
    memory = filled(name, 9)
    alone, twin = resident_bytes([memory]), memory.fork()

    def places(m):
        return [tensor.data_ptr() for layer in m.own for tensor in layer.state().values()]

    before = places(memory)
    assert places(twin) == before
    assert resident_bytes([memory, twin]) == alone
    model(name).logits(random_ids(1), twin)
    assert places(memory) == before
    assert alone < resident_bytes([memory, twin]) <= 2 * alone


@pytest.mark.parametrize("length", [0, 1, WINDOW - 2, WINDOW - 1, WINDOW, 13])
@pytest.mark.parametrize(
    ("name", "kv"), [(name, kv) for name in CONFIGS for kv in ("dense", "window:3", "released") if takes(name, kv)]
)
def test_save_and_load(name, length, kv, tmp_path):
    memory = filled(name, length, kv=kv)
    memory.save(tmp_path / "memory.safetensors")
    loaded = model(name).load_memory(tmp_path / "memory.safetensors", kv)
    assert same(snapshot(loaded), snapshot(memory))
    assert loaded.nbytes == memory.nbytes
    assert torch.equal(model(name).logits(random_ids(4, 1), loaded), model(name).logits(random_ids(4, 1), memory))


@names
def test_loading_refuses_another_model_or_policy(name, tmp_path):
    path = tmp_path / "memory.safetensors"
    filled(name, 6).save(path)
    for other in CONFIGS:
        if other != name:
            with pytest.raises(CheckpointError, match="another model"):
                model(other).load_memory(path)
    with pytest.raises(CheckpointError, match="kv is 'dense'"):
        model(name).load_memory(path, "window:3" if takes(name, "window:3") else "released")
    half = copy.deepcopy(model(name)).bfloat16().memory()
    half.save(path)
    with pytest.raises(CheckpointError, match="bfloat16"):
        model(name).load_memory(path)


@names
def test_one_memory_is_in_one_row(name):
    memory, other = filled(name, 7), filled(name, 2)
    before = [snapshot(m) for m in (memory, other)]
    for rows, reason in (
        ([Row(random_ids(2), memory), Row(random_ids(3), other), Row(random_ids(1), memory)], "in two rows"),
        ([Row(random_ids(2), memory), Row(random_ids(0), other)], "row 1 of the pass has no tokens"),
    ):
        with pytest.raises(ValueError, match=reason):
            model(name).run(rows)
        assert all(same(snapshot(m), b) for m, b in zip((memory, other), before, strict=True))


@stored
@pytest.mark.parametrize("place", ["stage", "commit", "rollback"])
def test_a_group_that_raises_leaves_all_as_they_were(name, kv, options, place, monkeypatch):
    """Whichever group of layers it is, and whether it had done its part: the same call works later."""
    memory = filled(name, 7, kv=kv, **options)
    before = snapshot(memory)
    for i, group in enumerate(memory.groups):
        for has_done_it in (False, True):
            plain = getattr(group, "stage" if place == "stage" else "commit")

            def fail(*given, plain=plain, has_done_it=has_done_it):
                if has_done_it:
                    plain(*given)
                raise MemoryError

            if place != "stage":
                model(name).run([Row(random_ids(3), memory)])
            act = {"stage": lambda: memory.stage(3), "commit": lambda: memory.commit(2), "rollback": memory.rollback}
            staged = snapshot(memory)
            with monkeypatch.context() as patch:
                patch.setattr(memory.groups[i], "stage" if place == "stage" else "commit", fail)
                with pytest.raises(MemoryError):
                    act[place]()
            assert same(snapshot(memory), staged)
            memory.rollback()
            assert same(snapshot(memory), before, 1e-6)
    assert torch.equal(
        model(name).logits(random_ids(2), memory), model(name).logits(random_ids(2), filled(name, 7, kv=kv, **options))
    )
