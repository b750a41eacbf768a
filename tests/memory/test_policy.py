import pytest

from sparing.memory.policy import apply_policy, parse_policy, policy_options
from sparing.memory.spec import AttentionSpec

SPECS = [
    AttentionSpec(2, 8),
    AttentionSpec(2, 8, window=5),
    AttentionSpec(1, 16, value_only=True),
    AttentionSpec(2, 8, shared_with=0),
]


def test_dense_changes_nothing():
    assert apply_policy(SPECS, parse_policy("dense")) == SPECS


def test_a_window_bounds_what_grows_and_nothing_else():
    windowed = apply_policy(SPECS, parse_policy("window:3"))
    assert [spec.window for spec in windowed] == [3, 5, 3, 3]
    assert [spec.entries(100) for spec in windowed] == [2, 4, 2, 0]
    assert [spec.entries(1) for spec in windowed] == [1, 1, 1, 0]


@pytest.mark.parametrize("kv", ["dens", "", "window", "window:", "window:-3", "window:2.5", "dense ", "Window:3"])
def test_a_typo_names_what_there_is(kv):
    with pytest.raises(ValueError, match=r"is not a memory policy, use dense or window:N"):
        parse_policy(kv)


def test_a_window_of_nothing():
    with pytest.raises(ValueError, match="at least one token"):
        parse_policy("window:0")


def test_two_of_a_kind_clash():
    with pytest.raises(ValueError, match="'window:4' clashes"):
        parse_policy("window:3+window:4")


def test_an_option_that_no_part_takes():
    with pytest.raises(ValueError, match="'window:3' takes no option 'size', it knows: none"):
        parse_policy("window:3", {"size": 4})
    assert policy_options("dense") == []


def test_bytes_of_a_spec():
    assert AttentionSpec(2, 8).nbytes(10, 2) == 2 * 10 * 2 * 8 * 2
    assert AttentionSpec(2, 8, value_only=True).nbytes(10, 2) == 10 * 2 * 8 * 2
    assert AttentionSpec(2, 8, window=5).nbytes(3, 4) == 2 * 3 * 2 * 8 * 4
    assert AttentionSpec(2, 8, window=5).nbytes(300, 4) == 2 * 4 * 2 * 8 * 4
    assert AttentionSpec(2, 8, window=1).nbytes(300, 4) == 0
    assert AttentionSpec(2, 8, shared_with=0).nbytes(300, 4) == 0
