"""Compressed windows: as their definition says, and to the bit however a text is cut."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.kernels.compressor import (
    PooledRow,
    PoolTable,
    compress_windows,
    csa_compress,
    empty_windows,
    pool_rows,
)
from tests.kernel_sets import using

LAYERS = 3


def draw(*shape: int, seed: int = 0, dtype=torch.float32) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def defined(kv, gate, ape, c):
    """Entries [n, d] of [T, c * d], one number at a time, in float64."""
    m, d = ape.shape[0], kv.shape[1] // c
    entries = torch.zeros(len(kv) // m, d, dtype=torch.float64)
    for w in range(len(entries)):
        for channel in range(d):
            slots = [(t, (c - 1) * d + channel) for t in range(w * m, (w + 1) * m)]
            if c == 2 and w:
                slots += [(t, channel) for t in range((w - 1) * m, w * m)]
            weights = [math.exp(gate[t, j].double() + ape[t % m, j].double()) for t, j in slots]
            mixed = sum(weight * kv[t, j].double() for weight, (t, j) in zip(weights, slots, strict=True))
            entries[w, channel] = mixed / sum(weights)
    return entries


def test_worked_examples():
    kv = torch.arange(1.0, 6.0).view(1, 5, 1)
    gate, ape = torch.zeros(1, 5, 1), torch.tensor([[0.0], [math.log(3)]])
    torch.testing.assert_close(compress_windows(kv, gate, ape), torch.tensor([[[1.75], [3.75]]]))
    torch.testing.assert_close(compress_windows(kv, gate, 0 * ape), torch.tensor([[[1.5], [3.5]]]))
    gate[0, 2] = 50
    torch.testing.assert_close(compress_windows(kv, gate, ape)[0, 1], torch.tensor([3.0]))

    kv = torch.tensor([[[10.0, 1], [20, 2], [30, 3], [40, 4]]])
    zeros = torch.zeros(1, 4, 2)
    entries, state = csa_compress(kv, zeros, torch.zeros(2, 2))
    torch.testing.assert_close(entries, torch.tensor([[[1.5], [9.25]]]))
    assert state.tokens == 4
    entries, _ = csa_compress(kv, zeros, torch.tensor([[0, 0], [0, math.log(3)]]))
    torch.testing.assert_close(entries, torch.tensor([[[1.75], [7.5]]]))


@pytest.mark.parametrize("c", [1, 2])
@pytest.mark.parametrize(("m", "tokens"), [(4, 0), (4, 3), (4, 4), (4, 23), (1, 5), (7, 30)])
def test_entries_are_as_defined(c, m, tokens):
    kv, gate, ape = draw(tokens, c * 5, seed=1), 3 * draw(tokens, c * 5, seed=2), draw(m, c * 5, seed=3)
    expected = defined(kv, gate, ape, c)
    found = compress_windows(kv[None], gate[None], ape) if c == 1 else csa_compress(kv[None], gate[None], ape)[0]
    assert found.dtype == torch.float32
    torch.testing.assert_close(found[0].double(), expected, rtol=1e-5, atol=1e-6)
    if c == 2:
        exact, _ = csa_compress(kv[None].double(), gate[None].double(), ape)
        torch.testing.assert_close(exact[0], expected, rtol=1e-12, atol=1e-12)


@given(st.lists(st.integers(0, 9), max_size=8))
def test_any_cut_gives_the_same_bits(lengths):
    tokens = sum(lengths)
    kv, gate, ape = draw(2, tokens, 6, seed=1), 4 * draw(2, tokens, 6, seed=2), draw(4, 6, seed=3)
    whole, end = csa_compress(kv, gate, ape)
    parts, state = [whole[:, :0]], None
    for some, gates in zip(kv.split(lengths, 1), gate.split(lengths, 1), strict=True):
        entries, state = csa_compress(some, gates, ape, state)
        parts.append(entries)
    assert torch.equal(torch.cat(parts, 1), whole)
    assert state is None or (torch.equal(state.sums, end.sums) and state.tokens == tokens)


def test_entries_have_gradients():
    shapes = ((1, 5, 4), (1, 5, 4), (2, 4))
    kv, gate, ape = (draw(*x, seed=i, dtype=torch.float64).requires_grad_() for i, x in enumerate(shapes))
    torch.autograd.gradcheck(lambda *x: csa_compress(*x)[0], (kv, gate, ape))
    torch.autograd.gradcheck(compress_windows, (kv, gate, ape))


class Texts:
    """Rows of a batch that go on from where they are, in every layer."""

    def __init__(self, count: int, m: int, c: int, d: int):
        self.m, self.c, self.d = m, c, d
        self.windows = [empty_windows(LAYERS, c, d) for _ in range(count)]
        self.lengths = [0] * count

    def step(self, layer: int, kv: list[torch.Tensor], gate: list[torch.Tensor], ape: torch.Tensor):
        """One layer of a pass; what it leaves is taken over at once."""
        rows = [
            PooledRow(len(x), first, before, torch.full_like(before, torch.nan))
            for x, first, before in zip(kv, self.lengths, self.windows, strict=True)
        ]
        found = pool_rows(torch.cat(kv), torch.cat(gate), ape, PoolTable(rows), layer)
        for row in rows:
            row.before[layer] = row.after[layer]
        return list(found.split([row.closed(self.m) for row in rows]))


CUTS = [[5, 0, 1, 9], [1, 40, 1, 0], [3, 3, 3, 3], [1, 1, 1, 33], [300, 0, 1, 2]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("m", "c", "d"), [(4, 2, 24), (4, 2, 37), (128, 1, 40), (3, 1, 16), (1, 2, 8)])
def test_rows_of_a_batch(each_kernel_set, m, c, d, dtype):
    """Each row is as alone and as in one pass, to the bit, and as the reference says."""
    ape = draw(m, c * d, seed=9)
    lengths = [sum(cuts[i] for cuts in CUTS) for i in range(4)]
    wide = [draw(n, 2 * c * d, seed=i, dtype=dtype) for i, n in enumerate(lengths)]  # two projections side by side
    kv, gate = [x[:, : c * d] for x in wide], [4 * x[:, c * d :] for x in wide]
    texts = Texts(4, m, c, d)
    found: list[list[torch.Tensor]] = [[] for _ in kv]
    for cuts in CUTS:
        some = [slice(at, at + n) for at, n in zip(texts.lengths, cuts, strict=True)]
        pieces = [[x[s] for x, s in zip(xs, some, strict=True)] for xs in (kv, gate)]
        entries = texts.step(1, *pieces, ape)
        texts.lengths = [s.stop for s in some]
        for parts, new in zip(found, entries, strict=True):
            parts.append(new)
    for i in range(4):
        alone = Texts(1, m, c, d)
        (entries,) = alone.step(1, kv[i : i + 1], gate[i : i + 1], ape)
        assert torch.equal(torch.cat(found[i]), entries)
        assert torch.equal(alone.windows[0], texts.windows[i])  # of the other layers too
        with using("reference"):
            same = Texts(1, m, c, d)
            (expected,) = same.step(1, kv[i : i + 1], gate[i : i + 1], ape)
        torch.testing.assert_close(entries, expected, rtol=2e-5, atol=2e-5)
        torch.testing.assert_close(alone.windows[0], same.windows[0], rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("c", [1, 2])
def test_gates_of_any_size(each_kernel_set, c):
    """Gates far apart, and infinite ones that hide a token, make no NaN."""
    kv, gate, ape = draw(8, c * 6), 1e4 * draw(8, c * 6, seed=1), torch.zeros(4, c * 6)
    gate[0], gate[4:] = -torch.inf, -torch.inf
    (entries,) = Texts(1, 4, c, 6).step(0, [kv], [gate], ape)
    assert torch.isfinite(entries[0]).all()
    own = slice(-6, None)
    best = gate[:4, own].argmax(0)
    torch.testing.assert_close(entries[0], kv[:4, own].gather(0, best[None])[0])


def test_threads_make_no_difference(native_kernel_set):
    kv, gate, ape = draw(300, 2 * 500), draw(300, 2 * 500, seed=1), draw(4, 2 * 500, seed=2)
    threads, found = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        found += Texts(1, 4, 2, 500).step(0, [kv], [gate], ape)
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_what_does_not_fit_is_refused(each_kernel_set):
    windows = empty_windows(LAYERS, 2, 6)
    table = PoolTable([PooledRow(3, 0, windows, windows.clone())])
    good, ape = torch.zeros(3, 12), torch.zeros(4, 12)
    for kv, gate, bias in ((good[:2], good, ape), (good, good[:, 1:], ape), (good, good, ape[:, :6])):
        with pytest.raises(ValueError, match="expected"):
            pool_rows(kv, gate, bias, table, 0)
    with pytest.raises(ValueError, match=r"kv has shape \[1, 3, 5\], expected \[1, 3, 2 d\]"):
        csa_compress(torch.zeros(1, 3, 5), torch.zeros(1, 3, 5), torch.zeros(4, 5))
    with pytest.raises(ValueError, match="gate has shape"):
        compress_windows(torch.zeros(1, 3, 5), torch.zeros(1, 2, 5), torch.zeros(4, 5))
