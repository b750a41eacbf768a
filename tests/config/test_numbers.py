"""What counts as a number: every integer and float type people have, and nothing that only looks like one."""

import math
from decimal import Decimal
from fractions import Fraction

import numpy as np
import pytest
import torch

from sparing.config.numbers import flag, number, token_ids, whole


@pytest.mark.parametrize(
    "value", [3, np.int64(3), np.uint8(3), np.array(3), torch.tensor(3), torch.tensor(3, dtype=torch.int8)]
)
def test_whole_numbers(value):
    assert whole("n", value) == 3
    assert type(whole("n", value)) is int
    assert token_ids("ids", [value, 4]) == (3, 4)


@pytest.mark.parametrize(
    "value",
    [
        3.0,
        2.5,
        "3",
        b"3",
        True,
        np.True_,
        torch.tensor(True),
        np.float32(3),
        torch.tensor(3.0),
        None,
        [3],
        math.nan,
        3 + 0j,
    ],
)
def test_what_is_not_a_whole_number(value):
    with pytest.raises(ValueError, match=r"^n is .*: use a whole number of at least 1$"):
        whole("n", value, 1)


@pytest.mark.parametrize("value", [0, 10, -(10**40), 10**40])
def test_whole_numbers_out_of_range(value):
    with pytest.raises(ValueError, match="use 1 to 9"):
        whole("n", value, 1, 9)
    if value < 1:
        with pytest.raises(ValueError, match="use at least 1"):
            whole("n", value, 1)


@pytest.mark.parametrize(
    "value", [0.5, np.float16(0.5), np.float64(0.5), torch.tensor(0.5), Fraction(1, 2), Decimal("0.5")]
)
def test_numbers(value):
    assert number("x", value, "a share", 0, 1) == 0.5
    assert number("x", 1, "a share", 0, 1) == 1.0


@pytest.mark.parametrize(
    "value", ["0.5", True, np.False_, math.nan, 2, -0.1, None, [0.5], np.array([0.1, 0.2]), 10**400]
)
def test_what_is_not_such_a_number(value):
    with pytest.raises(ValueError, match=r"^x is .*: use a share$"):
        number("x", value, "a share", 0, 1)


@pytest.mark.parametrize("value", [[1, 2], (1, 2), np.array([1, 2]), torch.tensor([1, 2]), range(1, 3)])
def test_ids(value):
    assert token_ids("ids", value) == (1, 2)


@pytest.mark.parametrize("value", ["12", b"12", 12, {1: 2}, [[1]], [-1], [1.0], torch.tensor(1), None, ["1"]])
def test_what_are_not_ids(value):
    with pytest.raises(ValueError, match=r"^ids "):
        token_ids("ids", value)
    with pytest.raises(ValueError, match="ids holds 9: the vocabulary has 9 entries"):
        token_ids("ids", [9], 9)


def test_flags():
    assert flag("f", True) is True
    assert flag("f", np.False_) is False
    for value in (1, 0, "yes", None):
        with pytest.raises(ValueError, match=r"^f is .*: use True or False$"):
            flag("f", value)
