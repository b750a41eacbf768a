"""What a measurement of speed runs and counts. How long it took is nobody's business here."""

import pytest

from sparing.inspection.speed import measure_speed, speed_table
from tests.tiny import model


@pytest.mark.parametrize("name", ["dense", "hybrid", "denoiser"])
def test_every_policy_reads_and_writes_what_was_asked(name: str) -> None:
    net = model(name)
    found = measure_speed(net, ["dense", "turboquant:8"], prompt_tokens=12, new_tokens=8, repetitions=2)
    assert [t.kv for t in found.timings] == ["dense", "turboquant:8"]
    for timing in found.timings:
        assert len(timing.first) == 2 and min(timing.first) > 0 and timing.prompt_speed > 0
        assert timing.prompt_tokens == 12 and timing.new_tokens <= 8
        if name != "denoiser":  # which may end early
            assert (timing.new_tokens, timing.later_tokens) == (8, 7)
            assert timing.decode_speed is not None
    expected = sum(p.nbytes for p in net.parameters()) + sum(b.nbytes for b in net.buffers())
    assert found.weight_bytes == expected
    assert "turboquant:8" in speed_table([found]) and found.to_dict()["timings"][0]["kv"] == "dense"


def test_memory_is_what_a_plan_says() -> None:
    net = model("dense")
    timing = measure_speed(net, prompt_tokens=10, new_tokens=5, repetitions=1).timings[0]
    memory = net.memory()
    net.logits(list(range(14)), memory)  # the last token is written and not read
    assert timing.memory_bytes == memory.nbytes


def test_more_than_the_context_is_refused() -> None:
    net = model("dense")
    context = net.config.max_position_embeddings
    with pytest.raises(ValueError, match=f"do not fit the model's context of {context}"):
        measure_speed(net, prompt_tokens=context, new_tokens=1)
