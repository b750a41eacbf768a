"""Rejected drafts leave no trace, in any memory under any policy; what was accepted is as if nothing else had been."""

import warnings
from random import Random

import pytest
import torch

import sparing
from sparing.config.memory import AttentionSpec
from sparing.decoding.draft_length import DraftCost
from sparing.models.batch import Row
from tests.properties.test_memory_matrix import BUDGET, INTERVAL, POLICIES, statistics
from tests.tiny import CONFIGS, model, near, random_ids, same, snapshot, takes

STATES = {"half states": ("dense", {"ssm_dtype": "float16"})}
ROUNDS = [(1, 1), (4, 0), (4, 2), (5, 1), (4, 4), (2, 0), (6, 3), (4, 1)]  # (drafted, accepted)
CELLS = [
    (name, policy)
    for name in CONFIGS
    for policy, (kv, _) in (POLICIES | STATES).items()
    if not (policy in STATES and CONFIGS[name]["model_type"] != "nemotron_h")
    and not ("triattention" in kv and name in ("sliding", "recurrent"))  # nothing of theirs grows
    and takes(name, kv)
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
        model(name).logits(random_ids(7), memory)
    for i, (drafted, accepted) in enumerate(ROUNDS):
        row = random_ids(drafted, seed=20 + i)
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
    following = random_ids(3, seed=5)
    left, right = (model(name).logits(following, memory) for memory in (speculating, plain))
    torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-4)
    if "turboquant" not in (POLICIES | STATES)[policy][0]:  # a code may flip where its input is rounded
        assert same(snapshot(speculating), snapshot(plain), 1e-3 if policy in STATES else 5e-5)


def test_a_budget_counts_what_was_accepted_alone():
    """Two and more tokens at once cross the interval at most once; the round comes after all of them."""
    memory = empty("dense", "global")
    model("dense").logits(random_ids(7), memory)
    stored = 7
    for i in range(12):
        model("dense").run([Row(random_ids(4, seed=i), memory)])
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


@pytest.mark.parametrize(("name", "policy"), [cell for cell in CELLS if cell[0] in ("dense", "shared", "hybrid")])
def test_the_clock_changes_no_token(name, policy, monkeypatch):
    """Drafts that are measured to be free, or dearer than a pass: as many as before where their number shows."""
    monkeypatch.setitem(model(name).generation_config, "eos_token_id", [])
    # Or its first guess would be that nothing pays.
    monkeypatch.setattr("sparing.decoding.drafters.weight_bytes", lambda one: 10.0 if one is model(name) else 1.0)
    observe, outcomes = DraftCost.observe, []
    for cost in (0.0, 3.0):
        monkeypatch.setattr(DraftCost, "observe", lambda self, n, _, cost=cost: observe(self, n, 1 + cost * n))
        memory = empty(name, policy)
        settings = {"draft": near(name), "draft_tokens": 6, "temperature": 0, "max_new_tokens": 40}
        events = list(sparing.generate(model(name), random_ids(7).tolist(), memory=memory, **settings))
        ids = [token for event in events if isinstance(event, sparing.Commit) for token in event.ids]
        outcomes.append((ids, events[-1].stats["proposed"]))
    assert outcomes[0][0] == outcomes[1][0]
    assert (outcomes[0][1] == outcomes[1][1]) == memory.depends_on_cuts


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize(("name", "policy"), [(n, p) for n, p in CELLS if "triattention" in (POLICIES | STATES)[p][0]])
def test_a_budget_forgets_the_same_however_rounds_fall(name, policy, seed):
    """Random drafts, roll-backs and forks beside a memory that only ever saw what was kept."""
    random = Random(seed)
    busy, plain = empty(name, policy), empty(name, policy)
    for memory in (busy, plain):
        model(name).logits(random_ids(4), memory)
    while busy.length < 40:
        for _ in range(random.randrange(3)):
            model(name).run([Row(random_ids(29, seed=random.randrange(99)), busy)])
            busy.rollback()
        if random.random() < 0.3:
            twin = busy.fork()
            model(name).run([Row(random_ids(9, seed=1), twin)])
            twin.commit(9)
        kept, rejected = random.choice([1, 2, 5, 9]), random.choice([0, 3, 29])
        row = random_ids(kept, seed=busy.length)
        model(name).run([Row(torch.cat([row, random_ids(rejected, seed=98)]), busy)])
        model(name).run([Row(row, plain)])
        busy.commit(kept)
        plain.commit(kept)
    assert busy.evictions == plain.evictions != []
    for i, layer in enumerate(busy.layers):
        if layer is not None and isinstance(layer.spec, AttentionSpec):
            assert torch.equal(busy.entries(i), plain.entries(i))
    left, right = (model(name).logits(random_ids(3, seed=5), memory) for memory in (busy, plain))
    torch.testing.assert_close(left, right, rtol=1e-3, atol=1e-3)
