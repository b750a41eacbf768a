"""Five hundred mutated inputs: each is used, or refused by the library in words of its own, within limits.

`python tools/fuzz.py --count 100000 --seed 7` tries others.
"""

import pytest

from tests.fuzz import seeds
from tests.fuzz.judge import KINDS
from tests.fuzz.mutations import apply_lines, recipe

COUNT = 500


@pytest.mark.parametrize("kind", KINDS)
def test_the_input_that_is_mutated_is_good(worker, kind):
    for name in seeds.seeds(kind):
        outcome = worker.run(kind, None, name, [])
        assert (outcome.fault, outcome.refused) == (None, "")


@pytest.mark.parametrize("kind", KINDS)
def test_no_mutation_does_harm(worker, kind):
    share = -(-COUNT // len(KINDS))
    faults = [outcome for n in range(share) if (outcome := worker.run(kind, n)).fault is not None]
    assert not faults, "\n\n".join(map(str, faults))


def test_a_recipe_makes_the_same_input_again():
    found = seeds.seeds("config")
    for number in range(50):
        name, lines = recipe(found, seeds.EXTRA_KEYS, number)
        assert (name, lines) == recipe(seeds.seeds("config"), seeds.EXTRA_KEYS, number)
        documents = [seeds.seeds("config")[name][0] for _ in range(2)]
        for document in documents:
            apply_lines(lines, doc=document)
        assert repr(documents[0]) == repr(documents[1])


def test_what_hangs_or_dies_is_reported_and_others_go_on(worker, monkeypatch):
    """The judge itself: a process that is ended from outside, one that computes and one that waits without end."""
    line = "__import__('os').kill(__import__('os').getpid(), 9)"
    outcome = worker.run("policy", None, "dense", [line])
    assert outcome.fault == "ends the process: -9"
    assert outcome.lines == [line]
    line = "__import__('signal').raise_signal(24)  # what the system sends at the limit"
    assert worker.run("policy", None, "dense", [line]).fault == "computes for 20 s"
    monkeypatch.setattr("tests.fuzz.judge.HANGING", 0.5)
    worker.start()
    assert worker.run("policy", None, "dense", ["__import__('time').sleep(60)"]).fault == "does not end within 0 s"
    assert worker.process is None
    monkeypatch.undo()
    assert worker.run("policy", None, "dense", []).fault is None
