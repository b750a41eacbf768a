"""The memory of an attention layer against a list of tokens and softmax written out, under random operations."""

from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from sparing.config.memory import AttentionSpec
from sparing.config.rope import RopeParameters
from sparing.kernels import KeysFromValues
from tests.memory.one_layer import OneLayer, one_layer

KV_HEADS, HEADS, DIM = 2, 4, 6
keys_from_values = KeysFromValues(torch.full((DIM,), 1.5), RopeParameters("proportional", 100.0, 0.7))


def make(window: int | None, value_only: bool) -> OneLayer:
    spec = AttentionSpec(KV_HEADS, DIM, window, value_only=value_only)
    return one_layer(spec, keys_from_values=keys_from_values if value_only else None)


@dataclass
class Naive:
    """Every token ever committed and those staged, as a list; visibility decided by position alone."""

    window: int | None
    tokens: list[tuple[Tensor, Tensor]] = field(default_factory=list)
    staged: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def attend(self, q: Tensor, causal: bool) -> Tensor:
        everything = self.tokens + self.staged
        base, output = len(self.tokens), torch.zeros(q.shape, dtype=torch.float64)
        for t in range(len(q)):
            position = len(everything) - len(q) + t
            for head in range(HEADS):
                seen = [
                    (k[head // (HEADS // KV_HEADS)].double(), v[head // (HEADS // KV_HEADS)].double())
                    for j, (k, v) in enumerate(everything)
                    if (
                        j <= position and (self.window is None or j > position - self.window)
                        if causal
                        else j >= base or self.window is None or j > base - self.window
                    )
                ]
                scores = torch.stack([k @ q[t, head].double() * 0.3 for k, _ in seen])
                output[t, head] = torch.softmax(scores, 0) @ torch.stack([v for _, v in seen])
        return output

    def commit(self, n: int) -> None:
        self.tokens, self.staged = self.tokens + self.staged[:n], []

    def positions(self) -> list[int]:
        kept = len(self.tokens) if self.window is None else min(len(self.tokens), self.window - 1)
        return list(range(len(self.tokens) - kept, len(self.tokens)))

    def fork(self) -> "Naive":
        return Naive(self.window, list(self.tokens))


def check(memory: OneLayer, naive: Naive) -> None:
    positions = naive.positions()
    assert memory.length == len(naive.tokens)
    assert memory.entries().tolist() == [positions] * KV_HEADS
    assert memory.nbytes == memory.spec.nbytes(memory.length, 4)
    keys, values = memory.read()
    for i, position in enumerate(positions):
        torch.testing.assert_close(keys[:, i], naive.tokens[position][0])
        assert torch.equal(values[:, i], naive.tokens[position][1])


@pytest.mark.parametrize("value_only", [False, True])
@pytest.mark.parametrize("window", [None, 1, 2, 5])
@settings(max_examples=25)
@given(
    operations=st.lists(
        st.tuples(st.sampled_from(["forward", "canvas", "fork"]), st.integers(1, 7), st.integers(0, 7), st.booleans()),
        max_size=8,
    ),
    seed=st.integers(0, 1000),
)
def test_against_a_list_of_tokens(window, value_only, operations, seed):
    generator = torch.Generator().manual_seed(seed)
    memory, naive = make(window, value_only), Naive(window)
    others = []
    for kind, size, number, narrow in operations:
        if kind == "fork":
            others.append((memory, naive))
            memory, naive = memory.fork(), naive.fork()
            continue
        v = torch.randn(size, KV_HEADS, DIM, generator=generator)
        k = torch.randn(size, KV_HEADS, DIM, generator=generator)
        if value_only:
            k = keys_from_values(v.transpose(0, 1), torch.arange(memory.length, memory.length + size)).transpose(0, 1)
        memory.stage(k, v)
        naive.staged += list(zip(k, v, strict=True))
        causal = kind == "forward"
        q = torch.randn(1 if narrow and causal else size, HEADS, DIM, generator=generator)
        mixed = memory.attend(q, scale=0.3, causal=causal)
        torch.testing.assert_close(mixed.double(), naive.attend(q, causal), rtol=1e-5, atol=1e-5)
        n = min(number, size) if causal else 0
        memory.commit(n)
        naive.commit(n)
        check(memory, naive)
    for other, expected in others:  # nothing that came after a fork changed what was forked
        check(other, expected)


@pytest.mark.parametrize("value_only", [False, True])
def test_forgetting_entries_keeps_the_positions_of_the_others(value_only):
    """Each head attends over what it kept, as if the rest had never been; what comes later sees it all."""
    generator = torch.Generator().manual_seed(0)
    memory = make(None, value_only)
    k, v = torch.randn(2, 9, KV_HEADS, DIM, generator=generator)
    if value_only:
        k = keys_from_values(v.transpose(0, 1), torch.arange(9)).transpose(0, 1)
    memory.stage(k[:6], v[:6])
    memory.commit(6)
    twin = memory.fork()
    kept = torch.tensor([[0, 2, 5], [1, 2, 3]])
    memory.keep(kept)
    assert torch.equal(memory.entries(), kept)
    assert memory.length == 6
    assert memory.nbytes == memory.spec.nbytes(3, 4) + 4 * kept.numel()
    memory.stage(k[6:], v[6:])
    q = torch.randn(3, HEADS, DIM, generator=generator)
    mixed = memory.attend(q, scale=0.3, causal=True)
    for head in range(HEADS):
        group = head // (HEADS // KV_HEADS)
        for t in range(3):
            seen = [*kept[group].tolist(), *range(6, 7 + t)]
            weights = torch.softmax(0.3 * (k[seen, group].double() @ q[t, head].double()), 0)
            torch.testing.assert_close(mixed[t, head].double(), weights @ v[seen, group].double(), rtol=1e-5, atol=1e-5)
    memory.commit(2)
    assert memory.entries().tolist() == [[0, 2, 5, 6, 7], [1, 2, 3, 6, 7]]
    memory.keep(torch.tensor([[4], [0]]))
    assert memory.entries().tolist() == [[7], [1]]
    check(twin, Naive(None, list(zip(k[:6], v[:6], strict=True))))


def test_entries_are_not_forgotten_while_tokens_are_staged():
    memory = make(None, False)
    memory.stage(torch.zeros(2, KV_HEADS, DIM), torch.zeros(2, KV_HEADS, DIM))
    with pytest.raises(ValueError, match="2 tokens are staged"):
        memory.keep(torch.zeros(KV_HEADS, 1, dtype=torch.int64))


def test_commit_refuses_what_is_not_staged():
    memory = make(3, False)
    memory.stage(torch.zeros(2, KV_HEADS, DIM), torch.zeros(2, KV_HEADS, DIM))
    for n in (-1, 3):
        with pytest.raises(ValueError, match=f"{n} tokens: 2 are staged"):
            memory.commit(n)


def test_staged_tokens_count_in_bytes_until_they_are_settled():
    memory = make(None, False)
    memory.stage(torch.zeros(2, KV_HEADS, DIM), torch.zeros(2, KV_HEADS, DIM))
    assert memory.nbytes == 2 * memory.spec.nbytes(1, 4)
    memory.commit(0)
    assert memory.nbytes == 0
