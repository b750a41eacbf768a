"""Left-to-right decoding: long prompts in chunks, and the numbers of its last event."""

import pytest

import sparing
from tests.tiny import model, random_ids


def outcome(name, prompts):
    events = list(sparing.generate(model(name), prompts, temperature=0, max_new_tokens=5))
    new = [[t for e in events if isinstance(e, sparing.Commit) and e.row == i for t in e.ids] for i in range(2)]
    return new, {e.row: e.stats for e in events if isinstance(e, sparing.Done)}


@pytest.mark.parametrize("name", ["dense", "sliding", "value-only", "shared"])
def test_prompts_in_chunks_give_the_same_answer(name, monkeypatch):
    monkeypatch.setitem(model(name).generation_config, "eos_token_id", [])  # Gemma's default end would cut a row short
    prompts = [random_ids(23).tolist(), random_ids(6, seed=1).tolist()]
    whole, stats = outcome(name, prompts)
    assert [stats[i]["forwards"] for i in range(2)] == [5, 5]
    monkeypatch.setattr("sparing.decoding.engine.PIECE", 7)
    chunked, stats = outcome(name, prompts)
    assert chunked == whole
    assert [stats[i]["prompt_tokens"] for i in range(2)] == [23, 6]
    assert [stats[i]["new_tokens"] for i in range(2)] == [5, 5]
    assert [stats[i]["forwards"] for i in range(2)] == [8, 5]
    assert all(stats[i]["memory_bytes"] > 0 for i in range(2))
