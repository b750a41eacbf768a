"""With native kernels a row of few tokens is itself to the bit, in bfloat16 too, whatever its neighbours and forks."""

from functools import cache

import pytest
import torch

from sparing.kernels import dispatch
from sparing.models.batch import Row
from tests.kernel_sets import using
from tests.tiny import CONFIGS, built, random_ids

MOST = 8  # tokens of a pass, up to which native products take sums in one order

names = pytest.mark.parametrize("name", CONFIGS)
natively = pytest.mark.skipif(len(dispatch.available()) == 1, reason="was built without native kernels")


@cache
def of(name: str, dtype: torch.dtype):
    config = CONFIGS[name]
    if config["model_type"] == "nemotron_h":
        config = config | {"mamba_num_heads": 32, "n_groups": 4}  # whole vectors of PyTorch's softplus
    return built(config).to(dtype)


def filled(name: str, dtype: torch.dtype, length: int, seed: int):
    memory = of(name, dtype).memory()
    for token in random_ids(length, seed).split(MOST):
        of(name, dtype).run([Row(token, memory, wanted=0)])
        memory.commit(len(token))
    return memory


@pytest.fixture(params=[pytest.param(name, id=name) for name in dispatch.available()[1:]] or [None])
def native(request):
    with using(request.param):
        yield


@natively
@names
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_row_among_others_is_itself(native, name, dtype):
    lengths, sizes = (3, 70, 131, 12), (1, 4, 1, 2)

    def row(i: int) -> Row:
        return Row(random_ids(sizes[i], 10 + i), filled(name, dtype, lengths[i], i))

    together = of(name, dtype).run([row(i) for i in range(len(sizes))]).split(sizes)
    for i, found in enumerate(together):
        assert torch.equal(found, of(name, dtype).run([row(i)]))


# A scan over several tokens adds in another order than one over each.
@natively
@pytest.mark.parametrize("name", [name for name in CONFIGS if CONFIGS[name]["model_type"] != "nemotron_h"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_tokens_at_once_are_tokens_one_by_one(native, name, dtype):
    """As a round of speculation checks them."""
    ids = random_ids(6, 3)
    for length in (5, 64, 130):
        one, many = filled(name, dtype, length, 1), filled(name, dtype, length, 1)
        at_once = of(name, dtype).run([Row(ids, many)])
        for i, token in enumerate(ids.split(1)):
            assert torch.equal(of(name, dtype).run([Row(token, one)]), at_once[i : i + 1])
            one.commit(1)


@natively
@names
def test_a_fork_continues_to_the_bit(native, name):
    """Its entries lie in other extents."""
    dtype = torch.bfloat16
    memory = filled(name, dtype, 100, 1)
    twin = memory.fork()
    for seed in range(70):
        token = random_ids(1, seed)
        rows = [of(name, dtype).run([Row(token, side)]) for side in (memory, twin)]
        assert torch.equal(*rows)
        memory.commit(1)
        twin.commit(1)
        if seed % 9 == 0:
            twin = twin.fork()
