"""Codes in extents: held once by all who remember the same tokens, and unchanged by whatever raises."""

import warnings
from typing import Any

import pytest
import torch

import sparing
from sparing.config.memory import AttentionSpec
from sparing.kernels.code_layout import BLOCK
from sparing.memory.sequence import Memory, resident_bytes
from sparing.memory.turboquant.coder import Coder
from sparing.memory.turboquant.rows import CodedRow
from sparing.models.batch import Row
from tests.memory.one_layer import OneLayer, one_layer
from tests.tiny import filled, model, random_ids, same, snapshot

HEADS, DIM = 2, 16
POLICIES = {
    "plain": ("turboquant:4", {"block": 16}),
    "token by token": ("turboquant:k3v2", {"block": 1, "window": 3, "sink_tokens": 2}),
    "channels": ("turboquant:3.5", {"block": 16}),
    "sketched channels": ("turboquant:2.5", {"block": 16, "variant": "prod", "sink_tokens": 1}),
}
stored = pytest.mark.parametrize(("kv", "options"), POLICIES.values(), ids=POLICIES)


def alone(kv: str, **options: Any) -> OneLayer:
    return one_layer(AttentionSpec(HEADS, DIM), kv, **options)


def add(memory: OneLayer, first: int, n: int) -> None:
    """Tokens first..first+n-1 of one endless text, committed."""
    k, v = (
        torch.stack([torch.randn(HEADS, DIM, generator=torch.Generator().manual_seed(2 * i + part)) for i in range(n)])
        for part in (first * 2, first * 2 + 1)
    )
    memory.stage(k, v)
    memory.commit(n)


def fail_at(monkeypatch: pytest.MonkeyPatch, home: type, name: str, call: int, error: type[BaseException]) -> None:
    """Raise in the call-th call of a method, and in it alone."""
    plain, calls = getattr(home, name), []

    def failing(self: Any, *args: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            raise error
        return plain(self, *args)

    monkeypatch.setattr(home, name, failing)


@stored
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("held", [0, 20, 70])
@pytest.mark.parametrize("call", [1, 2, 3, 4])
def test_a_commit_that_raises_changes_nothing(kv, options, error, held, call, monkeypatch):
    """In any of two layers' keys and values; an exact prompt leaves all encoding to the commit."""
    memory, other = (filled("dense", held, kv=kv, prefill="exact", **options) for _ in range(2))
    tokens = random_ids(40, 1)
    for one in (memory, other):
        model("dense").run([Row(tokens, one)])
    before, nbytes, resident = snapshot(memory), memory.nbytes, resident_bytes([memory])
    with monkeypatch.context() as patch:
        fail_at(patch, Coder, "encode", call, error)
        with pytest.raises(error):
            memory.commit(40)
    assert same(snapshot(memory), before) and memory.staged == 40 and memory.length == held
    assert memory.nbytes == nbytes and resident_bytes([memory]) == resident
    for one in (memory, other):
        one.commit(40)
    assert same(snapshot(memory), snapshot(other))
    following = random_ids(5, 2)
    assert torch.equal(model("dense").logits(following, memory), model("dense").logits(following, other))


@stored
@pytest.mark.parametrize("held", [0, 20, 70])
@pytest.mark.parametrize("call", [1, 2])
def test_a_forward_that_raises_takes_back_what_it_encoded_ahead(kv, options, held, call, monkeypatch):
    """And what was learnt of it: the prompt that then comes chooses its own channels."""
    memory, never = (filled("dense", held, kv=kv, **options) for _ in range(2))
    before = snapshot(memory)
    with monkeypatch.context() as patch:
        fail_at(patch, CodedRow, "_over_exact" if held == 0 else "attend", call, RuntimeError)
        with pytest.raises(RuntimeError):
            model("dense").logits(random_ids(50, 1), memory)
    assert same(snapshot(memory), before) and memory.staged == 0
    for one in (memory, never):
        model("dense").logits(random_ids(50, 2), one)
    assert same(snapshot(memory), snapshot(never))


@stored
def test_what_was_encoded_ahead_is_taken_back_with_its_tokens(kv, options):
    memory, never = (filled("dense", 5, kv=kv, **options) for _ in range(2))
    for kept in (0, 3):
        model("dense").run([Row(random_ids(60, 1), memory)])
        memory.commit(kept)
        if kept:
            model("dense").run([Row(random_ids(60, 1)[:kept], never)])
            never.commit(kept)
        assert same(snapshot(memory), snapshot(never), 1e-5) and memory.nbytes == never.nbytes
    for one in (memory, never):
        model("dense").logits(random_ids(50, 2), one)
    assert same(snapshot(memory), snapshot(never), 1e-5)


def test_a_round_that_raises_changes_nothing(monkeypatch):
    statistics = sparing.calibrate(model("dense"), random_ids(64))
    kv = "triattention:40+turboquant:3.5"
    options = {"interval": 5, "protect_prompt": False, "statistics": statistics}
    memory, other = (filled("dense", 39, kv=kv, **options) for _ in range(2))
    for one in (memory, other):
        model("dense").run([Row(random_ids(30, 1), one)])
    before = snapshot(memory)
    with monkeypatch.context() as patch:
        fail_at(patch, Memory, "keep", 1, MemoryError)
        with pytest.raises(MemoryError):
            memory.commit(30)
    with monkeypatch.context() as patch:
        fail_at(patch, Coder, "encode", 3, MemoryError)
        with pytest.raises(MemoryError):
            memory.commit(30)
    assert same(snapshot(memory), before) and memory.evictions == []
    for one in (memory, other):
        one.commit(30)
    assert len(memory.evictions) == 1 and same(snapshot(memory), snapshot(other))


def test_a_warning_that_raises_is_said_again(monkeypatch):
    monkeypatch.setattr("sparing.memory.turboquant.logit_noise.LIMIT", 0.0)
    memory = model("dense").memory("turboquant:4")
    before = snapshot(memory)
    for _ in range(2):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(RuntimeWarning, match="noise"):
                model("dense").logits(random_ids(20), memory)
        assert same(snapshot(memory), before) and memory.length == 0


@stored
@pytest.mark.parametrize("n", [40, 64, 100])
def test_forks_go_on_as_if_they_were_alone(kv, options, n):
    """To the bit, also where the last block is filled in part; a fork of a fork too."""
    memory = alone(kv, **options)
    add(memory, 0, n)
    sides = [memory, memory.fork(), memory.fork()]
    for i, side in enumerate(sides):
        for first in range(n, n + 90):
            add(side, first + 1000 * i, 1)
            if i == 2 and first == n + 20:
                side = sides[2] = side.fork()
    for i, side in enumerate(sides):
        never = alone(kv, **options)
        add(never, 0, n)
        for first in range(n, n + 90):
            add(never, first + 1000 * i, 1)
        assert all(torch.equal(x, side.state()[name]) for name, x in never.state().items())
        q = torch.randn(1, HEADS, DIM)
        for one in (never, side):
            one.stage(*torch.ones(2, 1, HEADS, DIM))
        mixes = [one.attend(q, scale=0.3, causal=True) for one in (never, side)]
        torch.testing.assert_close(*mixes, rtol=1e-5, atol=1e-5)


def test_many_forks_hold_a_prompt_once():
    memory = alone("turboquant:4")
    add(memory, 0, 4000)
    before, twins = resident_bytes([memory.memory]), [memory.fork() for _ in range(64)]
    assert resident_bytes([one.memory for one in (memory, *twins)]) == before
    for i, twin in enumerate(twins):
        for first in range(4000, 4070):
            add(twin, first + i, 1)
    together = resident_bytes([one.memory for one in (memory, *twins)])
    one_extent = 64 * 2 * HEADS * DIM * 4 + memory.spec.nbytes(64, 4)  # of exact entries, and a block of codes
    assert together - before <= 64 * 1.01 * (one_extent + 64 * 2 * HEADS * DIM * 4)


@stored
def test_head_room_is_below_a_quarter(kv, options):
    """Except for the extents of sinks, of a tail across two of them, and the rest of a block."""
    memory, most_spans = alone(kv, **options), 0
    extent, block = 64 * 2 * HEADS * DIM * 4, 64 * memory.spec.codes.entry_nbytes(DIM, value_only=False) * HEADS
    for i in range(900):
        add(memory, i, 1)
        assert resident_bytes([memory.memory]) <= 1.25 * memory.nbytes + 3 * extent + block
        most_spans = max(most_spans, max(map(len, _spans(memory))))
    assert most_spans == 1


def _spans(memory: OneLayer) -> list[Any]:
    (layers,) = memory.group.sections
    return [codes.spans(0, coder) for codes, coder in zip(layers.codes, layers.coders[0], strict=True)]


@pytest.mark.parametrize("others_live", [False, True])
def test_turns_of_forks_keep_spans_few(others_live):
    """Where what was forked is gone, its extents are joined once there are many; what another reads stays."""
    memory, kept = alone("turboquant:4"), []
    never = alone("turboquant:4")
    for turn in range(12):
        for one in (memory, never):
            add(one, turn * 130, 130)
        if others_live:
            kept.append(memory)
        memory = memory.fork()
    assert [len(spans) for spans in _spans(memory)] == [12 if others_live else 5] * 2
    assert all(torch.equal(x, memory.state()[name]) for name, x in never.state().items())


def test_a_fork_adds_one_span():
    memory = alone("turboquant:4")
    add(memory, 0, 20 * BLOCK)
    twin = memory.fork()
    for first in range(20 * BLOCK, 30 * BLOCK):
        add(twin, first, 1)
    assert [len(spans) for spans in _spans(memory)] == [1, 1]
    assert [len(spans) for spans in _spans(twin)] == [2, 2]
