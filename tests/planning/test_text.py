"""Text for people."""

import pytest

from sparing.planning.text import readable, readable_bytes, readable_seconds, table


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
