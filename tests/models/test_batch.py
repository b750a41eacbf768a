"""What a forward is told about its rows."""

import torch

from sparing.models.batch import RaggedBatch, Row
from tests.tiny import filled


def test_positions_continue_where_each_memory_ends():
    rows = [Row(torch.tensor([7, 8]), filled("dense", 3)), Row(torch.tensor([9]), filled("dense", 0))]
    batch = RaggedBatch(rows)
    assert batch.ids.tolist() == [7, 8, 9]
    assert batch.positions.tolist() == [3, 4, 0]
    assert batch.lengths.tolist() == [5, 5, 1]


def test_narrowing_keeps_the_last_wanted_of_each_row():
    lengths, wanted = (4, 1, 3, 2), (2, None, 0, 9)
    empty = [torch.zeros(n, dtype=torch.long) for n in lengths]
    rows = [Row(ids, filled("dense", 0), wanted=n) for ids, n in zip(empty, wanted, strict=True)]
    kept = RaggedBatch(rows).narrow()
    assert kept is not None
    assert kept.tolist() == [2, 3, 4, 8, 9]
    assert [row.num_wanted for row in rows] == [2, 1, 0, 2]


def test_nothing_to_narrow():
    assert RaggedBatch([Row(torch.zeros(2, dtype=torch.long), filled("dense", 0))]).narrow() is None
