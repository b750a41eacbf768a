"""What is computed over the whole vocabulary, without holding all logits."""

import weakref
from importlib import import_module

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparing.kernels import entropy, gumbel, softcap, vocabulary_softmax
from sparing.kernels.vocabulary import VocabularyPass

L, D, V = 6, 8, 103
vocabulary = import_module("sparing.kernels.vocabulary")


def operands(seed=0, size=V):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(L, D, generator=g) * 3, torch.randn(size, D, generator=g)


def rows_per_block(monkeypatch, rows, width=D):
    monkeypatch.setattr(vocabulary, "BLOCK_BYTES", rows * width * 4)


@pytest.mark.parametrize("cap", [None, 30.0, 12.0])
@pytest.mark.parametrize("temperature", [1.0, 0.4, torch.linspace(0.05, 3, L)])
@pytest.mark.parametrize("block", [1, 7, 50, 103, 1000])
def test_streaming_equals_materialising(cap, temperature, block, monkeypatch):
    rows_per_block(monkeypatch, block)
    hidden, table = operands()
    result = vocabulary_softmax(hidden, table, temperature=temperature, cap=cap, embedding=table)
    logits = hidden.double() @ table.double().T
    logits = logits if cap is None else cap * torch.tanh(logits / cap)
    z = logits / (temperature[:, None].double() if isinstance(temperature, torch.Tensor) else temperature)
    p = torch.softmax(z, -1)
    assert torch.equal(result.argmax, z.argmax(-1))
    assert torch.equal(result.sample, result.argmax)  # without noise
    expected = -(p * torch.log_softmax(z, -1)).sum(-1)
    torch.testing.assert_close(result.entropy.double(), expected, rtol=1e-4, atol=2e-5)
    assert result.soft is not None
    torch.testing.assert_close(result.soft.double(), p @ table.double(), rtol=1e-4, atol=2e-5)


@given(st.lists(st.integers(1, 40), min_size=1, max_size=8), st.integers(0, 99))
def test_any_cut_of_the_vocabulary(cuts, seed):
    size = sum(cuts)
    g = torch.Generator().manual_seed(seed)
    z, table = torch.randn(L, size, generator=g) * 5, torch.randn(size, D, generator=g)
    noise = torch.randn(L, size, generator=g)

    def run(widths):
        accumulated = VocabularyPass()
        for block, rows, extra in zip(z.split(widths, 1), table.split(widths), noise.split(widths, 1), strict=True):
            accumulated.update(block, extra, rows)
        return accumulated.result()

    whole, cut = run([size]), run(cuts)
    assert torch.equal(whole.argmax, cut.argmax)
    assert torch.equal(whole.sample, cut.sample)
    assert torch.equal(whole.sample, (z + noise).argmax(-1))
    torch.testing.assert_close(whole.entropy, cut.entropy, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(whole.soft, cut.soft, rtol=1e-4, atol=1e-5)


def test_ties_take_the_first_id_in_any_cut():
    z = torch.tensor([[1.0, 4.0, 4.0, 0.0, 4.0]])
    for widths in ([5], [2, 3], [1] * 5, [3, 2]):
        accumulated = VocabularyPass()
        for block in z.split(widths, 1):
            accumulated.update(block)
        assert accumulated.result().argmax.tolist() == [1]


def test_impossible_ids_count_as_nothing():
    """Logits of -inf, also for whole blocks, first or last."""
    g = torch.Generator().manual_seed(0)
    z, table = torch.randn(L, 12, generator=g), torch.randn(12, D, generator=g)
    z[:, [0, 1, 2, 3, 6, 9, 10, 11]] = float("-inf")
    possible = [4, 5, 7, 8]
    for widths in ([12], [4, 4, 4], [2] * 6, [9, 3]):
        accumulated = VocabularyPass()
        for block, rows in zip(z.split(widths, 1), table.split(widths), strict=True):
            accumulated.update(block, None, rows)
        result = accumulated.result()
        torch.testing.assert_close(result.entropy, entropy(z[:, possible]))
        torch.testing.assert_close(result.soft, torch.softmax(z[:, possible], -1) @ table[possible])
        assert torch.equal(result.argmax, z.argmax(-1))


def test_entropy_of_known_distributions():
    one_hot = torch.full((2, 50), -1e4)
    one_hot[0, 3], one_hot[1, 49] = 1e4, 1e4
    assert entropy(one_hot).tolist() == [0.0, 0.0]
    torch.testing.assert_close(entropy(torch.full((3, 4, 50), 7.0)), torch.full((3, 4), 50.0).log())
    half = torch.tensor([0.0, float("-inf"), 0.0, float("-inf")])
    torch.testing.assert_close(entropy(half), torch.tensor(2.0).log())


@given(st.floats(-1e3, 1e3), st.integers(0, 99))
def test_entropy_ignores_a_shift_and_stays_within_bounds(shift, seed):
    z = torch.randn(5, 40, generator=torch.Generator().manual_seed(seed)) * 4
    h = entropy(z)
    torch.testing.assert_close(entropy(z + shift), h, rtol=1e-3, atol=1e-3)
    assert (h >= 0).all()
    assert (h <= torch.tensor(40.0).log() + 1e-5).all()
    torch.testing.assert_close(h, torch.distributions.Categorical(logits=z).entropy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [3, 1000])
def test_samples_follow_the_distribution(block, monkeypatch):
    """Chi-square over 7 ids with 6 degrees of freedom: 22.5 is exceeded once in a thousand seeds."""
    rows_per_block(monkeypatch, block)
    draws = 20000
    hidden, table = torch.randn(1, D).expand(draws, D), torch.randn(7, D) * 0.5
    generator = torch.Generator().manual_seed(5)
    noise = gumbel([generator], [draws], torch.device("cpu"))
    result = vocabulary_softmax(hidden, table, temperature=0.8, cap=5.0, noise=noise)
    expected = torch.softmax(softcap(hidden[0] @ table.T, 5.0) / 0.8, -1) * draws
    counts = torch.bincount(result.sample, minlength=7)
    assert ((counts - expected).square() / expected).sum() < 22.5
    assert (result.argmax == expected.argmax()).all()


def test_rows_draw_from_their_own_generators():
    """A row's sample is the same whoever stands beside it."""

    def sample(seeds):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        hidden, table = operands()
        noise = gumbel(generators, [2] * len(seeds), torch.device("cpu"))
        return vocabulary_softmax(hidden[:2].repeat(len(seeds), 1), table, noise=noise).sample.split(2)

    together = sample([1, 2, 3])
    for seed, drawn in zip([1, 2, 3], together, strict=True):
        assert torch.equal(sample([seed])[0], drawn)


class LiveTensors(TorchDispatchMode):
    """Follows every tensor that operations make, for as long as it lives."""

    def __init__(self):
        super().__init__()
        self.live = self.peak = self.largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().data_ptr() not in inputs:
                size = tensor.untyped_storage().nbytes()
                self.live += size
                self.largest = max(self.largest, size)
                weakref.finalize(tensor, self.release, size)
        self.peak = max(self.peak, self.live)
        return result

    def release(self, size):
        self.live -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_tensor_of_all_logits_is_ever_held(dtype):
    length, width, size = 16, 512, 40000  # the table is several blocks, each a fraction of the vocabulary
    assert size * width * dtype.itemsize > 4 * vocabulary.BLOCK_BYTES
    hidden, table = torch.randn(length, width).to(dtype), torch.randn(size, width).to(dtype)
    generator = torch.Generator().manual_seed(0)
    noise = gumbel([generator], [length], torch.device("cpu"))
    with LiveTensors() as tracker:
        vocabulary_softmax(hidden, table, temperature=0.5, cap=30.0, noise=noise, embedding=table)
    logits = length * size * 4
    assert tracker.largest < logits / 2
    assert tracker.peak < 2 * logits
