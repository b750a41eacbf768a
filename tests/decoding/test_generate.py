"""`sparing.generate` left to right: against transformers' greedy search, rows, stops, settings, refusals."""

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models
from transformers import LlamaConfig, LlamaForCausalLM

import sparing
from sparing.checkpoint.tokenizer import Tokenizer
from tests.conformance.reference import load, save_random
from tests.tiny import ENDLESS, LLAMA, VOCAB, random_ids

CONTEXT = 64
PROMPTS = [random_ids(length, seed=length).tolist() for length in (3, 11, 6)]


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder: Path = tmp_path_factory.mktemp("llama")
    config = LlamaConfig(**LLAMA | ENDLESS | {"max_position_embeddings": CONTEXT})
    return save_random(LlamaForCausalLM, config, folder, seed=2), load(folder)


@pytest.fixture
def model(both, monkeypatch):
    """Our model with a tokenizer of one letter or two per id, and without recommended settings."""
    letters = [chr(ord("a") + i % 26) * (1 + i // 26) for i in range(VOCAB)]
    backend = Backend(models.BPE({text: i for i, text in enumerate(letters)}, []))
    backend.decoder = decoders.Fuse()
    monkeypatch.setattr(both[1], "tokenizer", Tokenizer(backend))
    monkeypatch.setattr(both[1], "generation_config", {})
    return both[1]


def answers(model, prompt, **options):
    """Per row: (ids, text, reason)."""
    found, texts, reasons = {}, {}, {}
    for event in sparing.generate(model, prompt, **options):
        if isinstance(event, sparing.Commit):
            found.setdefault(event.row, []).extend(event.ids)
            texts[event.row] = texts.get(event.row, "") + event.text
        elif isinstance(event, sparing.Done):
            reasons[event.row] = event.reason
    return [(found[row], texts[row], reasons[row]) for row in sorted(reasons)]


def test_greedy_is_that_of_transformers(both, model):
    for prompt in PROMPTS:
        expected = both[0].generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=0)
        assert answers(model, prompt, temperature=0, max_new_tokens=30)[0][0] == expected[0, len(prompt) :].tolist()


@pytest.mark.parametrize("settings", [{"temperature": 0}, {"temperature": 0.9, "top_k": 20, "repetition_penalty": 1.1}])
def test_rows_of_a_batch_do_not_depend_on_each_other(model, settings):
    """Row 0 draws from the seed itself, so each prompt alone is compared in the first place of a batch."""
    for i, prompt in enumerate(PROMPTS):
        batch = answers(model, [prompt, *PROMPTS[:i]], seed=4, max_new_tokens=12, **settings)
        assert batch[0] == answers(model, prompt, seed=4, max_new_tokens=12, **settings)[0]


def test_stops(model):
    tokens, text, reason = answers(model, PROMPTS[0], temperature=0, max_new_tokens=12)[0]
    assert (len(tokens), reason) == (12, "length")
    pieces = [model.tokenizer.decode([token]) for token in tokens]
    assert text == "".join(pieces)
    word = pieces[4][-1] + pieces[5] + pieces[6][0]  # crosses two boundaries
    _, shown, reason = answers(model, PROMPTS[0], temperature=0, max_new_tokens=12, stop=word)[0]
    assert (shown, reason) == (text[: text.find(word)], "stop")
    first = tokens.index(tokens[5])
    found, shown, reason = answers(model, PROMPTS[0], temperature=0, max_new_tokens=12, stop=tokens[5])[0]
    assert (found, shown, reason) == (tokens[: first + 1], "".join(pieces[:first]), "stop")
    model.generation_config["eos_token_id"] = [tokens[5]]
    assert answers(model, PROMPTS[0], temperature=0, max_new_tokens=12)[0] == (found, shown, "eos")


def test_logprobs_are_those_of_a_forward(model):
    events = list(sparing.generate(model, PROMPTS[1], temperature=0.8, seed=1, max_new_tokens=8, logprobs=True))
    commits = [event for event in events if isinstance(event, sparing.Commit)]
    new = [token for event in commits for token in event.ids]
    scores = torch.tensor([score for event in commits for score in event.logprobs or ()])
    logits = model.logits(PROMPTS[1] + new)[len(PROMPTS[1]) - 1 : -1]
    expected = logits.log_softmax(-1).gather(-1, torch.tensor(new)[:, None])[:, 0]
    assert torch.allclose(scores, expected, atol=1e-4)


def test_seeds_and_recommended_settings(model):
    greedy = answers(model, PROMPTS[0], temperature=0)
    model.generation_config.update(do_sample=False, temperature=3.0)
    assert answers(model, PROMPTS[0]) == greedy
    model.generation_config.update(do_sample=True)
    drawn = answers(model, PROMPTS[0], seed=1)
    assert drawn == answers(model, PROMPTS[0], seed=1) == answers(model, PROMPTS[0], seed=1, temperature=3.0)
    assert drawn != answers(model, PROMPTS[0], seed=2)
    model.generation_config.update(top_k=1)
    assert answers(model, PROMPTS[0], seed=1) == greedy


def test_end_of_the_context(model):
    prompt = random_ids(CONTEXT - 3).tolist()
    found, _, reason = answers(model, prompt, temperature=0)[0]
    assert (len(found), reason) == (4, "length")  # the last one is never fed back


def test_a_memory_continues(model):
    memory = model.memory()
    model.logits(PROMPTS[1][:5], memory)
    continued = answers(model, PROMPTS[1][5:], memory=memory, temperature=0, max_new_tokens=9)
    assert continued == answers(model, PROMPTS[1], temperature=0, max_new_tokens=9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"prompt": ""}, "empty"),
        ({"prompt": []}, "empty"),
        ({"prompt": [VOCAB]}, f"{VOCAB} is out of range"),
        ({"prompt": [-1]}, "-1 is out of range"),
        ({"prompt": [1] * (CONTEXT + 1)}, f"context of {CONTEXT}"),
        ({"temperature": -1}, "temperature is -1"),
        ({"kv": "dens"}, "dens"),
        ({"nonsense": 1}, "nonsense"),
        ({"canvas": "abc"}, "has no canvas: leave out 'canvas'"),
        ({"decoder": "beam"}, "beam"),
        ({"decoder": "block_diffusion"}, "has no canvas"),
        ({"draft": "small"}, "draft"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"stop": ""}, "empty string"),
    ],
)
def test_refusals(model, arguments, message):
    with pytest.raises(ValueError, match=message):
        sparing.generate(model, **({"prompt": [1, 2]} | arguments))
