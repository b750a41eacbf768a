"""Sampling against transformers' logits processors, and the frequencies of what is drawn."""

import pytest
import torch
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from sparing.decoding.rules import Seen
from sparing.decoding.sampling import Sampling, row_generator

ROWS, VOCAB = 5, 101
SETTINGS = {
    "temperature": {"temperature": 0.7},
    "top_k": {"temperature": 1.0, "top_k": 7},
    "top_k of 1": {"temperature": 1.3, "top_k": 1},
    "top_k beyond the vocabulary": {"temperature": 1.0, "top_k": 500},
    "top_p": {"temperature": 1.0, "top_p": 0.8},
    "small top_p": {"temperature": 1.0, "top_p": 0.01},
    "top_p of 1": {"temperature": 1.0, "top_p": 1.0},
    "min_p": {"temperature": 1.0, "min_p": 0.1},
    "penalty": {"temperature": 1.0, "repetition_penalty": 1.4},
    "reward": {"temperature": 1.0, "repetition_penalty": 0.8},
    "all": {"temperature": 0.6, "top_k": 30, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.2},
}


def random_logits(seed: int) -> torch.Tensor:
    return 3 * torch.randn(ROWS, VOCAB, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
def test_processing_is_that_of_transformers(settings):
    theirs = LogitsProcessorList()
    if "repetition_penalty" in settings:
        theirs.append(RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]))
    theirs.append(TemperatureLogitsWarper(settings["temperature"]))
    if "top_k" in settings:
        theirs.append(TopKLogitsWarper(settings["top_k"]))
    if "top_p" in settings:
        theirs.append(TopPLogitsWarper(settings["top_p"]))
    if "min_p" in settings:
        theirs.append(MinPLogitsWarper(settings["min_p"]))
    for seed in range(20):
        logits = random_logits(seed)
        seen = torch.randint(VOCAB, (ROWS, 12), generator=torch.Generator().manual_seed(seed))
        before = logits.clone()
        ours = Sampling(**settings).process(logits, [Seen(ids.tolist()) for ids in seen])
        expected = theirs(seen, before.clone())
        assert torch.equal(ours.isinf(), expected.isinf())
        assert torch.allclose(ours, expected, rtol=1e-6, atol=1e-5)
        assert torch.equal(logits, before)


@pytest.mark.parametrize("settings", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 6, "top_p": 0.9}])
def test_frequencies_of_samples(settings):
    """Chi-square against the probabilities; 40 is above the 99.9 % quantile of 15 degrees of freedom (37.7)."""
    sampling, draws = Sampling(**settings), 20000
    logits = torch.randn(1, 16, generator=torch.Generator().manual_seed(3))
    processed = sampling.process(logits, [])
    generator = row_generator(11, 0)
    chosen = sampling.choose(processed.expand(draws, -1), [generator] * draws)
    counts = chosen.bincount(minlength=16).double()
    expected = processed[0].double().softmax(-1) * draws
    possible = expected > 0
    assert counts[~possible].sum() == 0
    assert ((counts - expected)[possible] ** 2 / expected[possible]).sum() < 40


def test_temperature_0_takes_the_most_likely():
    logits = random_logits(0)
    sampling = Sampling(temperature=0.0, top_k=3)
    generators = [row_generator(0, i) for i in range(ROWS)]
    assert torch.equal(sampling.choose(sampling.process(logits, []), generators), logits.argmax(-1))


def test_a_row_draws_from_its_own_stream():
    sampling, logits = Sampling(temperature=1.0), random_logits(1)
    together = sampling.choose(logits, [row_generator(5, i) for i in range(ROWS)])
    alone = [sampling.choose(logits[i : i + 1], [row_generator(5, i)]) for i in range(ROWS)]
    assert torch.equal(together, torch.cat(alone))
    assert row_generator(5, 0).initial_seed() == 5
    assert len({row_generator(5, i).initial_seed() for i in range(50)}) == 50


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
    ],
)
def test_values_out_of_range(name, value):
    with pytest.raises(ValueError, match=f"^{name} is"):
        Sampling(**{name: value})
