"""SmolLM2 135M Instruct: a real quantised file, read, run and compared with transformers."""

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

import sparing
from tests.fetched import fetched
from tests.real import reading

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model():
    return sparing.load(fetched("smollm2"), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def reference():
    return reading.read_model(LlamaForCausalLM, LlamaConfig, fetched("smollm2"))


def test_it_holds_what_its_file_does(model):
    nbytes = sum(part.nbytes for _, _, _, part in model.parts())
    assert nbytes == sparing.plan("smollm2", context=8).weight_bytes <= model.path.stat().st_size


def test_the_capital_of_france(model):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    events = list(sparing.generate(model, chat, temperature=0, max_new_tokens=24))
    answer = "".join(event.text for event in events if isinstance(event, sparing.Commit))
    assert "Paris" in answer


def test_the_capital_of_france_from_codes(model):
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    events = list(sparing.generate(model, chat, kv="turboquant:4", block=16, temperature=0, max_new_tokens=24))
    assert "Paris" in "".join(event.text for event in events if isinstance(event, sparing.Commit))
    done = events[-1]
    assert isinstance(done, sparing.Done)
    held = done.stats["prompt_tokens"] + done.stats["new_tokens"] - 1
    assert done.stats["memory_bytes"] == sparing.plan(fetched("smollm2"), context=held, kv="dense").memory_bytes - (
        held // 16 * 16 * 30 * 3 * 2 * (4 * 64 - 34)
    )


def test_logits_and_perplexity(model, reference):
    reading.expect_same_logits(model, reference, 1024)
