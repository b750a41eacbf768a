"""How many tokens to draft: expected tokens, the best length, and what is learnt from rounds."""

import pytest

from sparing.decoding.draft_length import Acceptance, DraftCost, best_length, expected_tokens


@pytest.mark.parametrize(
    ("acceptance", "drafted", "tokens"), [(0.7, 3, 2.533), (0.66, 2, 2.0956), (0.8, 3, 2.952), (0.0, 5, 1), (1.0, 5, 6)]
)
def test_expected_tokens(acceptance, drafted, tokens):
    assert expected_tokens(acceptance, drafted) == pytest.approx(tokens, abs=1e-3)
    if acceptance < 1:
        closed = (1 - acceptance ** (drafted + 1)) / (1 - acceptance)
        assert expected_tokens(acceptance, drafted) == pytest.approx(closed)


def test_best_length():
    assert best_length(0.9, 0.0, 3) == 3  # drafts that cost nothing: as many as allowed
    assert best_length(0.2, 0.5, 3) == 0
    assert best_length(1.0, 0.99, 3) == 3
    assert best_length(0.99, 1.0, 3) == 0  # a draft as costly as a pass never pays
    assert best_length(0.5, 0.1, 0) == 0
    for acceptance in (0.3, 0.6, 0.9):
        lengths = [best_length(acceptance, cost, 8) for cost in (0.01, 0.1, 0.3, 0.8)]
        assert lengths == sorted(lengths, reverse=True)
        rates = [expected_tokens(acceptance, m) / (1 + 0.1 * m) for m in range(9)]
        assert rates[best_length(acceptance, 0.1, 8)] == max(rates)


def test_acceptance_approaches_what_is_seen_and_fades():
    row = Acceptance()
    first = row.rate
    for _ in range(100):
        row.observe(3, 0)  # one rejected; the two after it were not judged
    assert row.judged == pytest.approx(20, rel=0.01)
    assert row.rate < 0.1
    low = row.rate
    for _ in range(100):
        row.observe(0, 0)
    assert low < row.rate and row.rate == pytest.approx(first, abs=0.05)
    for _ in range(100):
        row.observe(3, 3)
    assert row.rate > 0.95


def test_cost_is_read_off_the_clock():
    cost = DraftCost(0.3, by_clock=True)
    assert cost.per_draft == pytest.approx(0.4)
    for i in range(200):
        cost.observe(drafts=i % 4, seconds=0.02 * (1 + 0.25 * (i % 4)))
    assert cost.per_draft == pytest.approx(0.25, abs=0.01)
    for _ in range(300):  # always the same length: its level is known, its slope fades back to the guess
        cost.observe(drafts=3, seconds=0.05)
    assert cost.per_draft == pytest.approx(0.4, abs=0.05)
    for _ in range(50):  # noise against the trend
        cost.observe(drafts=0, seconds=0.09)
        cost.observe(drafts=3, seconds=0.05)
    assert cost.per_draft == 0.0


def test_without_the_clock_the_guess_stays():
    cost = DraftCost(0.3, by_clock=False)
    for i in range(20):
        cost.observe(drafts=i % 4, seconds=0.02 * (1 + 2.5 * (i % 4)))
    assert cost.per_draft == pytest.approx(0.4)
