"""Which entries the lightning indexer selects: as defined, lowest first among equals, and alike in any company."""

import pytest
import torch

from sparing.kernels.indexer import lightning_index, select_rows, select_topk
from sparing.kernels.released_entries import decode_keys, encode_keys, round_queries
from sparing.kernels.rows import AttendedRow, RowTable
from tests.kernel_sets import using
from tests.kernels.row_tables import spans_of

LAYERS, M = 2, 4


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_worked_example():
    q, w = torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[1, -0.5]])
    keys = torch.tensor([[2.0, -1], [1, 3], [-1, 1]])
    scores = lightning_index(q, keys, w)
    torch.testing.assert_close(scores, torch.tensor([[1.0, -0.25, -0.25]]))
    assert select_topk(scores, 2).tolist() == [[0, 1]]
    assert select_topk(scores, 2, torch.tensor([1])).tolist() == [[0, -1]]
    assert select_topk(scores, 9, torch.tensor([0])).tolist() == [[-1, -1, -1]]
    assert lightning_index(q, keys, w, torch.tensor([1])).tolist()[0][1:] == [-torch.inf] * 2


def defined(q, keys, w):
    """Scores [T, M] in float64."""
    q, keys, w = q.double(), keys.double(), w.double()
    scores = torch.zeros(len(q), len(keys), dtype=torch.float64)
    for h in range(q.shape[1]):
        scores += w[:, h : h + 1] * (q[:, h] @ keys.T).clamp(min=0)
    return scores * (q.shape[1] * q.shape[2]) ** -0.5


def test_scores_are_as_defined():
    q, keys, w = draw(3, 5, 8), draw(7, 8, seed=1), draw(3, 5, seed=2)
    torch.testing.assert_close(lightning_index(q, keys, w).double(), defined(q, keys, w), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(lightning_index(q.double(), keys, w), defined(q, keys, w), rtol=1e-12, atol=1e-12)


def test_the_largest_come_first_and_of_equals_the_lowest():
    scores = torch.tensor([[0.0, 2, -0.0, 2, 5, 0]])
    assert select_topk(scores, 4).tolist() == [[4, 1, 3, 0]]
    assert select_topk(torch.zeros(1, 100), 30).tolist() == [list(range(30))]
    with pytest.raises(ValueError, match="k is 0, expected at least 1"):
        select_topk(scores, 0)


def table(keys: list[torch.Tensor], cuts: list[list[int]], queries: list[int], ends: list[int], dtype) -> RowTable:
    """keys: [LAYERS, n, d] of each row."""
    rows = [
        AttendedRow(spans_of(x[:, None, None].to(dtype), cut) if x.shape[1] else [], n, end)
        for x, cut, n, end in zip(keys, cuts, queries, ends, strict=True)
    ]
    return RowTable(rows, like=torch.empty(LAYERS, 1, 1, 0, keys[0].shape[-1], dtype=dtype))


ENDS = [3, 900, 4, 70, 2001, 2600]
QUERIES = [2, 1, 1, 40, 0, 5]
CUTS: list[list[int]] = [[], [64, 130], [], [1, 2], [], [7, 70, 71, 300]]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("heads", "d", "k"), [(16, 32, 20), (64, 128, 512), (5, 23, 1), (3, 16, 7)])
def test_rows_of_a_batch(each_kernel_set, heads, d, k, dtype):
    keys = [draw(LAYERS, end // M, d, seed=end) for end in ENDS]
    q, w = draw(sum(QUERIES), heads, d, seed=1).to(dtype), draw(sum(QUERIES), heads, seed=2)
    rows = table(keys, CUTS, QUERIES, ENDS, dtype)
    found = select_rows(q, w, rows, 1, m=M, k=k)
    assert found.dtype == torch.int32 and found.shape == (sum(QUERIES), min(k, 2600 // M))
    at = 0
    for i, (n, end) in enumerate(zip(QUERIES, ENDS, strict=True)):
        scores = defined(q[at : at + n], keys[i][1].to(dtype), w[at : at + n])
        for j in range(n):
            seen = (end - n + j + 1) // M
            taken, chosen = found[at + j].tolist(), min(k, seen)
            assert taken[:chosen] == sorted(set(taken[:chosen])) and set(taken[chosen:]) <= {-1}
            assert all(0 <= w < seen for w in taken[:chosen])
            rest = torch.ones(seen, dtype=torch.bool)
            rest[taken[:chosen]] = False
            if 0 < chosen < seen:
                assert scores[j, taken[:chosen]].min() >= scores[j, :seen][rest].max() - 1e-5
        if n:
            alone = table(keys[i : i + 1], [[]], [n], [end], dtype)
            same = select_rows(q[at : at + n], w[at : at + n], alone, 1, m=M, k=k)
            assert torch.equal(same, found[at : at + n, : same.shape[1]])
        at += n


def test_of_equal_scores_the_lowest(each_kernel_set):
    """Keys that no head agrees with score 0, with either sign."""
    keys = [-draw(LAYERS, 700, 8).abs()]
    keys[0][:, 650] = 1.0
    q, w = draw(3, 4, 8, seed=1).abs(), -draw(3, 4, seed=2).abs()
    w[1] *= -1
    w[2, 1:] *= -1
    found = select_rows(q, w, table(keys, [[]], [3], [2800], torch.float32), 0, m=M, k=9)
    assert found[0].tolist() == list(range(9))
    assert found[1].tolist() == [*range(8), 650]


@pytest.mark.parametrize("k", [3, 64, 2000])
def test_what_is_hidden_does_not_matter(each_kernel_set, k):
    """NaN in entries that a query does not see yet."""
    keys = draw(LAYERS, 500, 16)
    q, w = draw(2, 16, 16, seed=1), draw(2, 16, seed=2)
    clean = select_rows(q, w, table([keys], [[3]], [2], [2000], torch.float32), 0, m=M, k=k)
    keys[:, -1] = torch.nan
    found = select_rows(q, w, table([keys], [[3]], [2], [2000], torch.float32), 0, m=M, k=k)
    assert torch.equal(found[0], clean[0]) and 499 in found[1].tolist()


def test_no_entry_yet(each_kernel_set):
    q, w = draw(2, 16, 8), draw(2, 16)
    found = select_rows(q, w, table([draw(LAYERS, 0, 8)], [[]], [2], [2], torch.float32), 0, m=M, k=5)
    assert found.tolist() == [[-1], [-1]]


def test_native_selects_what_the_reference_selects(native_kernel_set):
    """Where scores are integers there is nothing to round."""
    keys = torch.randint(-3, 4, (LAYERS, 3000, 16), generator=torch.Generator().manual_seed(0)).float()
    q = torch.randint(-3, 4, (4, 16, 16), generator=torch.Generator().manual_seed(1)).float()
    w = torch.randint(-3, 4, (4, 16), generator=torch.Generator().manual_seed(2)).float()
    for k in (1, 17, 512, 2999, 5000):
        rows = table([keys], [[100]], [4], [12002], torch.float32)
        found = select_rows(q, w, rows, 1, m=M, k=k)
        with using("reference"):
            assert torch.equal(found, select_rows(q, w, rows, 1, m=M, k=k))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_released_keys_are_those_they_decode_to(each_kernel_set, dtype):
    ends, queries, cuts = [2600, 70], [3, 2], [[7, 300], [5]]
    packed = [encode_keys(draw(LAYERS, end // M, 64, seed=end)) for end in ends]
    keys = [decode_keys(x, 64) for x in packed]
    q, w = round_queries(draw(5, 16, 64, seed=1)).to(dtype), draw(5, 16, seed=2)
    found = select_rows(q, w, table(packed, cuts, queries, ends, torch.uint8), 1, m=M, k=50)
    # Decoded keys are exact in both types.
    assert torch.equal(found, select_rows(q, w, table(keys, cuts, queries, ends, dtype), 1, m=M, k=50))


def test_threads_make_no_difference(native_kernel_set):
    keys, q, w = draw(LAYERS, 3000, 64), draw(5, 16, 64, seed=1), draw(5, 16, seed=2)
    threads, found = torch.get_num_threads(), []
    for n in (1, 3):
        torch.set_num_threads(n)
        found.append(select_rows(q, w, table([keys], [[9]], [5], [12000], torch.float32), 0, m=M, k=500))
    torch.set_num_threads(threads)
    assert torch.equal(*found)


def test_what_does_not_fit_is_refused(each_kernel_set):
    rows = table([draw(LAYERS, 5, 8)], [[]], [2], [20], torch.float32)
    q, w = draw(2, 16, 8), draw(2, 16)
    for some, weights in ((q[:1], w), (q[..., 1:], w), (q, w[:, 1:])):
        with pytest.raises(ValueError, match=r"expected|q has 7 dimensions"):
            select_rows(some, weights, rows, 0, m=M, k=3)
    with pytest.raises(ValueError, match="k is 0"):
        select_rows(q, w, rows, 0, m=M, k=0)
