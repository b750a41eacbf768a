"""The memory of Mamba layers against running its tokens one at a time, in each type of state."""

import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch

from sparing.config.memory import RecurrentSpec
from sparing.config.policy import parse_policy
from sparing.errors import CheckpointError
from sparing.kernels import MambaWeights, dispatch
from sparing.memory.group import Share
from sparing.memory.plan import plan_memory
from sparing.memory.recurrent import KEPT, NOTED, RecurrentGroup
from sparing.memory.sequence import Memory, resident_bytes
from sparing.models.batch import Row
from tests.kernel_sets import using
from tests.tiny import HYBRID, built, filled, model, random_ids

LAYERS = 3
NATIVE = dispatch.available()[-1]


def make(dtype="float32", rounding="stochastic", kernel=4, seed=0) -> Memory:
    narrow = {"ssm_dtype": dtype, "ssm_rounding": rounding, "ssm_seed": seed}
    plan = plan_memory(
        [RecurrentSpec(6, 5, 7, 3, kernel)] * LAYERS,
        parse_policy("dense", narrow if dtype != "float32" else {}),
        dtype=torch.float32,
        device=torch.device("cpu"),
        keys_from_values=[None] * LAYERS,
        key_biases=[None] * LAYERS,
    )
    return plan.memory()


def layer_weights(kernel: int, layer: int) -> MambaWeights:
    g = torch.Generator().manual_seed(100 * kernel + layer)
    size = 6 * 5 + 2 * 3 * 7
    weight, bias = 0.5 * torch.randn(size, 1, kernel, generator=g), 0.3 * torch.randn(size, generator=g)
    return MambaWeights(weight, bias, -torch.rand(6, generator=g) - 0.1, torch.ones(6))


def inputs(count, kernel=4, seed=0):
    """Of each layer: rows [count, C], steps [count, heads] and weights."""
    g = torch.Generator().manual_seed(seed)
    size = 6 * 5 + 2 * 3 * 7
    return [
        (
            torch.randn(count, size, generator=g),
            torch.nn.functional.softplus(torch.randn(count, 6, generator=g)),
            layer_weights(kernel, layer),
        )
        for layer in range(LAYERS)
    ]


def part(flow, low, high):
    return [(xbc[low:high], dt[low:high], weights) for xbc, dt, weights in flow]


def scan(memories, flows, queries=None, layers=range(LAYERS)):
    """A pass over memories with staged tokens: outputs of all layers, [layers, queries, heads, head_dim]."""
    counts = [len(flow[0][0]) for flow in flows]
    shares = [Share(n, n if queries is None else queries, True, 0) for n in counts]
    rows = RecurrentGroup.together([memory.groups[0] for memory in memories], shares)
    return torch.stack(
        [
            rows.scan(i, torch.cat([f[i][0] for f in flows]), torch.cat([f[i][1] for f in flows]), flows[0][i][2])
            for i in layers
        ]
    )


def run(memory, flow, n=None):
    count = len(flow[0][0])
    memory.stage(count)
    y = scan([memory], [flow])
    memory.commit(count if n is None else n)
    return y


def states(memory):
    return [{name: tensor.clone() for name, tensor in layer.state().items()} for layer in memory.own]


def same(one, other, **tolerance):
    for mine, theirs in zip(one, other, strict=True):
        for name, tensor in mine.items():
            torch.testing.assert_close(tensor, theirs[name], **(tolerance or {"rtol": 0, "atol": 0}))
    return True


@pytest.fixture(params=["reference", NATIVE], autouse=True)
def _kernels(request):
    with using(request.param):
        yield


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 8, 9, 63, 64, 65, 130])
def test_chunks_equal_single_steps(kernel, count):
    flow = inputs(count, kernel)
    whole, steps = make(kernel=kernel), make(kernel=kernel)
    y = run(whole, flow)
    each = torch.cat([run(steps, part(flow, t, t + 1)) for t in range(count)], 1)
    torch.testing.assert_close(y, each, rtol=1e-4, atol=1e-5)
    same(states(whole), states(steps), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("staged", [5, 20, 70])
@pytest.mark.parametrize("accepted", range(6))
def test_accepting_some_tokens_equals_running_them_alone(accepted, staged):
    before, more = inputs(9), inputs(staged, seed=1)
    memory, other = make(), make()
    for one in (memory, other):
        run(one, before)
        run(one, inputs(1, seed=5))  # a noted commit
    run(memory, more, n=accepted)
    if accepted:
        run(other, part(more, 0, accepted))
    assert memory.length == other.length == 10 + accepted
    same(states(memory), states(other), rtol=1e-5, atol=1e-6)


def test_looking_changes_nothing():
    memory = make()
    run(memory, inputs(9))
    run(memory, inputs(2, seed=1))
    before = states(memory)
    for count in (1, 5, 100):
        flow = inputs(count, seed=2)
        memory.stage(count)
        every = scan([memory], [flow])
        for n in (0, 1, count):
            torch.testing.assert_close(scan([memory], [flow], n), every[:, count - n :], rtol=1e-4, atol=1e-5)
        assert same(states(memory), before)
        memory.commit(0)
    assert memory.length == 11


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_noted_commit_is_seen_by_all(dtype):
    """Few tokens are carried into the states later, by the next forward; a fork and whoever asks see them before."""
    asked, other = make(dtype), make(dtype)
    parts = [inputs(9), inputs(1, seed=1), inputs(3, seed=2), inputs(2, seed=3)]
    twins = []
    for flow in parts:
        n = max(1, len(flow[0][0]) - 1)
        run(asked, flow, n=n)
        twins.append(asked.fork())
        states(asked)
        run(other, flow, n=n)
    for memory in (asked, twins[-1]):
        assert same(states(memory), states(other))
        run(memory, inputs(1, seed=4))
    run(other, inputs(1, seed=4))
    assert same(states(asked), states(other)) and same(states(twins[-1]), states(other))
    late = make(dtype)
    run(late, inputs(2))
    late.groups[0].restore(other.length, dict(enumerate(states(other))))
    late.length = other.length
    assert same(states(late), states(other))
    assert torch.equal(run(late, parts[0]), run(other, parts[0]))


@pytest.mark.parametrize(("count", "accepted"), [(1, 1), (5, 3), (8, 8), (9, 9), (12, 6), (70, 70), (70, 2), (4, 0)])
def test_bytes_are_those_of_the_spec_and_looking_at_them_changes_nothing(count, accepted):
    watched, other = make(), make()
    for seed in range(3):
        for memory in (watched, other):
            run(memory, inputs(count, seed=seed), n=accepted)
        planned = LAYERS * watched.own[0].spec.nbytes(watched.length, 4)
        assert watched.nbytes == planned
        # What the next forward carries the states over is all that may come on top.
        is_noted = 0 < accepted <= NOTED and count <= KEPT and dispatch.active() != "reference"
        room = LAYERS * (count if count <= NOTED else accepted) * 4 * (6 * 5 + 2 * 3 * 7 + 6)
        assert resident_bytes([watched]) == planned + is_noted * room
    assert same(states(watched), states(other))


def test_an_older_fork_stays_where_it_was():
    memory = make()
    run(memory, inputs(9))
    twin = memory.fork()
    before = states(twin)
    for seed in range(3):
        run(memory, inputs(1, seed=seed))
    assert same(states(twin), before)
    alone = make()
    alone.groups[0].restore(9, dict(enumerate(before)))
    assert torch.equal(run(twin, inputs(1, seed=0)), run(alone, inputs(1, seed=0)))


def test_forks_hold_what_they_share_once():
    memory = make()
    run(memory, inputs(9))
    run(memory, inputs(2))
    alone = resident_bytes([memory])
    assert resident_bytes([memory, *(memory.fork() for _ in range(5))]) == alone


def test_one_forward_at_a_time():
    memory = make()
    memory.stage(3)
    with pytest.raises(ValueError, match="3 tokens are staged"):
        memory.stage(1)
    for n in (-1, 4):
        with pytest.raises(ValueError, match=f"cannot commit {n} tokens: 3 are staged"):
            memory.commit(n)
    scan([memory], [inputs(3)], layers=range(2))
    with pytest.raises(ValueError, match="cannot commit 3 tokens: layer 2 has not seen them"):
        memory.commit(3)
    scan([memory], [inputs(3)], layers=[2])
    memory.commit(3)


@pytest.mark.parametrize("reached", range(LAYERS + 1))
def test_a_pass_that_ends_between_two_layers_changes_nothing(reached):
    """Some states have then been carried over noted tokens, and others have not."""
    for forked in (False, True):
        memory, other = make(), make()
        for one in (memory, other):
            run(one, inputs(9))
            run(one, inputs(3, seed=1), n=2)
        twin = memory.fork() if forked else None
        before = states(memory)
        for _ in range(2):
            memory.stage(4)
            if reached:
                scan([memory], [inputs(4, seed=2)], layers=range(reached))
            memory.rollback()
            assert same(states(memory), before)
        late = memory.fork()
        for one in (memory, late, *([] if twin is None else [twin])):
            assert same(states(one), before)
            assert torch.equal(run(one, inputs(2, seed=3)), run(other.fork(), inputs(2, seed=3)))


@pytest.mark.parametrize("count", [1, 9])
@pytest.mark.parametrize("layer", range(LAYERS))
def test_a_commit_that_raises_changes_no_layer(layer, count):
    """A state that float16 cannot hold, in one layer of several."""
    memory, other = make("float16"), make("float16")
    run(memory, inputs(9))
    run(other, inputs(9))
    before, held = states(memory), memory.nbytes
    flow = inputs(count, seed=1)
    too_large = [(1e6 * xbc if i == layer else xbc, dt, weights) for i, (xbc, dt, weights) in enumerate(flow)]
    memory.stage(count)
    scan([memory], [too_large])
    for _ in range(2):
        with pytest.raises(ValueError, match=rf"the recurrent state of layer {layer} reached"):
            memory.commit(count)
        assert (memory.length, memory.staged, memory.nbytes) == (9, count, held)
        assert same(states(memory), before)
    memory.rollback()
    assert torch.equal(run(memory, flow), run(other, flow))
    assert same(states(memory), states(other))


def test_two_threads_that_fork_one_memory():
    """Then one of them goes on with it, the other with its fork, at the same time."""
    flows = [inputs(1, seed=seed) for seed in range(6)]
    start, together = make(), Barrier(2)
    run(start, inputs(9))
    run(start, inputs(2, seed=7))  # noted
    before, expected = states(start), []
    for side in range(2):
        alone = start.fork()
        expected.append(([run(alone, flows[3 * side + i]) for i in range(3)], states(alone)))

    def go_on(side: int, memory: Memory) -> None:
        together.wait()
        twin = memory.fork()
        together.wait()
        mine, other = (memory, twin) if side else (twin, None)
        outputs = [run(mine, flows[3 * side + i]) for i in range(3)]
        assert all(torch.equal(a, b) for a, b in zip(outputs, expected[side][0], strict=True))
        assert same(states(mine), expected[side][1])
        assert other is None or same(states(other), before)

    with ThreadPoolExecutor(2) as pool:
        for _ in range(200):
            list(pool.map(go_on, range(2), [start.fork()] * 2))
    assert same(states(start), before)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rows_together_equal_rows_alone(dtype):
    """To the bit: of different lengths, with and without noted commits, some of them forks of others."""
    counts = [1, 3, 70, 1, 17, 8]

    def rows():
        made = [make(dtype) for _ in range(4)]
        for i, memory in enumerate(made):
            run(memory, inputs(9, seed=i))
            run(memory, inputs(1 + i, seed=10 + i), n=i)
        return [*made, made[0].fork(), made[2].fork()]

    flows = [inputs(n, seed=20 + i) for i, n in enumerate(counts)]
    together, alone = rows(), rows()
    for seed in range(2):
        for memory, n in zip(together, counts, strict=True):
            memory.stage(n)
        y = scan(together, flows)
        for memory, n in zip(together, counts, strict=True):
            memory.commit(n - seed)
        each = [run(memory, flow, n - seed) for memory, flow, n in zip(alone, flows, counts, strict=True)]
        assert torch.equal(y, torch.cat(each, 1))
        for mine, other in zip(together, alone, strict=True):
            assert same(states(mine), states(other))


def test_rows_that_ask_for_their_last_tokens_alone():
    memories = [make() for _ in range(3)]
    flows = [inputs(n, seed=n) for n in (4, 1, 30)]
    for memory, flow in zip(memories, flows, strict=True):
        memory.stage(len(flow[0][0]))
    every = scan(memories, flows).split([4, 1, 30], 1)
    shares = [Share(n, n, True, 0) for n in (4, 1, 30)]
    rows = RecurrentGroup.together([memory.groups[0] for memory in memories], shares)
    rows.narrow([2, 0, 17])
    y = rows.scan(1, torch.cat([f[1][0] for f in flows]), torch.cat([f[1][1] for f in flows]), flows[0][1][2])
    torch.testing.assert_close(y, torch.cat([every[0][1, 2:], every[2][1, 13:]]))


@pytest.mark.skipif(NATIVE == "reference", reason="built without native kernels: the reference loops over rows")
def test_a_further_row_costs_few_python_calls():
    """Of a forward and its commit, as many layers as a small model has."""
    hybrid = built(HYBRID | {"hybrid_override_pattern": "M-M*" * 12})
    plan = hybrid.memory_plan()

    def calls(count: int) -> int:
        rows = [Row(random_ids(1, seed), plan.memory(), wanted=1) for seed in range(count)]
        for row in rows:
            hybrid.logits(random_ids(3), row.memory)
        found = Counter()
        sys.setprofile(lambda frame, event, _: found.update([event]))
        try:
            hybrid.run(rows)
            for row in rows:
                row.memory.commit(1)
        finally:
            sys.setprofile(None)
        return found["call"]

    with using(NATIVE):
        further = (calls(17) - calls(9)) / 8  # products change their ways below
    assert further <= 1.5 * 48


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrow_state(dtype):
    wide, narrow = make(), make(dtype)
    exact, rough = run(wide, inputs(9)), run(narrow, inputs(9))
    torch.testing.assert_close(rough, exact)  # the first chunk starts from zeros, which all types hold
    for mine, other in zip(states(narrow), states(wide), strict=True):
        assert mine["state"].dtype == getattr(torch, dtype)
        step = torch.finfo(mine["state"].dtype).eps * other["state"].abs().max()
        assert (mine["state"].float() - other["state"]).abs().max() <= step
    assert wide.nbytes - narrow.nbytes == LAYERS * 2 * 6 * 5 * 7
    assert narrow.nbytes == LAYERS * narrow.own[0].spec.nbytes(9, 4)
    error = (run(narrow, inputs(9, seed=1)) - run(wide, inputs(9, seed=1))).abs().max()
    assert 0 < error < 0.1


def test_rounding_follows_the_seed_the_layer_and_the_length_alone():
    found = {}
    for seed in (0, 0, 1):
        memory = make("float16", seed=seed)
        for flow in (inputs(4), inputs(3, seed=1)):
            run(memory, flow)
        twin = memory.fork()
        run(memory, inputs(2, seed=2))
        run(twin, inputs(2, seed=2))
        assert same(states(memory), states(twin))
        assert same(found.setdefault(seed, states(memory)), states(memory))
    assert not torch.equal(found[0][0]["state"], found[1][0]["state"])


def test_rounding_to_nearest_is_what_torch_does():
    wide, narrow = make(), make("bfloat16", "nearest")
    run(wide, inputs(9))
    run(narrow, inputs(9))
    for mine, other in zip(states(narrow), states(wide), strict=True):
        assert torch.equal(mine["state"], other["state"].bfloat16())


@pytest.mark.parametrize("options", [{}, {"ssm_rounding": "nearest"}, {"ssm_seed": 3}])
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_model_with_narrow_states(dtype, options, tmp_path):
    hybrid = model("hybrid")
    memory = hybrid.memory(ssm_dtype=dtype, **options)
    logits = torch.cat([hybrid.logits(chunk, memory) for chunk in random_ids(30).split([9, 1, 1, 19])])
    exact = hybrid.logits(random_ids(30))
    assert 0 < (logits - exact).norm() <= 5e-2 * exact.norm()
    memory.save(tmp_path / "memory.safetensors")
    loaded = hybrid.load_memory(tmp_path / "memory.safetensors", ssm_dtype=dtype, **options)
    assert loaded.nbytes == memory.nbytes < filled("hybrid", 30).nbytes
    for chunk in random_ids(8, 1).split([3, 5]):
        assert torch.equal(hybrid.logits(chunk, loaded), hybrid.logits(chunk, memory))


def test_a_saved_memory_knows_its_seed(tmp_path):
    """Another seed would go on from the same state to other ones: refused, as every other setting is."""
    path = tmp_path / "memory.safetensors"
    memory = filled("hybrid", 9, ssm_dtype="float16", ssm_seed=7)
    memory.save(path)
    for options, message in (
        ({}, r"layers\[0\]\.state_seed is 7, this model has 0"),
        ({"ssm_seed": 7, "ssm_rounding": "nearest"}, r"layers\[0\]\.state_rounding is 'stochastic'"),
        ({"ssm_seed": 7, "ssm_dtype": "bfloat16"}, r"layers\[0\]\.state_dtype is 'float16'"),
    ):
        with pytest.raises(CheckpointError, match=message):
            model("hybrid").load_memory(path, **{"ssm_dtype": "float16", **options})
