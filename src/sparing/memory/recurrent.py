"""Memory of one Mamba-2 layer of one sequence: stage, attend, commit, with roll-back by replay.

A state that has moved on cannot be moved back: dividing by a decay close to zero is unstable. So a forward pass leaves
the committed state alone and stages its inputs; `commit(n)` carries the state over the first n of them. Rejecting
tokens is not replaying them, and costs no copy of the state.

Two things save passes over the state, and change no result. A commit of few tokens only notes them, where kernels are
native: the next forward, which reads the whole state anyway, carries it over them on the way. And a forward over many
tokens ends with the state after the last of them, which a commit of all of them takes.
Source: Nemotron 3 serving (replay); kernels in `sparing.kernels.ssm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from sparing import kernels
from sparing.config.memory import RecurrentSpec
from sparing.kernels.ssm import MambaWeights, joins_passes
from sparing.memory.group import Share

__all__ = ["RecurrentGroup", "RecurrentMemory", "RecurrentRows"]

KEPT = 64  # staged tokens: up to this many keep their convolved inputs until the commit, more keep the new state
NOTED = 8  # staged tokens: a commit of up to this many is carried out by the next forward

Inputs = tuple[Tensor, Tensor, Tensor]


class RecurrentMemory:
    """The state, and the last inputs of the convolution, both of fixed size.

    Stochastic rounding draws from the spec's seed, the layer's index and the length: the same tokens give the same
    state in a fork.
    """

    def __init__(self, spec: RecurrentSpec, dtype: torch.dtype, device: torch.device, layer: int = 0):
        self.spec = spec
        self.layer = layer
        self.length = 0  # tokens ever committed
        self.staged = 0
        state_dtype = getattr(torch, spec.state_dtype)
        self._state = torch.zeros(spec.num_heads, spec.head_dim, spec.state_size, dtype=state_dtype, device=device)
        self._tail = torch.zeros(spec.conv_kernel - 1, spec.conv_size, dtype=dtype, device=device)
        self._lent = False  # a fork reads the same state: copy before writing
        self._window = self._tail  # tail and staged rows
        self._dt: Tensor | None = None
        self._weights: MambaWeights | None = None
        self._kept: Inputs | None = None  # x, B and C of the staged tokens
        self._after: Tensor | None = None  # float32, the state after all staged tokens
        self._pending: Inputs | None = None  # x, dt and B of committed tokens that the state has yet to follow
        self._A: Tensor | None = None  # of those

    def stage(self, xbc: Tensor, dt: Tensor, weights: MambaWeights) -> None:
        """Make T tokens visible to `attend`.

        xbc: [T, C] rows of x, B and C as they enter the convolution; dt: float32 [T, heads], final.
        Raises ValueError while others are staged.
        """
        if self.staged:
            raise ValueError(f"{self.staged} tokens are staged: commit or roll back before staging more")
        self._window, self._dt, self._weights = torch.cat([self._tail, xbc]), dt, weights
        self.staged = len(xbc)

    def attend(self, n: int) -> Tensor:
        """What the last n staged tokens read from the state: float32 [n, heads, head_dim]."""
        assert self._weights is not None and self._dt is not None
        A, D = self._weights.A, self._weights.D
        x, B, C = inputs = self._inputs(self.staged)
        is_many = self.staged > KEPT
        self._kept = None if is_many else inputs
        if self._pending is not None:
            self._own()
        y, after = kernels.ssd_scan(
            x, self._dt, A, B, C, D, self._state.float(), pending=self._pending, final_state=is_many
        )
        self._after, self._pending, self._A = after, None, None
        return y if n == self.staged else y[self.staged - n :]

    def commit(self, n: int) -> None:
        """Keep the first n staged tokens, forget the rest."""
        if not 0 <= n <= self.staged:
            raise ValueError(f"cannot commit {n} tokens: {self.staged} are staged")
        if n:
            self._advance(n)
        self.staged, self._window = 0, self._tail
        self._dt = self._weights = self._kept = self._after = None

    def _advance(self, n: int) -> None:
        assert self._weights is not None and self._dt is not None
        self.length += n
        self._tail = self._window[n : n + self.spec.conv_kernel - 1].clone()
        if self._after is not None and n == self.staged:
            self._state, self._lent = self._rounded(self._after), False
            return
        if self._pending is not None:
            self._catch_up()
        x, B, _ = self._inputs(n)
        self._pending, self._A = (x, self._dt[:n], B), self._weights.A
        if self.staged > NOTED or not joins_passes(self._state):
            self._catch_up()

    @torch.inference_mode()
    def _catch_up(self) -> None:
        """Carry the state over the committed tokens it has yet to follow."""
        if self._pending is None:
            return
        assert self._A is not None
        self._own()
        x, dt, B = self._pending
        state = self._state.float()
        kernels.advance_state_(state, x, dt, self._A, B)
        self._state, self._pending, self._A = self._rounded(state), None, None

    def _own(self) -> None:
        """Make the state this memory's alone, to be written."""
        if self._lent:
            self._state, self._lent = self._state.clone(), False

    def _inputs(self, n: int) -> Inputs:
        """Of the first n staged tokens, convolved: x [n, heads, head_dim], B and C [n, groups, state_size]."""
        if self._kept is not None:
            x, B, C = self._kept
            return self._kept if n == self.staged else (x[:n], B[:n], C[:n])
        spec, weights = self.spec, self._weights
        assert weights is not None
        rows = self._window[: n + spec.conv_kernel - 1]
        mixed = kernels.causal_conv(rows, weights.conv_weight, weights.conv_bias)
        shared = spec.num_groups * spec.state_size
        x, B, C = mixed.split_with_sizes([spec.num_heads * spec.head_dim, shared, shared], -1)
        groups = (n, spec.num_groups, spec.state_size)
        return x.view(n, spec.num_heads, spec.head_dim), B.view(groups), C.view(groups)

    def _rounded(self, state: Tensor) -> Tensor:
        """The state in the type it is kept in. Raises ValueError for numbers that are beyond the type's largest."""
        dtype = self._state.dtype
        if dtype != torch.float32:
            largest = state.abs().max().item() if state.numel() else 0.0
            if not largest <= torch.finfo(dtype).max:  # also NaN
                raise ValueError(
                    f"the recurrent state of layer {self.layer} reached {largest:g}, {_name(dtype)} holds numbers up to"
                    f" {torch.finfo(dtype).max:g}: use ssm_dtype='bfloat16' or 'float32'"
                )
        if dtype == torch.float32 or self.spec.state_rounding == "nearest":
            return state.to(dtype)
        seed = 1000 * self.spec.state_seed + self.layer
        generator = torch.Generator(state.device).manual_seed(seed * 1_000_003 + self.length)
        return kernels.stochastic_round(state, dtype, generator)

    @property
    def nbytes(self) -> int:
        """Bytes of the state and the rows before the next token: all that is held while nothing is staged.

        A noted commit is carried out first, so that its inputs are held no longer.
        """
        self._catch_up()
        return self._state.nbytes + self._tail.nbytes

    def state(self) -> dict[str, Tensor]:
        """What `restore` needs, as named tensors."""
        self._catch_up()
        return {"state": self._state, "tail": self._tail}

    def restore(self, length: int, state: dict[str, Tensor]) -> None:
        """Take over the `state` of a memory in which `length` tokens were committed."""
        self._state, self._tail, self.length = state["state"].clone(), state["tail"].clone(), length
        self._window, self._lent, self._pending, self._A = self._tail, False, None, None

    def fork(self) -> RecurrentMemory:
        self._catch_up()
        twin = object.__new__(RecurrentMemory)
        twin.__dict__.update(self.__dict__)
        self._lent = twin._lent = True
        return twin


class RecurrentGroup:
    """Mamba-2 layers of one sequence. layers: their numbers in the model."""

    def __init__(self, spec: RecurrentSpec, layers: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.layers = tuple(layers)
        self._spec = spec
        self.of = {i: RecurrentMemory(spec, dtype, device, i) for i in layers}

    def spec(self, layer: int) -> RecurrentSpec:
        return self._spec

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.of.values())

    def stage(self, n: int, length: int, room: int) -> None:
        pass

    def commit(self, n: int, staged: int, length: int) -> None:
        for layer in self.of.values():
            layer.commit(n)

    def mark(self) -> None:
        return None

    def reset(self, mark: None) -> None:
        pass

    def fork(self) -> RecurrentGroup:
        twin = copy(self)
        twin.of = {i: layer.fork() for i, layer in self.of.items()}
        return twin

    def blocks(self) -> dict[int, int]:
        tensors = [tensor for layer in self.of.values() for tensor in (layer._state, layer._tail)]
        return {tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}

    def state(self, layer: int) -> dict[str, Tensor]:
        return self.of[layer].state()

    def restore(self, length: int, states: Mapping[int, dict[str, Tensor]]) -> None:
        for i, layer in self.of.items():
            layer.restore(length, states[i])

    @staticmethod
    def together(groups: Sequence[RecurrentGroup], shares: Sequence[Share]) -> RecurrentRows:
        return RecurrentRows(groups, shares)


class RecurrentRows:
    """The same layers of the rows of a batch, in a pass."""

    def __init__(self, groups: Sequence[RecurrentGroup], shares: Sequence[Share]):
        self._groups, self._added = groups, [share.added for share in shares]
        self._queries = [share.queries for share in shares]

    def scan(self, layer: int, xbc: Tensor, dt: Tensor, weights: MambaWeights) -> Tensor:
        """Stage the inputs of a layer, xbc [all added tokens, C] and dt float32 [.., heads], and read its states.

        Returns float32 [all queries, heads, head_dim].
        """
        outputs = []
        of_rows = xbc.split_with_sizes(self._added), dt.split_with_sizes(self._added)
        for group, xbc_row, dt_row, n in zip(self._groups, *of_rows, self._queries, strict=True):
            group.of[layer].stage(xbc_row, dt_row, weights)
            outputs.append(group.of[layer].attend(n))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def narrow(self, queries: Sequence[int]) -> None:
        """From now on this many of each row's newest positions ask."""
        self._queries = list(queries)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
