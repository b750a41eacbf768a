"""Memory of layers whose entries are kept as TurboQuant codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy

import torch
from torch import Tensor

from sparing.config.codes import TurboQuant
from sparing.config.memory import AttentionSpec
from sparing.kernels import KeysFromValues
from sparing.memory.group import Share
from sparing.memory.turboquant.buffer import Where
from sparing.memory.turboquant.key_bias import KeyBias
from sparing.memory.turboquant.logit_noise import LogitNoise, warn_of_noise
from sparing.memory.turboquant.storage import TurboQuantStorage, turboquant_storage

__all__ = ["CodedGroup", "CodedRows"]


class CodedLayer:
    """One of the layers: its storage, positions once entries were forgotten, and the noise that a prompt foretells."""

    def __init__(self, spec: AttentionSpec, storage: TurboQuantStorage, noise: LogitNoise):
        self.spec, self.storage, self.noise = spec, storage, noise
        self.scattered: Tensor | None = None  # int32 [kv_heads, m], of the oldest entries

    def fork(self) -> CodedLayer:
        twin = CodedLayer(self.spec, self.storage.fork(), self.noise.fork())
        twin.scattered = self.scattered
        return twin

    def where(self, end: int) -> Where:
        """Positions of all entries, of which the newest stands before `end`."""
        held = len(self.storage)
        return end - held if self.scattered is None else self.positions(held, end)

    def positions(self, held: int, end: int) -> Tensor:
        """int64 [kv_heads, held]"""
        heads = self.spec.num_key_value_heads
        if self.scattered is None:
            return torch.arange(end - held, end).expand(heads, held)
        following = torch.arange(end - (held - self.scattered.shape[1]), end).expand(heads, -1)
        return torch.cat([self.scattered.long(), following], 1)

    @property
    def nbytes(self) -> int:
        return self.storage.nbytes + (0 if self.scattered is None else self.scattered.nbytes)


class CodedGroup:
    """Codes of one sequence in layers of a model. kv: the policy as it was written, for warnings."""

    def __init__(self, kv: str, form: TurboQuant, layers: Mapping[int, CodedLayer]):
        self.layers = tuple(layers)
        self.kv, self.form, self.of = kv, form, dict(layers)
        self._end = self._staged = 0  # position after the newest entry, and how many of the newest are staged
        self._says = True  # whether noise is still to be told of

    def spec(self, layer: int) -> AttentionSpec:
        return self.of[layer].spec

    @property
    def nbytes(self) -> int:
        return sum(layer.nbytes for layer in self.of.values())

    def held(self, layer: int) -> int:
        """Entries of a layer, staged ones included, also those still to be written."""
        return self.of[layer].storage.committed + self._staged

    def stage(self, n: int, length: int, room: int) -> None:
        self._end, self._staged = length + n, n

    def commit(self, n: int, staged: int, length: int) -> None:
        self._end, self._staged = length + n, 0
        for layer in self.of.values():
            layer.storage.settle(n)
        if self._says and length == 0:
            if n:
                warn_of_noise(self.kv, self.form, {i: layer.noise for i, layer in self.of.items()})
                self._says = False
            else:
                for layer in self.of.values():
                    layer.noise.forget()

    def keep(self, index: Mapping[int, Tensor]) -> None:
        """Forget all entries of each layer but index int64 [kv_heads, m], ascending; positions and rotations stay."""
        for i, layer in self.of.items():
            layer.scattered = self.entries(i).gather(1, index[i].cpu()).int()
            layer.storage.keep(index[i])

    def mark(self) -> None:
        return None

    def reset(self, mark: None) -> None:
        pass

    def fork(self) -> CodedGroup:
        twin = copy(self)
        twin.of = {i: layer.fork() for i, layer in self.of.items()}
        return twin

    def blocks(self) -> dict[int, int]:
        tensors = [tensor for layer in self.of.values() for tensor in layer.storage.tensors()]
        return {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Stage entries of a layer. k, v: [T, kv_heads, head_dim], k normed and rotated."""
        self.of[layer].storage.append(k, v)

    def attend(self, layer: int, q: Tensor, scale: float, causal: bool) -> Tensor:
        """Mix values for the last T positions. q: [T, heads, head_dim], normed and rotated; returns its shape."""
        mine = self.of[layer]
        if self._says:
            mine.noise.observe(q, mine.storage.read(mine.where(self._end))[0], scale)
        return mine.storage.attend(q, mine.where(self._end), scale=scale, causal=causal, window=None)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """(keys, values) [kv_heads, n, head_dim] of all entries of a layer, decoded."""
        return self.of[layer].storage.read(self.of[layer].where(self._end))

    def entries(self, layer: int) -> Tensor:
        """Positions of all entries: int64 [kv_heads, n]."""
        return self.of[layer].positions(self.held(layer), self._end)

    def state(self, layer: int) -> dict[str, Tensor]:
        found = self.of[layer].storage.state()
        scattered = self.of[layer].scattered
        return found if scattered is None else {**found, "positions": scattered}

    def restore(self, length: int, states: Mapping[int, dict[str, Tensor]]) -> None:
        self._end, self._says = length, length == 0
        for i, layer in self.of.items():
            state = dict(states[i])
            layer.scattered = state.pop("positions", None)
            layer.storage.restore(state)

    @staticmethod
    def together(groups: Sequence[CodedGroup], shares: Sequence[Share]) -> CodedRows:
        return CodedRows(groups, shares)


class CodedRows:
    """The same layers of the rows of a batch, in a pass."""

    def __init__(self, groups: Sequence[CodedGroup], shares: Sequence[Share]):
        self._groups, self._shares = groups, shares
        self._queries = [share.queries for share in shares]

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """k, v: [all added tokens, kv_heads, head_dim]."""
        sizes = [share.added for share in self._shares]
        for group, *new in zip(self._groups, k.split_with_sizes(sizes), v.split_with_sizes(sizes), strict=True):
            group.write(layer, *new)

    def attend(self, layer: int, q: Tensor, scale: float) -> Tensor:
        """q: [all queries, heads, head_dim], returns its shape."""
        outputs = [
            group.attend(layer, part, scale, share.causal)
            for group, share, part in zip(self._groups, self._shares, q.split_with_sizes(self._queries), strict=True)
            if len(part)
        ]
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs) if outputs else q

    def narrow(self, queries: Sequence[int]) -> None:
        """From now on this many of each row's newest positions ask."""
        self._queries = list(queries)


def coded_group(
    kv: str,
    form: TurboQuant,
    specs: Mapping[int, AttentionSpec],
    *,
    dtype: torch.dtype,
    device: torch.device,
    keys_from_values: Sequence[KeysFromValues | None],
    key_biases: Sequence[KeyBias | None],
) -> CodedGroup:
    """An empty memory of the layers of `specs`; keys_from_values, key_biases: of all layers of the model."""
    layers = {}
    for i, spec in specs.items():
        rebuild, bias = keys_from_values[i], key_biases[i]
        role = "values" if spec.value_only and rebuild is not None else "keys"
        storage = turboquant_storage(spec, form, i, dtype=dtype, device=device, keys_from_values=rebuild, bias=bias)
        layers[i] = CodedLayer(spec, storage, LogitNoise(form, spec.head_dim, bias, role))
    return CodedGroup(kv, form, layers)
