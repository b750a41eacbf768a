"""SmolLM2 135M Instruct: a real quantised file, read, run and compared with transformers."""

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

import sparing
from sparing.training.data import corpus_file
from tests.fetched import fetched

pytestmark = pytest.mark.real


@pytest.fixture(scope="module")
def model():
    return sparing.load(fetched("smollm2"), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def reference(model):
    """transformers' Llama with the same weights."""
    c = model.config
    config = LlamaConfig(
        vocab_size=c.vocab_size,
        hidden_size=c.hidden_size,
        intermediate_size=c.intermediate_size,
        num_hidden_layers=c.num_hidden_layers,
        num_attention_heads=c.num_attention_heads,
        num_key_value_heads=c.num_key_value_heads,
        head_dim=c.head_dim,
        max_position_embeddings=c.max_position_embeddings,
        rms_norm_eps=c.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": c.rope.rope_theta},
        tie_word_embeddings=c.tie_word_embeddings,
    )
    with torch.device("meta"):
        theirs = LlamaForCausalLM(config)
    theirs.to_empty(device="cpu")
    theirs.model.rotary_emb = type(theirs.model.rotary_emb)(config)  # its constants are no weights
    missing, unexpected = theirs.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected and set(missing) <= {"lm_head.weight"}
    theirs.tie_weights()
    return theirs.eval()


@pytest.fixture(scope="module")
def tale(model) -> Tensor:
    """The first 1,024 tokens of the fairy tales."""
    try:
        path = corpus_file("fairy_tales.txt")
    except ValueError as error:
        pytest.skip(str(error))
    return torch.tensor(model.tokenizer.encode(path.read_text(encoding="ascii")[:8192])[:1024])


@torch.no_grad()
def reference_logits(reference, tokens: Tensor) -> Tensor:
    return reference(input_ids=tokens[None], use_cache=False).logits[0]


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).exp().item()


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


def test_logits(model, reference):
    tokens = torch.tensor(model.tokenizer.encode("Once upon a time there was a king who had three daughters."))
    ours, theirs = model.logits(tokens), reference_logits(reference, tokens)
    assert (ours - theirs).abs().max() <= 1e-4 * theirs.abs().max()
    assert torch.equal(ours.argmax(-1), theirs.argmax(-1))


def test_perplexity_of_fairy_tales(model, reference, tale):
    assert len(tale) == 1024
    ours = perplexity(model.logits(tale), tale)
    theirs = perplexity(reference_logits(reference, tale), tale)
    assert ours == pytest.approx(theirs, rel=0.01)
