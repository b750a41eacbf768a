"""Joint attention over a window and compressed entries: dense attention with a mask, and only what is named counts."""

import pytest
import torch

from sparing.kernels.released_entries import decode_entries, encode_entries
from sparing.kernels.rows import AttendedRow, RowTable
from sparing.kernels.sparse_attention import attend_joint, csa_attention, hca_attention, sparse_attention
from tests.kernel_sets import using
from tests.kernels.row_tables import spans_of

LAYERS, M, WINDOW = 2, 4, 12


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def dense(q, kv, visible, sink, scale):
    """[T, N, d] of one query after the other in float64; visible: lists of entries."""
    out = torch.zeros(q.shape, dtype=torch.float64)
    for t, seen in enumerate(visible):
        keys = kv[seen].double()
        weights = torch.exp(q[t].double() @ keys.T * scale)  # [N, entries]
        out[t] = weights @ keys / (weights.sum(1) + torch.exp(sink.double()))[:, None]
    return out


def test_only_what_is_named_counts():
    q, kv, sink = draw(3, 2, 5), draw(8, 5, seed=1), draw(2, seed=2)
    idx = torch.tensor([[0, 3, -1, 7], [-1, -1, -1, -1], [2, -1, 2, 5]])
    found = sparse_attention(q, kv, idx, sink, 0.4)
    expected = dense(q, kv, [[0, 3, 7], [], [2, 2, 5]], sink, 0.4)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    assert torch.equal(found[1], torch.zeros(2, 5))
    broken = kv.clone()
    broken[[1, 4, 6]] = torch.nan
    assert torch.equal(sparse_attention(q, broken, idx, sink, 0.4), found)
    every, whole = torch.arange(8).expand(3, -1), [range(8)] * 3
    whole = dense(q, kv, whole, sink, 0.4)
    torch.testing.assert_close(sparse_attention(q, kv, every, sink, 0.4).double(), whole, rtol=1e-5, atol=1e-6)
    pairs = [torch.stack([x, y]) for x, y in ((q, q.flip(0)), (kv, -kv), (idx, idx.flip(1)))]
    both = sparse_attention(*pairs, sink, 0.4)
    torch.testing.assert_close(both[0], found)
    torch.testing.assert_close(both[1], sparse_attention(q.flip(0), -kv, idx.flip(1), sink, 0.4))
    assert sparse_attention(q.bfloat16(), kv.bfloat16(), idx, sink, 0.4).dtype == torch.bfloat16
    assert torch.equal(sparse_attention(q, kv[:0], idx[:, :0], sink, 0.4), torch.zeros(3, 2, 5))


def test_sparse_attention_has_gradients():
    q, kv, sink = (x.double().requires_grad_() for x in (draw(2, 3, 2, 4), draw(2, 6, 4, seed=1), draw(2, seed=2)))
    idx = torch.tensor([[[0, 3, -1], [-1, -1, -1], [2, 2, 5]], [[1, 2, 3], [4, 4, -1], [0, 1, 5]]])
    torch.autograd.gradcheck(lambda *x: sparse_attention(*x[:2], idx, x[2], 0.4), (q, kv, sink))


def test_attention_of_whole_texts():
    T, N, d = 30, 3, 6
    q, kv, entries, sink = draw(T, N, d), draw(T, d, seed=1), draw(T // M, d, seed=2), draw(N, seed=3)
    both = torch.cat([kv, entries])

    def joint(t, chosen):
        return [j for j in range(T) if t - WINDOW < j <= t] + [T + w for w in chosen if 0 <= w < (t + 1) // M]

    expected = dense(q, both, [joint(t, range(T // M)) for t in range(T)], sink, 0.3)
    found = hca_attention(q, kv, entries, sink, WINDOW, M, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    idx = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(t))[:4] - 1 for t in range(T)])
    expected = dense(q, both, [joint(t, idx[t].tolist()) for t in range(T)], sink, 0.3)
    found = csa_attention(q, kv, entries, idx, sink, WINDOW, M, 0.3)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-6)
    twice = csa_attention(*(torch.stack([x, x]) for x in (q, kv, entries, idx)), sink, WINDOW, M, 0.3)
    torch.testing.assert_close(twice, torch.stack([found, found]))
    with pytest.raises(ValueError, match="window is 0"):
        hca_attention(q, kv, entries, sink, 0, M, 0.3)


ENDS = [1, 900, 3, 70, 50, 330]
QUERIES = [1, 1, 2, 40, 0, 5]
CUTS: list[list[int]] = [[], [10], [1], [1, 2, 33], [], [3, 7, 12]]
HELD = [1, 12, 3, 60, 12, 30]  # of the tokens' entries
WHOLE: list[list[int]] = [[]] * 6


class Texts:
    """Entries of rows, and tables of them. size: of an entry."""

    def __init__(self, size: int, dtype: torch.dtype):
        self.dtype, self.size = dtype, size
        self.kv = [draw(LAYERS, 1, 1, n, size, seed=n).to(dtype) for n in HELD]
        self.entries = [draw(LAYERS, 1, 1, end // M, size, seed=end).to(dtype) for end in ENDS]

    def tables(self, cuts: list[list[int]], which: list[int] | None = None) -> tuple[RowTable, RowTable]:
        like = torch.empty(LAYERS, 1, 1, 0, self.size, dtype=self.dtype)
        tokens, closed = [], []
        for i in range(6) if which is None else which:
            held, end = self.kv[i].shape[3], ENDS[i]
            spans = spans_of(self.kv[i], cuts[i], first=end - held)
            tokens.append(AttendedRow(spans, QUERIES[i], end, window=WINDOW, dropped=end - held))
            n = self.entries[i].shape[3]
            spans = spans_of(self.entries[i], [c for c in cuts[i] if c < n]) if n else []
            closed.append(AttendedRow(spans, QUERIES[i], end))
        return RowTable(tokens, like), RowTable(closed, like)


def chosen(k: int) -> torch.Tensor:
    """int32 [all queries, k]: some of what each sees, and gaps."""
    generator = torch.Generator().manual_seed(k)
    rows = []
    for n, end in zip(QUERIES, ENDS, strict=True):
        for t in range(end - n, end):
            some = torch.randperm((t + 1) // M, generator=generator)[: k - 1]
            rows.append(torch.cat([torch.tensor([-1]), some, torch.full((k - 1 - len(some),), -1)]))
    return torch.stack(rows).int()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "size"), [(16, 64), (1, 24), (5, 37), (64, 128)])
@pytest.mark.parametrize("k", [None, 9, 100])
def test_rows_of_a_batch(each_kernel_set, heads, size, k, dtype):
    texts = Texts(size, dtype)
    q, sinks = draw(sum(QUERIES), heads, size, seed=1).to(dtype), draw(heads, seed=2)
    selected = None if k is None else chosen(k)

    def attend(q, tables, selected):
        return attend_joint(q, *tables, 1, m=M, sinks=sinks, scale=0.2, selected=selected)

    found = attend(q, texts.tables(CUTS), selected)
    assert found.dtype == dtype
    assert torch.equal(found, attend(q, texts.tables(WHOLE), selected))
    at = 0
    for i, n in enumerate(QUERIES):
        both = torch.cat([texts.kv[i][1, 0, 0], texts.entries[i][1, 0, 0]])
        held = ENDS[i] - HELD[i]
        seen = []
        for j in range(n):
            t = ENDS[i] - n + j
            recent = [p - held for p in range(max(0, t - WINDOW + 1), t + 1)]
            named = range((t + 1) // M) if selected is None else selected[at + j].tolist()
            seen.append(recent + [HELD[i] + w for w in named if w >= 0])
        some = slice(at, at + n)
        tolerance = 1e-5 if dtype == torch.float32 else 1e-2
        expected = dense(q[some], both, seen, sinks, 0.2)
        torch.testing.assert_close(found[some].double(), expected, rtol=tolerance, atol=tolerance)
        alone = attend(q[some], texts.tables(CUTS, [i]), None if selected is None else selected[some])
        if using_native := each_kernel_set != "reference":
            assert torch.equal(alone, found[some])
        assert using_native or torch.allclose(alone, found[some], rtol=tolerance, atol=tolerance)
        at += n


def test_all_that_is_seen_selected_is_all(each_kernel_set):
    texts = Texts(32, torch.float32)
    q, sinks = draw(sum(QUERIES), 16, 32, seed=1), draw(16, seed=2)
    tables = texts.tables(CUTS)
    positions = [t for n, end in zip(QUERIES, ENDS, strict=True) for t in range(end - n, end)]
    every = torch.tensor([[w if w < (t + 1) // M else -1 for w in range(225)] for t in positions]).int()
    found = attend_joint(q, *tables, 0, m=M, sinks=sinks, scale=0.2, selected=every)
    expected = attend_joint(q, *tables, 0, m=M, sinks=sinks, scale=0.2)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


def test_one_pass_or_many_give_the_same_bits(native_kernel_set):
    """A query's tiles begin with what it sees, not with what is held."""
    texts, size = Texts(32, torch.float32), 32
    q, sinks = draw(40, 16, size, seed=1), draw(16, seed=2)
    tables = texts.tables(CUTS, [3])
    whole = attend_joint(q, *tables, 0, m=M, sinks=sinks, scale=0.2)
    for i in range(40):
        end, n = ENDS[3] - 39 + i, HELD[3] - 39 + i
        low = max(0, n - WINDOW)
        like = torch.empty(LAYERS, 1, 1, 0, size)
        spans = spans_of(texts.kv[3][..., low:n, :], [], first=end - n + low)
        one = RowTable([AttendedRow(spans, 1, end, window=WINDOW, dropped=end - n + low)], like)
        spans = spans_of(texts.entries[3][..., : end // M, :], [])
        closed = RowTable([AttendedRow(spans, 1, end)], like)
        found = attend_joint(q[i : i + 1], one, closed, 0, m=M, sinks=sinks, scale=0.2)
        assert torch.equal(found, whole[i : i + 1])


def test_what_is_hidden_does_not_leak(each_kernel_set):
    """NaN outside the window, in windows that close later, and in what was not selected."""
    texts, given = Texts(32, torch.float32), (None, chosen(9)[4:44])
    q, sinks = draw(40, 16, 32, seed=1), draw(16, seed=2)

    def attend(selected):
        return attend_joint(q, *texts.tables(CUTS, [3]), 0, m=M, sinks=sinks, scale=0.2, selected=selected)

    clean = [attend(selected) for selected in given]
    texts.kv[3][..., :8, :] = texts.kv[3][..., -1:, :] = texts.entries[3][..., -1:, :] = torch.nan
    for selected, expected in zip(given, clean, strict=True):
        found = attend(selected)
        assert torch.equal(found[:35], expected[:35])
        assert found[39].isnan().all()


def test_nothing_but_the_sink(each_kernel_set):
    """No entry yet, and a window alone."""
    like, sinks = torch.empty(LAYERS, 1, 1, 0, 8), draw(16)
    kv = draw(LAYERS, 1, 1, 5, 8)
    window = RowTable([AttendedRow(spans_of(kv, []), 2, 5, window=WINDOW)])
    closed = RowTable([AttendedRow([], 2, 3)], like)
    q = draw(2, 16, 8, seed=1)
    alone = attend_joint(q, window, None, 1, m=M, sinks=sinks, scale=1.0)
    expected = dense(q, kv[1, 0, 0], [range(4), range(5)], sinks, 1.0)
    torch.testing.assert_close(alone.double(), expected, rtol=1e-5, atol=1e-5)
    none = torch.full((2, 3), -1, dtype=torch.int32)
    same = attend_joint(q, window, closed, 1, m=M, sinks=sinks, scale=1.0, selected=none)
    torch.testing.assert_close(same, alone, rtol=1e-6, atol=1e-6)
    heavy = attend_joint(q, window, None, 1, m=M, sinks=sinks + 1e4, scale=1.0)
    assert torch.equal(heavy, torch.zeros_like(q))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("size", "rotary"), [(96, 32), (75, 11), (512, 64)])
def test_released_entries_are_those_they_decode_to(each_kernel_set, size, rotary, dtype):
    texts, plain = Texts(size, dtype), Texts(size, dtype)
    texts.kv, texts.entries = ([encode_entries(x, rotary) for x in held] for held in (texts.kv, texts.entries))
    texts.dtype, texts.size = torch.uint8, texts.kv[0].shape[-1]
    # Decoded numbers are exact in both types.
    plain.kv, plain.entries = (
        [decode_entries(x, size, rotary, dtype) for x in held] for held in (texts.kv, texts.entries)
    )
    q, sinks = draw(sum(QUERIES), 8, size, seed=1).to(dtype), draw(8, seed=2)
    for selected in (None, chosen(20)):
        given = {"m": M, "sinks": sinks, "scale": 0.2, "selected": selected}
        found = attend_joint(q, *texts.tables(CUTS), 1, **given, rotary=rotary)
        assert torch.equal(found, attend_joint(q, *plain.tables(CUTS), 1, **given))


def test_threads_make_no_difference(native_kernel_set):
    texts, q, sinks = Texts(64, torch.float32), draw(sum(QUERIES), 16, 64, seed=1), draw(16, seed=2)
    threads, found = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        found.append(attend_joint(q, *texts.tables(CUTS), 1, m=M, sinks=sinks, scale=0.2))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_what_does_not_fit_is_refused(each_kernel_set):
    texts = Texts(32, torch.float32)
    tables, sinks = texts.tables(CUTS, [1]), draw(16)
    q, good = draw(1, 16, 32), torch.zeros(1, 3, dtype=torch.int32)
    for some, sink, selected in ((q[..., 1:], sinks, good), (q, sinks[1:], good), (q, sinks, good.expand(2, -1))):
        with pytest.raises(ValueError, match=r"expected|q has 31 dimensions"):
            attend_joint(some, *tables, 0, m=M, sinks=sink, scale=1.0, selected=selected)
    for number, message in ((225, "holds 225"), (-2, "holds -2")):
        with pytest.raises(ValueError, match=message):
            attend_joint(q, *tables, 0, m=M, sinks=sinks, scale=1.0, selected=good + number)
    bytes_of_other_entries = Texts(48, torch.uint8)
    with pytest.raises(ValueError, match="they must be of one kind"):
        attend_joint(q, tables[0], bytes_of_other_entries.tables(CUTS, [1])[1], 0, m=M, sinks=sinks, scale=1.0)
    with pytest.raises(ValueError, match="idx holds 8, expected -1 or numbers below 8"):
        sparse_attention(q, draw(8, 32), torch.tensor([[8]]), sinks, 1.0)
    with pytest.raises(ValueError, match="idx has dtype float32"):
        sparse_attention(q, draw(8, 32), torch.zeros(1, 1), sinks, 1.0)


def test_every_set_agrees(native_kernel_set):
    texts = Texts(64, torch.float32)
    q, sinks = draw(sum(QUERIES), 16, 64, seed=1), draw(16, seed=2)
    found = attend_joint(q, *texts.tables(CUTS), 1, m=M, sinks=sinks, scale=0.2, selected=chosen(70))
    with using("reference"):
        expected = attend_joint(q, *texts.tables(CUTS), 1, m=M, sinks=sinks, scale=0.2, selected=chosen(70))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
