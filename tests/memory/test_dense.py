"""The growing buffer against a Python list."""

from itertools import pairwise

import torch
from hypothesis import given
from hypothesis import strategies as st

from sparing.kernels import huge_pages
from sparing.memory import dense
from sparing.memory.dense import SPARE, Buffer


def entries(values: list[int]) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32)[:, None, None].expand(-1, 2, 3)


def content(buffer: Buffer) -> list[int]:
    assert buffer.view.shape == (2, len(buffer), 3)
    assert buffer.nbytes == 2 * len(buffer) * 3 * 4
    assert (buffer.view == buffer.view[:1, :, :1]).all()
    return buffer.view[0, :, 0].int().tolist()


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["append", "truncate", "drop_first", "fork"]),
            st.integers(0, SPARE + 20) | st.integers(0, 9),
        ),
        max_size=12,
    )
)
def test_against_a_list(operations):
    buffer, naive, count = Buffer(2, 3, torch.float32, torch.device("cpu")), [], 0
    kept = []
    for kind, n in operations:
        if kind == "append":
            new = list(range(count, count + n))
            count += n
            buffer.append(entries(new))
            naive = naive + new
        elif kind == "truncate":
            buffer.truncate(n)
            naive = naive[:n]
        elif kind == "drop_first":
            n = min(n, len(naive))
            buffer.drop_first(n)
            naive = naive[n:]
        else:
            kept.append((buffer, naive))
            buffer = buffer.fork()
        assert content(buffer) == naive
    for other, expected in kept:
        assert content(other) == expected


def test_a_sliding_window_never_grows():
    """Bounded by the window and the head-room, however long the text."""
    buffer, places = Buffer(2, 3, torch.float32, torch.device("cpu")), set()
    for i in range(5 * SPARE):
        buffer.append(entries([i]))
        buffer.drop_first(max(0, len(buffer) - 4))
        places.add(buffer.view.untyped_storage().nbytes())
    assert content(buffer) == list(range(5 * SPARE - 4, 5 * SPARE))
    assert max(places) <= 2 * (4 + 1 + SPARE) * 3 * 4


def test_huge_pages_change_nothing(monkeypatch):
    monkeypatch.setattr(dense, "LARGE", 1)
    monkeypatch.setattr(huge_pages, "SMALL", 0)
    buffer = Buffer(2, 3, torch.float32, torch.device("cpu"))
    for i in range(3 * SPARE):
        buffer.append(entries([i]))
    twin = buffer.fork()
    twin.append(entries([7]))
    del buffer  # its memory, which the twin has left
    assert content(twin) == [*range(3 * SPARE), 7]


def test_appending_seldom_copies():
    buffer, places = Buffer(2, 3, torch.float32, torch.device("cpu")), []
    for i in range(2 * SPARE):
        buffer.append(entries([i]))
        places.append(buffer.view.data_ptr())
    assert sum(a != b for a, b in pairwise(places)) <= 2
