"""Entries in extents against a Python list: what is held, where it lies, and who may write there."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.kernels import huge_pages
from sparing.kernels.rows import AttendedRow, RowTable, write_rows
from sparing.memory import extents
from sparing.memory.extents import GROWTH, STEP, Entries

LAYERS, HEADS, SIZE = 2, 2, 3


def empty(parts: int = 1) -> Entries:
    return Entries(LAYERS, parts, HEADS, SIZE, torch.float32, torch.device("cpu"))


def append(entries: Entries, numbers: list[int], first: int, room: int = 0) -> None:
    """Entries that hold a number each, the next layer's one more than a thousand later."""
    entries.extend(len(numbers), first, room)
    if not entries.spans:
        return
    table = RowTable([AttendedRow(entries.spans, 0, 0, added=len(numbers))])
    for layer in range(LAYERS):
        new = torch.tensor(numbers, dtype=torch.float32)[:, None, None].expand(-1, HEADS, SIZE) + 1000 * layer
        write_rows(table, layer, None, new)


def content(entries: Entries) -> list[int]:
    for layer in range(LAYERS):
        held = entries.read(layer, 0)
        assert held.shape == (HEADS, len(entries), SIZE)
        assert (held == held[:1, :, :1]).all() and torch.equal(held, entries.read(0, 0) + 1000 * layer)
    return entries.read(0, 0)[0, :, 0].int().tolist()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "truncate", "drop", "drop inside", "keep", "fork", "reset"]),
            st.integers(0, 3 * STEP) | st.integers(0, 9),
        ),
        max_size=14,
    )
)
def test_against_a_list(operations):
    entries, naive, count = empty(), [], 0
    kept, marks = [], []
    for kind, n in operations:
        if kind == "append":
            new = list(range(count, count + n))
            count += n
            marks = []  # what was taken back may be written over
            append(entries, new, count - n)
            naive = naive + new
        elif kind == "truncate":
            n = min(n, len(naive))
            entries.truncate(n)
            naive = naive[:n]
        elif kind == "drop":
            n = min(n, len(naive))
            entries.drop(n)
            naive = naive[n:]
        elif kind == "drop inside":
            n = min(n, max(0, len(naive) - 2))
            entries.drop(n, after=min(2, len(naive)))
            naive = naive[:2] + naive[2 + n :]
        elif kind == "keep" and naive:
            index = list(range(0, len(naive), max(1, n)))
            entries.keep(torch.tensor(index).expand(LAYERS, HEADS, -1))
            naive = [naive[i] for i in index]
        elif kind == "reset" and marks:
            mark, naive = marks.pop()
            entries.reset(mark)
        elif kind == "fork":
            kept.append((entries, naive))
            entries, marks = entries.fork(), []
        marks.append((entries.mark(), naive))
        assert content(entries) == naive
        assert entries.where(1).tolist() == [naive] * HEADS
        scattered = 0 if entries.scattered is None else entries.scattered.nbytes
        assert entries.nbytes == LAYERS * HEADS * SIZE * 4 * len(naive) + scattered
    for other, expected in kept:
        assert content(other) == expected


def test_a_sliding_window_never_grows():
    """Bounded by the window and two extents, however long the text, also after a long prompt."""
    for first in (1, 40 * STEP):
        entries, most = empty(), 0
        append(entries, list(range(first)), 0)
        for i in range(first, first + 9 * STEP):
            entries.drop(max(0, len(entries) - 4))
            append(entries, [i], i)
            most = max(most, sum(entries.blocks().values()))
        assert content(entries) == list(range(i - 4, i + 1))
        assert most <= 3 * STEP * LAYERS * HEADS * SIZE * 4


def test_nothing_moves():
    """Neither growth, nor a fork, nor what is taken back moves an entry."""
    entries, seen = empty(), {}
    twins = []
    for i in range(6 * STEP):
        append(entries, [i], i)
        if i % 50 == 0:
            twins.append(entries.fork())
        if i % 7 == 0:
            append(entries, [-1, -2], i + 1)
            entries.truncate(i + 1)
        place = 0
        for span in entries.spans:
            for j in range(len(span)):
                address = span.view(0, 0)[0, j].data_ptr()
                assert seen.setdefault(place + j, address) == address
            place += len(span)
    assert content(twins[2]) == list(range(101))


def test_head_room_is_below_a_quarter():
    entries = empty()
    for i in range(70 * STEP):
        append(entries, [i], i)
        held, taken = len(entries), sum(span.extent.capacity for span in entries.spans)
        assert taken - held <= max(STEP, held // (GROWTH - 1))
    assert len(entries.spans) < 35


def test_many_forks_hold_a_prompt_once():
    entries = empty()
    append(entries, list(range(4000)), 0)
    alone, twins = sum(entries.blocks().values()), [entries.fork() for _ in range(64)]
    for twin in twins:
        append(twin, [1, 2, 3], 4000)
    together = {}
    for one in (entries, *twins):
        together |= one.blocks()
    assert sum(together.values()) == alone + 64 * STEP * LAYERS * HEADS * SIZE * 4


def test_a_text_of_known_length_lies_in_one_extent():
    entries = empty()
    for first in range(0, 1000, 250):
        append(entries, list(range(first, first + 250)), first, room=1000 - first)
    assert len(entries.spans) == 1 and content(entries) == list(range(1000))


def test_huge_pages_change_nothing(monkeypatch):
    monkeypatch.setattr(extents, "LARGE", 1)
    monkeypatch.setattr(huge_pages, "SMALL", 0)
    entries = empty()
    for i in range(3 * STEP):
        append(entries, [i], i)
    twin = entries.fork()
    append(twin, [7], 3 * STEP)
    del entries  # whose memory the twin still reads
    assert content(twin) == [*range(3 * STEP), 7]


def test_positions_are_counted_once():
    """Of entries in between that were forgotten: a fork reads the same ones."""
    entries = empty()
    append(entries, list(range(3 * STEP)), 0)
    entries.keep(torch.arange(0, 2 * STEP, 2).expand(LAYERS, HEADS, -1))
    assert entries.scattered is not None
    assert (
        sum(entries.blocks().values()) == entries.nbytes == sum((entries.blocks() | entries.fork().blocks()).values())
    )


def test_little_is_left_of_a_piece_that_became_something_else():
    """As of a prompt's pieces, which lie here until they are codes."""
    for piece in (4 * STEP - 7, 4 * STEP, 16 * STEP):
        entries = empty()
        for at in range(0, 5 * piece, piece):
            append(entries, list(range(at, at + piece)), at)
            entries.drop(len(entries) - (at + piece) % STEP)
            assert sum(entries.blocks().values()) <= 3 * STEP * LAYERS * HEADS * SIZE * 4
