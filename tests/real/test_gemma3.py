"""Gemma 3 270M, a real file of Q4_K, Q5_0, Q6_K and Q8_0 blocks: read, run and compared with transformers."""

import pytest
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

import sparing
from tests.fetched import fetched
from tests.real import reading

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def file():
    with pytest.MonkeyPatch.context() as monkeypatch:
        reading.read_headers_once(monkeypatch)
        yield fetched("gemma3-270m")


@pytest.fixture(scope="module")
def model(file):
    return sparing.load(file, dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def reference(file):
    return reading.read_model(Gemma3ForCausalLM, Gemma3TextConfig, file)


def test_weights(file, reference):
    reading.expect_same_weights(file, reference)


def test_logits_and_perplexity(model, reference):
    reading.expect_same_logits(model, reference, model.config.window + 188)


@pytest.mark.parametrize(
    "prompt", ["The capital of France is", "def factorial(n):\n    ", "Es war einmal ein König, der"]
)
def test_greedy_text(model, reference, prompt):
    reading.expect_same_text(model, reference, model.tokenizer.encode(prompt))


def test_tokenizer(model, file):
    """31 spaces are the longest that are one token. Of more, SentencePiece and llama.cpp take as many from the left as
    make a token, as the model was trained; transformers joins them two by two."""
    reading.expect_same_tokens(model, file, longest_gap=31)
    for text, pieces in {" " * 42: [31, 11], " " * 70 + "x": [31, 31, 8, 1], " " * 32 + "x": [31, 2]}.items():
        assert [len(model.tokenizer.decode([i])) for i in model.tokenizer.encode(text)[1:]] == pieces
