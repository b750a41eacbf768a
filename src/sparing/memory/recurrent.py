"""Memory of the Mamba-2 layers of one sequence: stage, scan, commit, with roll-back by replay.

A state that has moved on cannot be moved back: dividing by a decay close to zero is unstable. So a forward pass leaves
the committed states alone and stages its inputs; `commit(n)` carries the states over the first n of them. Rejecting
tokens is not replaying them, and costs no copy of the states.

Two things save passes over the states, and change no result. A commit of few tokens only notes them, where kernels are
native: the next forward, which reads the whole state anyway, carries it over them on the way. And a forward over many
tokens ends with the states after the last of them, which a commit of all of them takes.
Source: Nemotron 3 serving (replay); kernels in `sparing.kernels.ssm`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from sparing import kernels
from sparing.config.memory import RecurrentSpec
from sparing.kernels.scan_rows import PendingInputs, ScannedRow, ScanTable, StagedInputs, parts_of, scan_rows
from sparing.kernels.ssm import MambaWeights, joins_passes
from sparing.memory.group import Share, allocations

__all__ = ["RecurrentGroup", "RecurrentRows"]

KEPT = 64  # staged tokens: up to this many keep their convolved inputs until the commit
NOTED = 8  # tokens: a commit of up to this many is carried out by the next forward; more staged end with the new state


class Held(NamedTuple):
    """What committed tokens have left; replaced, never changed.

    states: [layers, heads, head_dim, state_size]; owner: of the sequence that may carry them on where they are; tails:
    [layers, conv_kernel - 1, conv_size], the last inputs of the convolution.
    """

    states: Tensor
    owner: object
    tails: Tensor
    pending: PendingInputs | None


class RecurrentGroup:
    """States and last inputs of all Mamba-2 layers of one sequence, of fixed size. layers: their numbers in the model.

    Stochastic rounding draws from the spec's seed, the layer's number and the length: the same tokens give the same
    state in a fork.
    """

    def __init__(self, spec: RecurrentSpec, layers: Sequence[int], dtype: torch.dtype, device: torch.device):
        self.layers = tuple(layers)
        self._spec = spec
        self._state_dtype = getattr(torch, spec.state_dtype)
        self._owner = object()
        of_all = len(layers), spec.num_heads, spec.head_dim, spec.state_size
        states = torch.zeros(of_all, dtype=self._state_dtype, device=device)
        tails = torch.zeros(len(layers), spec.conv_kernel - 1, spec.conv_size, dtype=dtype, device=device)
        self._held = Held(states, self._owner, tails, None)
        self._staged: StagedInputs | None = None

    def spec(self, layer: int) -> RecurrentSpec:
        return self._spec

    @property
    def nbytes(self) -> int:
        """Bytes of the states and the inputs before the next token. What is staged or pending, `blocks` counts."""
        return self._held.states.nbytes + self._held.tails.nbytes

    def stage(self, n: int, length: int, room: int) -> None:
        states, owner, tails, pending = self._held
        if pending is not None and not any(pending.moved):
            pending.carried = states if owner is self._owner else torch.empty_like(states)
        layers, before, channels = tails.shape
        at_once = layers if n <= KEPT else 1  # large tensors of all layers would be new memory in every pass
        self._staged = StagedInputs(
            windows=[tails.new_empty(at_once, before + n, channels) for _ in range(layers // at_once)],
            mixed=tails.new_empty(at_once, n, channels, dtype=torch.float32),
            dt=tails.new_empty(layers, n, self._spec.num_heads, dtype=torch.float32),
            after=torch.empty_like(states, dtype=torch.float32) if n > NOTED else None,
            weights=[None] * layers,
        )

    def commit(self, n: int, staged: int, length: int) -> None:
        held = self._held
        if held.pending is not None and held.pending.carried is not None and all(held.pending.moved):
            held = held._replace(states=held.pending.carried, owner=self._owner, pending=None)
        if n:
            held = self._advanced(held, n, length)
        self._held, self._staged = held, None

    def _advanced(self, held: Held, n: int, length: int) -> Held:
        """What is held once the first n staged tokens are kept."""
        staged = self._staged
        if staged is None or None in staged.weights:
            missing = self.layers if staged is None else self.layers[staged.weights.index(None) :]
            raise ValueError(f"cannot commit {n} tokens: layer {missing[0]} has not seen them")
        count, before = staged.dt.shape[1], held.tails.shape[1]
        tails = torch.cat([window[:, n : n + before] for window in staged.windows])
        if n <= NOTED and count <= KEPT and joins_passes(held.states):
            mixed, dt = staged.mixed[:, :n], staged.dt[:, :n]
            if count > NOTED:  # not to hold on to the others
                mixed, dt = mixed.clone(), dt.clone()
            return held._replace(tails=tails, pending=PendingInputs(mixed, dt, staged.weights))
        if staged.after is not None and n == count and self._state_dtype == torch.float32:
            states = staged.after
        else:
            states = torch.empty_like(held.states)
            for i, layer in enumerate(self.layers):
                states[i] = self._rounded(self._followed(held, staged, n, i), layer, length + n)
        return Held(states, self._owner, tails, None)

    def _followed(self, held: Held, staged: StagedInputs, n: int, i: int) -> Tensor:
        """float32 [heads, head_dim, state_size]: the state of the i-th layer after the first n staged tokens."""
        weights, count = staged.weights[i], staged.dt.shape[1]
        assert weights is not None
        if staged.after is not None and n == count:
            return staged.after[i]
        if count <= KEPT:
            mixed = staged.mixed[i, :n]
        else:
            rows = staged.window_of(i)[: n + held.tails.shape[1]]
            mixed = kernels.causal_conv(rows, weights.conv_weight, weights.conv_bias)
        state = held.states[i].to(torch.float32, copy=True)
        x, B, _ = parts_of(mixed, *state.shape)
        kernels.advance_state_(state, x, staged.dt[i, :n], weights.A, B)
        return state

    def _rounded(self, state: Tensor, layer: int, length: int) -> Tensor:
        """The state after `length` tokens in its type. Raises ValueError for numbers beyond the type's largest."""
        dtype = self._state_dtype
        if dtype == torch.float32:
            return state
        largest = state.abs().max().item() if state.numel() else 0.0
        if not largest <= torch.finfo(dtype).max:  # also NaN
            raise ValueError(
                f"the recurrent state of layer {layer} reached {largest:g}, {_name(dtype)} holds numbers up to"
                f" {torch.finfo(dtype).max:g}: use ssm_dtype='bfloat16' or 'float32'"
            )
        if self._spec.state_rounding == "nearest":
            return state.to(dtype)
        seed = 1000 * self._spec.state_seed + layer
        generator = torch.Generator(state.device).manual_seed(seed * 1_000_003 + length)
        return kernels.stochastic_round(state, dtype, generator)

    def mark(self) -> tuple[Held, StagedInputs | None]:
        return self._held, self._staged

    def reset(self, mark: tuple[Held, StagedInputs | None]) -> None:
        self._held, self._staged = mark

    def fork(self) -> RecurrentGroup:
        """The same states. Neither side writes where the other might."""
        twin = object.__new__(RecurrentGroup)
        twin.__dict__.update(self.__dict__)
        held, pending = self._held, self._held.pending
        twin._owner, twin._staged = object(), None
        if pending is not None and any(pending.moved):  # a pass has stopped half-way
            states = torch.stack([pending.state(held.states, i) for i in range(len(self.layers))])
            twin._held = Held(states, twin._owner, held.tails, None)
            return twin
        self._owner = object()
        if pending is not None:
            twin._held = held._replace(pending=PendingInputs(pending.mixed, pending.dt, pending.weights))
        return twin

    def blocks(self) -> dict[int, int]:
        states, _, tails, pending = self._held
        tensors: list[Tensor | None] = [states, tails]
        if pending is not None:
            tensors += pending.mixed, pending.dt, pending.carried
        if self._staged is not None:
            tensors += *self._staged.windows, self._staged.mixed, self._staged.dt, self._staged.after
        return allocations(tensors)

    def state(self, layer: int) -> dict[str, Tensor]:
        states, _, tails, pending = self._held
        i = self.layers.index(layer)
        return {"state": states[i] if pending is None else pending.state(states, i), "tail": tails[i]}

    def restore(self, length: int, states: Mapping[int, dict[str, Tensor]]) -> None:
        found = [states[layer] for layer in self.layers]
        of_all, tails = (torch.stack([state[name] for state in found]) for name in ("state", "tail"))
        self._held, self._staged = Held(of_all, self._owner, tails, None), None

    @staticmethod
    def together(groups: Sequence[RecurrentGroup], shares: Sequence[Share]) -> RecurrentRows:
        """The same layers of several rows in one pass."""
        return RecurrentRows(groups, shares)


class RecurrentRows:
    """The same layers of the rows of a batch, in a pass."""

    def __init__(self, groups: Sequence[RecurrentGroup], shares: Sequence[Share]):
        self._layers = groups[0].layers
        rows = list[ScannedRow]()
        for group, share in zip(groups, shares, strict=True):
            (states, _, tails, pending), staged = group.mark()
            if staged is None or share.added != staged.dt.shape[1]:
                raise ValueError(f"{share.added} tokens are brought to a pass in which others are staged")
            if rows:
                staged.weights = rows[0].staged.weights  # one list for all rows, filled layer by layer
            rows.append(ScannedRow(states, tails, pending, staged, share.queries))
        self._table, self._weights = ScanTable(rows), rows[0].staged.weights

    def scan(self, layer: int, xbc: Tensor, dt: Tensor, weights: MambaWeights) -> Tensor:
        """Stage the inputs of a layer, xbc [all added tokens, C] and dt float32 [.., heads], and read its states.

        Returns float32 [all queries, heads, head_dim].
        """
        i = self._layers.index(layer)
        y = scan_rows(self._table, i, xbc, dt, weights)
        self._weights[i] = weights
        return y

    def narrow(self, queries: Sequence[int]) -> None:
        """From now on this many of each row's newest positions ask."""
        self._table.narrow(queries)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
