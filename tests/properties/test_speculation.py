"""Rejected drafts leave no trace, in any memory under any policy; what was accepted is as if nothing else had been."""

import warnings

import pytest
import torch

from sparing.memory.batch import Row
from tests.properties.models import CONFIGS, model, same, snapshot, tokens
from tests.properties.test_memory_matrix import BUDGET, INTERVAL, POLICIES, statistics

STATES = {"half states": ("dense", {"ssm_dtype": "float16"})}
ROUNDS = [(1, 1), (4, 0), (4, 2), (5, 1), (4, 4), (2, 0), (6, 3), (4, 1)]  # (drafted, accepted)
CELLS = [
    (name, policy)
    for name in CONFIGS
    for policy, (kv, _) in (POLICIES | STATES).items()
    if not (policy in STATES and CONFIGS[name]["model_type"] != "nemotron_h")
    and not ("triattention" in kv and name in ("sliding", "recurrent"))  # nothing of theirs grows
]


def empty(name, policy):
    kv, options = (POLICIES | STATES)[policy]
    if "triattention" in kv:
        options = options | {"statistics": statistics(name)}
        if name.startswith("hybrid"):
            options = options | {"allow_nope": True}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this model attends in few layers")
        return model(name).memory(kv, **options)


@pytest.mark.parametrize(("name", "policy"), CELLS)
def test_rejected_drafts_leave_no_trace(name, policy):
    """Rounds of drafts, some accepted, beside a memory that only ever saw what was accepted, in the same portions."""
    speculating, plain = empty(name, policy), empty(name, policy)
    for memory in (speculating, plain):
        model(name).logits(tokens(7), memory)
    for i, (drafted, accepted) in enumerate(ROUNDS):
        row = tokens(drafted, seed=20 + i)
        hidden = model(name).run([Row(row, speculating)])
        speculating.commit(accepted)
        if accepted:
            expected = model(name).run([Row(row[:accepted], plain)])
            plain.commit(accepted)
            torch.testing.assert_close(hidden[:accepted], expected, rtol=1e-4, atol=1e-4)
        assert speculating.length == plain.length
        assert speculating.nbytes == plain.nbytes
        assert speculating.evictions == plain.evictions
    if "triattention" in (POLICIES | STATES)[policy][0]:
        assert speculating.evictions
    following = tokens(3, seed=5)
    left, right = (model(name).logits(following, memory) for memory in (speculating, plain))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    if "turboquant" not in (POLICIES | STATES)[policy][0]:  # a code may flip where its input is rounded
        assert same(snapshot(speculating), snapshot(plain), 1e-3 if policy in STATES else 5e-5)


def test_a_budget_counts_what_was_accepted_alone():
    """Two and more tokens at once cross the interval at most once; the round comes after all of them."""
    memory = empty("dense", "global")
    model("dense").logits(tokens(7), memory)
    stored = 7
    for i in range(12):
        model("dense").run([Row(tokens(4, seed=i), memory)])
        before = len(memory.evictions)
        memory.commit(i % 4)
        stored += i % 4
        rounds = memory.evictions[before:]
        assert len(rounds) <= 1
        assert bool(rounds) == (stored >= BUDGET + INTERVAL)
        if rounds:
            assert rounds[0]["held"] == stored
            stored = BUDGET
        assert memory.entries(0).shape[1] == stored
