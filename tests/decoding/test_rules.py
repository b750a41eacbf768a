"""What changes logits, against transformers' logits processors in transformers' order, and against vLLM's formulas."""

import random

import pytest
import torch
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

from sparing.config.generation import parse_generation_config
from sparing.decoding.rules import Rules, Seen
from sparing.decoding.sampling import Sampling, unusable
from tests.tiny import LLAMA

VOCAB, EOS = 23, (4, 7)

# Each alone, and many random ones together. Several tokens of a row repeat, so that all of them find something to do.
RULES = {
    "sequence_bias": [[[3], 2.5], [[5, 6], -1.5], [[1, 2, 3], 4.0], [[6], float("-inf")]],
    "repetition_penalty": 1.7,
    "encoder_repetition_penalty": 1.4,
    "no_repeat_ngram_size": 2,
    "encoder_no_repeat_ngram_size": 3,
    "bad_words_ids": [[9], [1, 2], [4], [2, 1, 0]],
    "min_length": 9,
    "min_new_tokens": 3,
    "forced_bos_token_id": 8,
    "forced_eos_token_id": [7],
    "exponential_decay_length_penalty": [1, 1.3],
    "suppress_tokens": [10, 11, -1],
    "begin_suppress_tokens": [12, 5],
}
WARPERS = {
    "temperature": 0.6,
    "top_k": 12,
    "top_p": 0.8,
    "min_p": 0.05,
    "top_h": 0.6,
    "typical_p": 0.7,
    "epsilon_cutoff": 0.03,
    "eta_cutoff": 0.1,
    "renormalize_logits": True,
}


@pytest.fixture(scope="module")
def llama():
    return LlamaForCausalLM(LlamaConfig(**LLAMA | {"vocab_size": VOCAB}))


def theirs(llama, settings, prompt, limit):
    """The processors that `generate` would make of a generation_config.json."""
    config = GenerationConfig(max_length=len(prompt) + limit, eos_token_id=list(EOS), **settings)
    config._eos_token_tensor = torch.tensor(EOS)
    return llama._get_logits_processor(config, len(prompt), torch.tensor([prompt]))


def check(llama, settings, seed):
    chance = random.Random(seed)
    prompt = [chance.randrange(6) for _ in range(chance.choice((1, 1, 2, 7)))]
    limit = 5
    config = parse_generation_config({key: value for key, value in settings.items() if key != "renormalize_logits"})
    ours = Sampling(**{**config.warpers, **config.rules}, eos_ids=EOS)
    processors = theirs(llama, settings, prompt, limit)
    generator = torch.Generator().manual_seed(seed)
    ids = list(prompt)
    for new in range(limit):
        logits = 3 * torch.randn(1, VOCAB, generator=generator)
        before = logits.clone()
        expected = processors(torch.tensor([ids]), logits.clone())
        found = ours.process(logits, [Seen(ids, new, 0, limit)])
        assert torch.equal(logits, before)
        if settings.get("renormalize_logits"):
            found = found.log_softmax(-1)
        assert torch.equal(found.isinf(), expected.isinf()), (settings, ids)
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
        ids.append(chance.randrange(6))


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_that_of_transformers(llama, name):
    for seed in range(8):
        check(llama, {name: RULES[name]}, seed)


@pytest.mark.parametrize("name", WARPERS)
def test_a_filter_is_that_of_transformers(llama, name):
    for seed in range(8):
        check(llama, {"do_sample": True, "top_k": 0, name: WARPERS[name]}, seed)


def test_they_act_in_transformers_order(llama):
    chance = random.Random(0)
    for seed in range(60):
        names = chance.sample(sorted(RULES), chance.randint(2, 6))
        settings = {name: RULES[name] for name in names}
        settings |= {name: WARPERS[name] for name in chance.sample(("temperature", "top_k", "top_p", "min_p"), 2)}
        check(llama, {"top_k": 0, **settings, "do_sample": True}, seed)


def test_presence_and_frequency_count_what_was_generated():
    """vLLM: logits -= frequency * counts; logits -= presence * (counts > 0), over output tokens alone."""
    logits = torch.randn(2, VOCAB, generator=torch.Generator().manual_seed(0))
    rows = [Seen([1, 2, 3, 3, 5, 3], new=4), Seen([1, 1], new=0)]
    counts = torch.zeros(2, VOCAB)
    counts[0, 3], counts[0, 5] = 3, 1
    found = Rules(presence_penalty=0.5, frequency_penalty=-0.25).apply(logits, rows)
    torch.testing.assert_close(found, logits + 0.25 * counts - 0.5 * (counts > 0))


def test_lengths_count_tokens_that_are_not_named():
    """A memory may hold tokens that nobody named: they count for min_length, not for what is repeated."""
    rules, logits = Rules(min_length=10, eos_ids=EOS), torch.zeros(1, VOCAB)
    assert rules.apply(logits, [Seen([1, 2], before=7)])[0, 4] == float("-inf")
    assert rules.apply(logits, [Seen([1, 2], before=8)])[0, 4] == 0
    assert Rules(forced_bos_token_id=[3]).apply(logits, [Seen([1], before=8)]).eq(0).all()


def test_what_looks_at_the_id_alone_needs_no_history():
    rules = Rules(suppress_tokens=[1], bad_words_ids=[[2]], sequence_bias=[[[3], 1.5]], refused=(5,))
    assert rules.changes and not rules.of_history
    bias = rules.of_ids(VOCAB, torch.device("cpu"))
    assert bias is not None and bias[[1, 2, 5]].isneginf().all() and bias[3] == 1.5 and bias.count_nonzero() == 4
    assert Rules().of_ids(VOCAB, torch.device("cpu")) is None
    assert Rules(bad_words_ids=[[2, 3]], min_new_tokens=1, eos_ids=EOS).of_history == [
        "min_new_tokens",
        "bad_words_ids",
    ]


def test_rows_from_which_nothing_can_be_chosen():
    rows = torch.zeros(5, VOCAB)
    rows[1, 3], rows[2, 4], rows[3] = float("nan"), float("inf"), float("-inf")
    rows[4, :-1] = float("-inf")
    assert unusable(rows) == [1, 2, 3]


@pytest.mark.parametrize("temperature", [1e-45, 1e-10, 9e-6])
def test_a_temperature_too_small_to_draw_with_takes_the_most_likely(temperature):
    sampling = Sampling(temperature=temperature, top_p=0.9)
    logits = 100 * torch.randn(3, VOCAB)
    assert torch.equal(sampling.choose(sampling.process(logits, []), []), logits.argmax(-1))
