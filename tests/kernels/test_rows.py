"""Rows of a batch over spans: natively as the reference says, and to the bit whatever spans entries lie in."""

import pytest
import torch

from sparing.config.rope import RopeParameters
from sparing.kernels import KeysFromValues, dispatch
from sparing.kernels.rows import AttendedRow, RowTable, attend_rows, write_rows
from tests.kernel_sets import using
from tests.kernels.row_tables import spans_of

LAYERS, KV_HEADS, HEADS, SIZE = 3, 2, 6, 24
KEYS = KeysFromValues(torch.linspace(0.5, 1.5, SIZE), RopeParameters("proportional", 100.0, 0.5))
SEES = [(True, None), (True, 1), (True, 40), (False, None)]  # causal, window


def rows(entries: list[torch.Tensor], cuts: list[list[int]], queries: list[int], sees, positions=None) -> RowTable:
    causal, window = sees
    return RowTable(
        [
            AttendedRow(spans_of(x, c, positions), n, 400, causal=causal, window=window)
            for x, c, n in zip(entries, cuts, queries, strict=True)
        ]
    )


def drawn(parts: int, dtype: torch.dtype) -> list[torch.Tensor]:
    return [torch.randn(LAYERS, parts, KV_HEADS, n, SIZE).to(dtype) for n in (1, 200, 64, 333)]


CUTS = [[], [64, 130], [1, 2, 63], [7, 70, 71, 300, 301]]
WHOLE: list[list[int]] = [[], [], [], []]
QUERIES = [1, 3, 0, 5]


@pytest.mark.parametrize("sees", SEES)
@pytest.mark.parametrize("is_tied", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_over_spans(native_kernel_set, dtype, is_tied, sees):
    entries, keys = drawn(1 if is_tied else 2, dtype), KEYS if is_tied else None
    if keys is not None:
        keys = KeysFromValues(KEYS.weight.to(dtype), KEYS.rope)
    q = torch.randn(sum(QUERIES), HEADS, SIZE).to(dtype)
    found = attend_rows(q, rows(entries, CUTS, QUERIES, sees), 1, scale=0.3, keys=keys)
    assert torch.equal(found, attend_rows(q, rows(entries, WHOLE, QUERIES, sees), 1, scale=0.3, keys=keys))
    with using("reference"):
        expected = attend_rows(q, rows(entries, CUTS, QUERIES, sees), 1, scale=0.3, keys=keys)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)
    at = 0
    for i, n in enumerate(QUERIES):  # and of each row alone
        alone = RowTable([rows(entries, CUTS, QUERIES, sees).rows[i]])
        assert torch.equal(attend_rows(q[at : at + n], alone, 1, scale=0.3, keys=keys), found[at : at + n])
        at += n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_scattered_positions(native_kernel_set, dtype):
    """Tied keys turn by the positions that their spans name, of their own head and layer."""
    keys, entries = KeysFromValues(KEYS.weight.to(dtype), KEYS.rope), drawn(1, dtype)[3:]
    positions = torch.rand(LAYERS, KV_HEADS, 400).argsort(-1)[..., :333].sort(-1).values.int()
    q = torch.randn(2, HEADS, SIZE).to(dtype)
    found = attend_rows(q, rows(entries, CUTS[3:], [2], SEES[0], positions), 2, scale=0.3, keys=keys)
    with using("reference"):
        expected = attend_rows(q, rows(entries, WHOLE[3:], [2], SEES[0], positions), 2, scale=0.3, keys=keys)
    tolerance = 1e-5 if dtype == torch.float32 else 2e-2
    torch.testing.assert_close(found, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.uint8])
@pytest.mark.parametrize("parts", [1, 2])
def test_new_entries_are_written_to_the_ends(each_kernel_set, parts, dtype):
    entries, added = [(9 * x).abs().to(dtype) for x in drawn(parts, torch.float32)], [1, 70, 3, 33]
    table = RowTable(
        [AttendedRow(spans_of(x, cuts), 0, 400, added=n) for x, cuts, n in zip(entries, CUTS, added, strict=True)]
    )
    new = 9 * torch.randn(2, sum(added), KV_HEADS, SIZE + 8).abs()
    k, v = new.to(dtype)[..., :SIZE]  # a view: heads lie apart
    write_rows(table, 1, k if parts == 2 else None, v)
    at = 0
    for x, row, n in zip(entries, table.rows, added, strict=True):
        x[1, -1, :, x.shape[3] - n :] = v[at : at + n].transpose(0, 1)
        if parts == 2:
            x[1, 0, :, x.shape[3] - n :] = k[at : at + n].transpose(0, 1)
        for part in range(parts):
            for layer in range(LAYERS):
                assert torch.equal(torch.cat([span.view(layer, part) for span in row.spans], 1), x[layer, part])
        at += n


def test_rows_that_become_narrow():
    """Positions that nobody reads leave the table in place."""
    entries, q = drawn(2, torch.float32), torch.randn(9, HEADS, SIZE)
    table = rows(entries, CUTS, [1, 3, 0, 5], SEES[0])
    whole, before = attend_rows(q, table, 0, scale=0.3), table.addresses
    table.narrow([1, 1, 0, 2])
    assert table.addresses == before
    kept = [0, 3, 7, 8]
    found = attend_rows(q[kept], table, 0, scale=0.3)
    if dispatch.active() == "reference":
        torch.testing.assert_close(found, whole[kept], rtol=1e-5, atol=1e-6)
    else:
        assert torch.equal(found, whole[kept])


def test_shapes_that_do_not_fit_are_refused(each_kernel_set):
    """Before native code writes or reads by address."""
    entries, whole = drawn(2, torch.float32), [[], [], [], []]
    table = RowTable([AttendedRow(spans_of(x, c), 1, 400, added=1) for x, c in zip(entries, whole, strict=True)])
    good = torch.zeros(4, KV_HEADS, SIZE)
    for k, v in ((None, good), (good[:3], good), (good, good[:, :1]), (good[..., 1:], good)):
        with pytest.raises(ValueError, match=r"expected|hold 2"):
            write_rows(table, 0, k, v)
    for q in (torch.zeros(3, HEADS, SIZE), torch.zeros(4, HEADS, SIZE - 1), torch.zeros(4, 5, SIZE)):
        with pytest.raises(ValueError, match=r"expected|multiple"):
            attend_rows(q, table, 0, scale=1.0)
