"""The sampler's rules one at a time, and whole runs against denoisers whose answer is known."""

import math
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.decoding.block_diffusion import BlockDiffusionStepper, LogitsModel, generate_block_diffusion
from sparing.decoding.canvas import BlockDiffusion, StableAndConfident, entropy_bound_accept, linear_temperature
from sparing.decoding.engine import run
from sparing.decoding.events import Commit
from sparing.decoding.row import ActiveRow
from sparing.decoding.transcript import Transcript
from sparing.kernels import entropy
from tests.tiny import VOCAB, model

entropies = st.lists(st.floats(0, 3, width=32), min_size=1, max_size=12)


# Acceptance


def test_worked_acceptance():
    values = torch.tensor([[0.05, 0.04, 0.03, 0.2]])
    assert entropy_bound_accept(values, 0.1).tolist() == [[True, True, True, False]]
    assert entropy_bound_accept(values, 0.02).tolist() == [[False, False, True, False]]


@given(st.integers(1, 20), st.floats(0.01, 2), st.floats(0.01, 5))
def test_equal_entropies_are_counted(length, h, bound):
    ratio = bound / h
    if abs(ratio - round(ratio)) < 1e-3:  # exact multiples are decided by rounding
        return
    accepted = entropy_bound_accept(torch.full((1, length), h), bound)
    assert accepted.sum() == min(length, math.floor(ratio) + 1)


@given(st.lists(entropies, min_size=1, max_size=3), st.floats(0.01, 4))
def test_the_surest_are_taken_while_those_before_them_fit(rows, bound):
    length = min(map(len, rows))
    values = torch.tensor([row[:length] for row in rows])
    accepted = entropy_bound_accept(values, bound)
    for row, taken in zip(values.double(), accepted, strict=True):
        order = row.argsort(stable=True)
        before = 0.0
        for position in order.tolist():
            if abs(before - bound) > 1e-4:
                assert bool(taken[position]) == (before <= bound)
            before += float(row[position])
    assert accepted.any(-1).all()
    assert (accepted <= entropy_bound_accept(values, 2 * bound)).all()  # monotone
    assert entropy_bound_accept(values, float(values.sum()) + 1).all()
    assert entropy_bound_accept(torch.zeros_like(values), bound).all()


def test_a_permutation_of_positions_permutes_what_is_accepted():
    values = torch.rand(1, 30, generator=torch.Generator().manual_seed(0))
    order = torch.randperm(30, generator=torch.Generator().manual_seed(1))
    assert torch.equal(entropy_bound_accept(values, 0.7)[:, order], entropy_bound_accept(values[:, order], 0.7))


def test_acceptance_from_logits():
    logits = torch.randn(2, 9, 40, generator=torch.Generator().manual_seed(0)) * 4
    accepted = entropy_bound_accept(logits, 1.5)
    assert torch.equal(accepted, entropy_bound_accept(entropy(logits), 1.5))
    assert torch.equal(accepted, entropy_bound_accept(logits + 11, 1.5))
    impossible = torch.cat([logits, torch.full((2, 9, 5), float("-inf"))], -1)
    assert torch.equal(accepted, entropy_bound_accept(impossible, 1.5))


@pytest.mark.parametrize("bound", [0.0, -1.0, float("nan")])
def test_a_bound_must_be_positive(bound):
    with pytest.raises(ValueError, match="entropy_bound"):
        entropy_bound_accept(torch.zeros(1, 3), bound)


# Stopping

A, OTHER = torch.tensor([[1, 2, 3]]), torch.tensor([[1, 2, 4]])
SURE = torch.full((1, 3), 0.0049)


def test_one_step_of_history():
    stop = StableAndConfident(1, 0.005)
    assert not stop(A, SURE)
    assert stop(A, SURE)
    assert not stop(OTHER, SURE)
    assert not stop(OTHER, torch.full((1, 3), 0.005))  # strictly below
    assert stop(OTHER, SURE)
    stop.reset()
    assert not stop(OTHER, SURE)


def test_rows_stop_apart():
    stop = StableAndConfident(2, 0.005)
    both, sure = torch.cat([A, A]), SURE.expand(2, -1)
    assert stop(both, sure).tolist() == [False, False]
    assert stop(both, sure).tolist() == [False, False]
    assert stop(torch.cat([A, OTHER]), sure).tolist() == [True, False]
    assert stop(torch.cat([A, OTHER]), sure).tolist() == [True, False]
    assert stop(torch.cat([A, OTHER]), sure).tolist() == [True, True]
    assert stop(both, torch.cat([SURE, SURE + 1])).tolist() == [True, False]


@given(st.integers(0, 3), st.lists(st.tuples(st.integers(0, 1), st.booleans()), min_size=1, max_size=10))
def test_stopping_is_what_it_says(threshold, steps):
    stop, seen = StableAndConfident(threshold, 0.005), []
    for canvas, sure in steps:
        seen.append(canvas)
        flag = stop(torch.full((1, 2), canvas), torch.full((1, 2), 0.001 if sure else 0.1))
        stable = len(seen) > threshold and len(set(seen[len(seen) - threshold - 1 :])) == 1
        assert bool(flag) == (stable and sure)


def test_confidence_from_logits():
    one_hot = torch.zeros(1, 3, 50)
    one_hot[..., 7] = 1e4
    stop = StableAndConfident(0, 1e-6)
    assert stop(A, one_hot)
    assert not stop(A, torch.zeros(1, 3, 50))
    assert StableAndConfident(0, math.log(50) + 1e-4)(A, torch.zeros(1, 3, 50))


# Temperature


def test_worked_temperatures():
    schedule = [linear_temperature(n, 48, 0.4, 0.8) for n in range(48, 0, -1)]
    assert schedule[0] == pytest.approx(0.8)
    assert schedule[-1] == pytest.approx(0.4083333, abs=1e-7)
    assert sum(schedule) / 48 == pytest.approx(0.6041667, abs=1e-7)


@given(st.integers(1, 100), st.floats(0, 2), st.floats(0.01, 3))
def test_temperature_falls_and_never_reaches_the_end(steps, low, span):
    schedule = [linear_temperature(n, steps, low, low + span) for n in range(steps, 0, -1)]
    assert schedule[0] == pytest.approx(low + span)
    assert all(a > b for a, b in pairwise(schedule))
    assert schedule[-1] > low


@given(st.floats(0.1, 1), st.floats(1.01, 3), st.integers(0, 99))
def test_temperature_keeps_the_most_likely_and_spreads_the_rest(low, factor, seed):
    logits = torch.randn(5, 30, generator=torch.Generator().manual_seed(seed)) * 3
    assert torch.equal((logits / low).argmax(-1), logits.argmax(-1))
    assert (entropy(logits / (low * factor)) >= entropy(logits / low) - 1e-5).all()


# Whole runs

LENGTH = 8
SETTINGS = {"max_denoising_steps": 48, "entropy_bound": 0.1, "t_min": 0.4, "t_max": 0.8}


class Known:
    """The tiny denoiser with an answer put in its mouth: logits from what the memory holds."""

    def __init__(self, answer):
        self.inner, self.answer, self.passes = model("denoiser"), answer, 0
        self.config, self.memory, self.run = self.inner.config, self.inner.memory, self.inner.run

    def denoise(self, canvas, memory, soft=None):
        self.passes += 1
        return self.answer(memory.length)


def oracle(text, start):
    """Certain of `text`, whose first token stands at position `start`."""

    def answer(position):
        target = torch.tensor(text[position - start :][:LENGTH])
        return 1e4 * torch.nn.functional.one_hot(target, VOCAB).float()

    return answer


PROMPT = torch.tensor([[5, 6, 7]])
TEXT = [(3 * i) % 50 + 2 for i in range(4 * LENGTH)]


@pytest.mark.parametrize("threshold", [0, 1, 3])
def test_an_oracle_is_done_as_soon_as_it_may_stop(threshold):
    denoiser = Known(oracle(TEXT, 3))
    config = SETTINGS | {"max_new_tokens": 3 * LENGTH, "stability_threshold": threshold}
    sequences, tokens_per_forward, memories = generate_block_diffusion(denoiser, PROMPT, config)
    assert sequences.tolist() == [PROMPT[0].tolist() + TEXT[: 3 * LENGTH]]
    assert denoiser.passes == 3 * (threshold + 1)
    assert tokens_per_forward.tolist() == [LENGTH / (threshold + 1)]
    assert memories[0].length == 3 + 2 * LENGTH  # the last canvas is not encoded


@pytest.mark.parametrize("new_tokens", [1, LENGTH - 1, LENGTH, LENGTH + 1, 3 * LENGTH])
def test_output_is_whole_canvases(new_tokens):
    sequences, _, _ = generate_block_diffusion(
        Known(oracle(TEXT, 3)), PROMPT, SETTINGS | {"max_new_tokens": new_tokens}
    )
    assert sequences.shape == (1, 3 + LENGTH * math.ceil(new_tokens / LENGTH))


def test_a_denoiser_that_knows_nothing_uses_every_step():
    denoiser, drafts = Known(lambda position: torch.zeros(LENGTH, VOCAB)), []
    streamer = SimpleNamespace(put_draft=drafts.append, put=lambda ids: None)
    config = SETTINGS | {"max_denoising_steps": 7, "max_new_tokens": 2 * LENGTH}
    generate_block_diffusion(denoiser, PROMPT, config, streamer=streamer)
    assert denoiser.passes == len(drafts) == 14
    # ln 61 nats at every position: only the first in order fits any bound below that.
    assert entropy_bound_accept(torch.zeros(1, LENGTH, VOCAB), 0.1).sum() == 1


def test_logits_of_zeros_are_a_signal_and_no_pass_before_is_none():
    """Feeding zeros back means a uniform prediction, which is not the same as no prediction."""
    fed = []

    class Uncertain(Known):
        def denoise(self, canvas, memory, soft=None):
            fed.append(soft)
            return super().denoise(canvas, memory, soft)

    denoiser = Uncertain(lambda position: torch.zeros(LENGTH, VOCAB))
    generate_block_diffusion(denoiser, PROMPT, SETTINGS | {"max_denoising_steps": 3, "max_new_tokens": LENGTH})
    assert fed[0] is None
    assert all(soft is not None and soft.shape == (LENGTH, VOCAB) and not soft.any() for soft in fed[1:])


@pytest.mark.parametrize("holes", [(), (2, 6)])
def test_given_text_stays_until_another_token_is_certain(holes):
    """A model that believes what it reads, loosely, and knows one token better."""

    class Reader(Known):
        def denoise(self, canvas, memory, soft=None):
            seen.append(canvas.tolist())
            logits = 5.0 * torch.nn.functional.one_hot(canvas, VOCAB)
            logits[4] = 1e4 * torch.nn.functional.one_hot(torch.tensor(9), VOCAB)
            return logits

    seen, denoiser, text = [], Reader(None), [20, 21, 22, 23, 24, 25, 26, 27]
    given = [None if i in holes else token for i, token in enumerate(text)]
    generator = torch.Generator().manual_seed(0)
    row = ActiveRow(0, PROMPT[0], denoiser.memory(), Transcript(None, [], (), LENGTH), generator)
    settings = BlockDiffusion(max_denoising_steps=6)
    stepper = BlockDiffusionStepper(denoiser, row, settings, given=given)
    commit = next(event for event in run(LogitsModel(denoiser), [stepper]) if isinstance(event, Commit))
    right = [9 if i == 4 else token for i, token in enumerate(text)]
    assert [commit.ids[i] for i in range(LENGTH) if i not in holes] == [
        right[i] for i in range(LENGTH) if i not in holes
    ]
    assert len(seen) == (6 if holes else 2)  # without noise it is over when nothing changes
    for hole in holes:
        assert len({canvas[hole] for canvas in seen}) > 1  # noise is renoised


@pytest.mark.parametrize("off", ["stability_threshold", "confidence_threshold"])
def test_without_a_threshold_every_step_is_run(off):
    denoiser = Known(oracle(TEXT, 3))
    config = SETTINGS | {"max_denoising_steps": 5, "max_new_tokens": 2 * LENGTH, off: None}
    sequences, _, _ = generate_block_diffusion(denoiser, PROMPT, config)
    assert denoiser.passes == 10
    assert sequences[0, 3:].tolist() == TEXT[: 2 * LENGTH]


def test_ends_and_padding():
    """A batch padded on the left; each row's text ends at its own place."""
    prompts = torch.tensor([[0, 0, 5, 6], [5, 6, 7, 8]])
    mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    ends = {2: 5, 4: 13}  # prompt length -> index of the end id in the row's text

    def answer(position):
        start = 2 if (position - 2) % LENGTH == 0 else 4
        text = list(TEXT)
        text[ends[start]] = 60
        return oracle(text, start)(position)

    streams = []
    config = SETTINGS | {"max_new_tokens": 4 * LENGTH, "eos_token_id": [60, 59], "pad_token_id": 0}
    sequences, tokens_per_forward, memories = generate_block_diffusion(
        Known(answer), prompts, config, mask, SimpleNamespace(put_draft=lambda ids: None, put=streams.append)
    )
    assert sequences[0, 4:].tolist() == [*TEXT[:5], 60] + [0] * (2 * LENGTH - 6)
    assert sequences[1, 4:].tolist() == [*TEXT[:13], 60] + [0] * (2 * LENGTH - 14)
    assert tokens_per_forward.tolist() == [6 / 2, 14 / 4]
    assert [memory.length for memory in memories] == [2, 4 + LENGTH]
    assert len(streams) == 3


def test_rows_with_their_own_generators_equal_single_runs():
    """Also while neighbours settle, commit and leave at other times."""
    denoiser = model("denoiser")
    prompts = [[7, 8, 9, 10, 11], [3, 4], [20, 21, 22]]
    config = SETTINGS | {
        "max_denoising_steps": 6,
        "t_min": 0.01,
        "t_max": 0.3,
        "confidence_threshold": 0.5,
        "max_new_tokens": 2 * LENGTH,
    }
    padded, mask = torch.zeros(3, 5, dtype=torch.long), torch.zeros(3, 5, dtype=torch.long)
    for i, prompt in enumerate(prompts):
        padded[i, 5 - len(prompt) :], mask[i, 5 - len(prompt) :] = torch.tensor(prompt), 1

    def generators():
        return [torch.Generator().manual_seed(i) for i in range(3)]

    together, rates, _ = generate_block_diffusion(denoiser, padded, config, mask, generator=generators())
    for i, prompt in enumerate(prompts):
        alone, rate, _ = generate_block_diffusion(denoiser, torch.tensor([prompt]), config, generator=[generators()[i]])
        assert torch.equal(alone[0, len(prompt) :], together[i, 5:])
        assert rate[0] == rates[i]


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("max_denoising_steps", 0),
        ("entropy_bound", 0.0),
        ("t_min", -0.1),
        ("t_max", 0.3),
        ("stability_threshold", -1),
        ("confidence_threshold", 0.0),
    ],
)
def test_settings_out_of_range_are_named(setting, value):
    with pytest.raises(ValueError, match=setting):
        BlockDiffusion(**{setting: value})


def test_an_empty_prompt():
    with pytest.raises(ValueError, match="prompt is empty"):
        generate_block_diffusion(model("denoiser"), torch.zeros(1, 0, dtype=torch.long), SETTINGS)
