"""Qwen2.5-Coder 0.5B Instruct, a real file with biases and a head of its own, compared with transformers."""

import pytest
from transformers import Qwen2Config, Qwen2ForCausalLM

import sparing
from tests.fetched import fetched
from tests.real import reading

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def file():
    with pytest.MonkeyPatch.context() as monkeypatch:
        reading.read_headers_once(monkeypatch)
        yield fetched("qwen2.5-coder-0.5b")


@pytest.fixture(scope="module")
def model(file):
    return sparing.load(file, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def reference(file):
    return reading.read_model(Qwen2ForCausalLM, Qwen2Config, file)


def test_weights(file, model, reference):
    assert model.lm_head is not None
    reading.expect_same_weights(file, reference)


def test_logits_and_perplexity(model, reference):
    reading.expect_same_logits(model, reference, 200)


def test_greedy_text(model, reference):
    chat = [{"role": "user", "content": "Write a Python function that reverses a string."}]
    assert "def " in reading.expect_same_text(model, reference, model.tokenizer.encode_chat(chat))


def test_tokenizer(model, file):
    reading.expect_same_tokens(model, file)
