"""Staged tokens that are not kept leave nothing behind, in any memory: bit for bit what a fresh one holds."""

from random import Random
from typing import Any

import pytest
import torch
from torch import Tensor

from sparing.config.memory import AttentionSpec, RecurrentSpec
from sparing.config.policy import parse_policy
from sparing.config.rope import RopeParameters
from sparing.kernels import KeysFromValues, MambaWeights
from sparing.memory.group import Share
from sparing.memory.plan import plan_memory
from sparing.memory.sequence import Memory
from tests.kernel_sets import using

D, HEADS = 32, 2
STATE = RecurrentSpec(2, 4, 8, 1, 4)
WEIGHTS = MambaWeights(torch.rand(STATE.conv_size, 1, 4), None, -torch.rand(2), torch.rand(2))
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {},
    "window:9": {},
    "int8": {},
    "turboquant:4": {"block": 1},
    "turboquant:3": {"window": 7, "sink_tokens": 5, "block": 16},
    "turboquant:2": {"variant": "prod", "block": 16},
    "turboquant:2.5": {"block": 16},
    "turboquant:3.5": {"sink_tokens": 3, "prefill": "exact"},
    "turboquant:k2.5v3": {"block": 16, "window": 2},
    "dense, state of 16 bits": {"ssm_dtype": "bfloat16"},
}


def empty(kv: str, value_only: bool) -> Memory:
    specs = [AttentionSpec(HEADS, D, value_only=value_only), AttentionSpec(HEADS, D, window=6), STATE]
    rebuild = KeysFromValues(torch.ones(D), RopeParameters(rope_theta=10000.0)) if value_only else None
    return plan_memory(
        specs,
        parse_policy(kv.split(",")[0], POLICIES[kv]),
        dtype=torch.float32,
        device=torch.device("cpu"),
        keys_from_values=[rebuild, None, None],
        key_biases=[None] * 3,
    ).memory()


def numbers(position: int, seed: int) -> Tensor:
    """All that a token at a position gives its layers: another seed, another token."""
    return torch.randn(4 * HEADS * D, generator=torch.Generator().manual_seed(1000 * seed + position))


def step(memory: Memory, tokens: list[Tensor], causal: bool = True) -> list[Tensor]:
    """Stage tokens in every layer; what attention reads there."""
    x = torch.stack(tokens).view(len(tokens), 4, HEADS, D)
    outputs = []
    n = len(tokens)
    memory.stage(n)
    for group in memory.groups:
        rows = group.together([group], [Share(n, n, causal, memory.length + n)])
        for layer in group.layers:
            if isinstance(group.spec(layer), AttentionSpec):
                rows.write(layer, x[:, 2] if group.spec(layer).value_only else x[:, 1], x[:, 2])
                outputs.append(rows.attend(layer, x[:, 0], 0.2))
            elif causal:
                xbc, dt = x[:, 3].flatten(1)[:, : STATE.conv_size], x[:, 0, 0, :2].sigmoid()
                rows.scan(layer, xbc, dt, WEIGHTS)
    return outputs


def state(memory: Memory) -> list[Any]:
    return [
        (memory.length, memory.staged, memory.nbytes, {n: x.clone() for n, x in layer.state().items()})
        for layer in memory.own
    ]


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("value_only", [False, True])
@pytest.mark.parametrize("kv", POLICIES)
def test_what_was_taken_back_leaves_nothing(kv, value_only, seed):
    random = Random(seed)
    with using("reference"):
        busy, fresh = empty(kv, value_only), empty(kv, value_only)
        while busy.length < 40:
            length = busy.length
            for trial in range(random.randrange(3)):  # drafts that are all rejected, and canvases
                size = random.choice([1, 3, 29])
                step(busy, [numbers(length + i, 1 + trial) for i in range(size)])
                busy.rollback()
                if length:
                    step(busy, [numbers(length + i, 7) for i in range(8)], causal=False)
                    busy.rollback()
            kept, rejected = random.choice([1, 2, 5, 17]), random.choice([0, 1, 29])
            right = [numbers(length + i, 0) for i in range(kept)]
            step(busy, right + [numbers(length + kept + i, 9) for i in range(rejected)])
            busy.commit(kept)
            step(fresh, right)
            fresh.commit(kept)
        for mine, other in zip(state(busy), state(fresh), strict=True):
            assert mine[:3] == other[:3]
            for name, tensor in mine[3].items():
                close = 0.0 if name != "state" else 1e-5 if tensor.dtype == torch.float32 else 0.05
                torch.testing.assert_close(tensor, other[3][name], rtol=close, atol=close)
        following = [numbers(1000 + i, 0) for i in range(3)]
        for mine, other in zip(step(busy, following), step(fresh, following), strict=True):
            assert torch.equal(mine, other)
