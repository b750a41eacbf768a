"""Text for people."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparing.text import one_line, printable, readable, readable_bytes, readable_seconds, table


@given(st.text(st.characters()), st.integers(0, 20))
def test_printable_text_steers_no_terminal(text, cut):
    shown = printable(text)
    assert not any(unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t" for c in shown)
    shown.encode()  # nothing that no encoding can write
    assert printable(text[:cut]) + printable(text[cut:]) == shown
    if not any(unicodedata.category(c) in ("Cc", "Cs") for c in text):
        assert shown == text  # narrow and ideographic spaces, joiners, private characters too


def test_messages_and_cells_are_one_line():
    assert one_line("a\n  b\x1b[0m\r\n") == "a b\ufffd[0m"
    assert table([("key", "a\nb\x1b"), ("x", "y")], header=False).splitlines() == ["key  a b\ufffd", "x    y"]


def test_table_aligns_words_left_and_numbers_right():
    text = table([("name", "count"), ("a", 1), ("longer", 123), ("none", None)])
    assert text.splitlines() == ["name    count", "------  -----", "a           1", "longer    123", "none"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (readable(30_697_345_280), "30.7 G"),
        (readable(2.34e12, "FLOP"), "2.34 TFLOP"),
        (readable(12), "12"),
        (readable_bytes(2684354560), "2.50 GiB"),
        (readable_bytes(640), "640 B"),
        (readable_seconds(0.0155), "15.5 ms"),
        (readable_seconds(2e-8), "20 ns"),
        (readable_seconds(75), "75 s"),
    ],
)
def test_sizes_are_readable(text, expected):
    assert text == expected
