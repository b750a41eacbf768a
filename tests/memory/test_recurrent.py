"""The memory of a Mamba layer against running its tokens one at a time, in each type of state."""

import pytest
import torch

from sparing.config.memory import RecurrentSpec
from sparing.errors import CheckpointError
from sparing.kernels import MambaWeights, dispatch
from sparing.memory.recurrent import RecurrentMemory
from tests.kernel_sets import using
from tests.tiny import filled, model, random_ids

CPU = torch.device("cpu")


def make(dtype="float32", rounding="stochastic", kernel=4, seed=0):
    return RecurrentMemory(RecurrentSpec(6, 5, 7, 3, kernel, dtype, rounding, seed), torch.float32, CPU)


def inputs(count, kernel=4, seed=0):
    """Rows, steps and weights of one layer."""
    g = torch.Generator().manual_seed(seed)
    size = make(kernel=kernel).spec.conv_size
    xbc = torch.randn(count, size, generator=g)
    dt = torch.nn.functional.softplus(torch.randn(count, 6, generator=g))
    fixed = torch.Generator().manual_seed(9)
    weight = 0.5 * torch.randn(size, 1, kernel, generator=fixed)
    bias = 0.3 * torch.randn(size, generator=fixed)
    return xbc, dt, MambaWeights(weight, bias, -torch.rand(6, generator=fixed) - 0.1, torch.ones(6))


def run(memory, xbc, dt, weights, n=None):
    memory.stage(xbc, dt, weights)
    y = memory.attend(len(xbc))
    memory.commit(len(xbc) if n is None else n)
    return y


@pytest.fixture(params=["reference", dispatch.available()[-1]], autouse=True)
def _kernels(request):
    with using(request.param):
        yield


@pytest.mark.parametrize("kernel", [1, 2, 4])
@pytest.mark.parametrize("count", [1, 3, 63, 64, 65, 130])
def test_chunks_equal_single_steps(kernel, count):
    xbc, dt, weights = inputs(count, kernel)
    whole, steps = make(kernel=kernel), make(kernel=kernel)
    y = run(whole, xbc, dt, weights)
    each = torch.cat([run(steps, xbc[t : t + 1], dt[t : t + 1], weights) for t in range(count)])
    torch.testing.assert_close(y, each, rtol=1e-4, atol=1e-5)
    for name, tensor in whole.state().items():
        torch.testing.assert_close(tensor, steps.state()[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("accepted", range(6))
def test_accepting_some_tokens_equals_running_them_alone(accepted):
    before, staged = inputs(9), inputs(5, seed=1)
    memory, other = make(), make()
    run(memory, *before)
    run(other, *before)
    run(memory, *staged, n=accepted)
    if accepted:
        run(other, staged[0][:accepted], staged[1][:accepted], staged[2])
    assert memory.length == other.length == 9 + accepted
    for name, tensor in memory.state().items():
        torch.testing.assert_close(tensor, other.state()[name], rtol=1e-5, atol=1e-6)


def test_looking_changes_nothing():
    memory = make()
    run(memory, *inputs(9))
    state = {name: tensor.clone() for name, tensor in memory.state().items()}
    for count in (1, 5, 100):
        memory.stage(*inputs(count, seed=2))
        every = memory.attend(count)
        for n in (0, 1, count):
            torch.testing.assert_close(memory.attend(n), every[count - n :], rtol=1e-4, atol=1e-5)
        assert all(torch.equal(tensor, state[name]) for name, tensor in memory.state().items())
        memory.commit(0)
    assert memory.length == 9


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_noted_commit_is_seen_by_all(dtype):
    """Few tokens are carried into the state later: by the next forward, a fork, or whoever asks for the state."""
    asked, other = make(dtype), make(dtype)
    parts = [inputs(9), inputs(1, seed=1), inputs(3, seed=2), inputs(2, seed=3)]
    twins = []
    for xbc, dt, weights in parts:
        run(asked, xbc, dt, weights, n=max(1, len(xbc) - 1))
        twins.append(asked.fork())
        asked.state()
        run(other, xbc, dt, weights, n=max(1, len(xbc) - 1))
    for memory in (asked, twins[-1]):
        assert all(torch.equal(memory.state()[name], tensor) for name, tensor in other.state().items())
        run(memory, *inputs(1, seed=4))
    run(other, *inputs(1, seed=4))
    assert torch.equal(asked.state()["state"], other.state()["state"])
    assert torch.equal(twins[-1].state()["state"], other.state()["state"])
    late = make(dtype)
    run(late, *inputs(2))
    late.restore(other.length, other.state())
    assert all(torch.equal(tensor, other.state()[name]) for name, tensor in late.state().items())
    assert torch.equal(run(late, *parts[0]), run(other, *parts[0]))


def storage_bytes(memory) -> int:
    """Of all storages that a memory's tensors lie in."""
    parts = [part for value in vars(memory).values() for part in (value if isinstance(value, tuple) else (value,))]
    found = [part.untyped_storage() for part in parts if isinstance(part, torch.Tensor)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


@pytest.mark.parametrize(("count", "accepted"), [(1, 1), (5, 3), (8, 8), (9, 9), (70, 70), (70, 2), (4, 0)])
def test_bytes_are_those_of_all_storages_and_looking_at_them_changes_nothing(count, accepted):
    watched, other = make(), make()
    for seed in range(3):
        for memory in (watched, other):
            run(memory, *inputs(count, seed=seed), n=accepted)
        assert watched.nbytes == storage_bytes(watched) == watched.spec.nbytes(watched.length, 4)
    assert all(torch.equal(watched.state()[name], tensor) for name, tensor in other.state().items())


def test_an_older_fork_stays_where_it_was():
    memory = make()
    run(memory, *inputs(9))
    twin = memory.fork()
    before = {name: tensor.clone() for name, tensor in twin.state().items()}
    for seed in range(3):
        run(memory, *inputs(1, seed=seed))
    assert all(torch.equal(tensor, before[name]) for name, tensor in twin.state().items())
    y = run(twin, *inputs(1, seed=0))
    assert torch.equal(y, run(restored(before), *inputs(1, seed=0)))


def restored(state):
    memory = make()
    memory.restore(9, state)
    return memory


def test_one_forward_at_a_time():
    memory = make()
    memory.stage(*inputs(3))
    with pytest.raises(ValueError, match="3 tokens are staged"):
        memory.stage(*inputs(1))
    for n in (-1, 4):
        with pytest.raises(ValueError, match=f"cannot commit {n} tokens: 3 are staged"):
            memory.commit(n)
    memory.commit(3)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_a_narrow_state(dtype):
    wide, narrow = make(), make(dtype)
    exact, rough = run(wide, *inputs(9)), run(narrow, *inputs(9))
    torch.testing.assert_close(rough, exact)  # the first chunk starts from zeros, which all types hold
    state = narrow.state()["state"]
    assert state.dtype == getattr(torch, dtype)
    assert wide.nbytes - narrow.nbytes == 2 * state.numel()
    assert narrow.nbytes == narrow.spec.nbytes(9, 4)
    largest = wide.state()["state"].abs().max()
    step = torch.finfo(state.dtype).eps * largest
    assert (state.float() - wide.state()["state"]).abs().max() <= step
    error = (run(narrow, *inputs(9, seed=1)) - run(wide, *inputs(9, seed=1))).abs().max()
    assert 0 < error < 0.1


def test_rounding_follows_the_seed_and_the_length_alone():
    states = {}
    for seed in (0, 0, 1):
        memory = make("float16", seed=seed)
        for part in (inputs(4), inputs(3, seed=1)):
            run(memory, *part)
        twin = memory.fork()
        run(memory, *inputs(2, seed=2))
        run(twin, *inputs(2, seed=2))
        assert torch.equal(memory.state()["state"], twin.state()["state"])
        again = states.setdefault(seed, memory.state()["state"])
        assert torch.equal(again, memory.state()["state"])
    assert not torch.equal(states[0], states[1])


def test_rounding_to_nearest_is_what_torch_does():
    wide, narrow = make(), make("bfloat16", "nearest")
    run(wide, *inputs(9))
    run(narrow, *inputs(9))
    assert torch.equal(narrow.state()["state"], wide.state()["state"].bfloat16())


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
