"""Memory of layers whose entries are kept as TurboQuant codes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sparing.config.codes import TurboQuant
from sparing.config.memory import AttentionSpec
from sparing.kernels import KeysFromValues
from sparing.memory.group import Share
from sparing.memory.turboquant.coder import make_coder
from sparing.memory.turboquant.key_bias import KeyBias
from sparing.memory.turboquant.layers import CodedLayers, Counts
from sparing.memory.turboquant.logit_noise import LogitNoise, warn_of_noise
from sparing.memory.turboquant.rows import CodedRows

__all__ = ["CodedGroup", "coded_group"]


class CodedGroup:
    """Codes of one sequence in layers of a model, all of which hold the same number of entries in the same way.

    kv: the policy as it was written, for warnings; sections: layers of one spec each; noise: of each layer.
    """

    def __init__(self, kv: str, form: TurboQuant, sections: Sequence[CodedLayers], noise: Mapping[int, LogitNoise]):
        self.kv, self.form, self.sections = kv, form, tuple(sections)
        self._places = {layer: (n, i) for n, alike in enumerate(sections) for i, layer in enumerate(alike.layers)}
        self.layers = tuple(sorted(self._places))
        self.counts, self.expected = Counts(form.sink_tokens), 0  # codes that the text is known to need
        self._noise = noise
        self._observed: dict[int, float] | None = {}  # noise that the first prompt foretells; None: it was told of

    def spec(self, layer: int) -> AttentionSpec:
        return self.alike(self._places[layer][0]).spec

    def place(self, layer: int) -> tuple[int, int]:
        """The number of the section that a layer is in, and its place there."""
        return self._places[layer]

    def alike(self, number: int) -> CodedLayers:
        return self.sections[number]

    @property
    def nbytes(self) -> int:
        return sum(layers.nbytes(self.counts) for layers in self.sections)

    def held(self, layer: int) -> int:
        """Entries of a layer, staged ones included."""
        return self.counts.held

    def stage(self, n: int, length: int, room: int) -> None:
        end = replace(self.counts, end=length + room, exact=self.counts.exact + room)
        self.expected = end.coded_at(end.end, self.form)
        self.counts = replace(self.counts, end=length + n, exact=self.counts.exact + n)
        for layers in self.sections:
            layers.exact.extend(n, length)

    def commit(self, n: int, staged: int, length: int) -> None:
        counts = replace(self.counts, end=length + n, exact=self.counts.exact - staged + n)
        coded = counts.coded_at(counts.end, self.form)
        for layers in self.sections:
            layers.settle(counts, coded, self.expected)
        self.counts = replace(counts, exact=counts.exact - (coded - counts.coded), coded=coded)
        if self._observed is not None and length == 0:
            if n:
                warn_of_noise(self.kv, self.form, {i: self._observed.get(i, 0.0) for i in self.layers})
            self._observed = None if n else {}

    @property
    def is_observing(self) -> bool:
        """Whether queries are still to be looked at."""
        return self._observed is not None

    def observe(self, layer: int, q: Tensor, scale: float) -> None:
        """Predict the noise of a layer from a first prompt's queries [T, heads, d] and its keys."""
        if self._observed is None:
            return
        number, i = self._places[layer]
        keys = self.alike(number).exact_keys(i, self.counts)
        most = max(self._observed.get(layer, 0.0), self._noise[layer].predicted(q, keys, scale))
        self._observed = {**self._observed, layer: most}

    def keep(self, index: Mapping[int, Tensor]) -> None:
        """Forget all entries of each layer but index int64 [kv_heads, m], ascending; positions and rotations stay.

        Of those that stay, sinks and the newest `window` remain exact, as far as all heads of all layers keep them; all
        others are codes from then on.
        """
        counts, m = self.counts, next(iter(index.values())).shape[1]
        heads = torch.cat([index[layer] for layer in self.layers]).cpu()  # [heads of all layers, m]
        kept_in_order = (heads == torch.arange(m)).all(0).long().cumprod(0)
        newest = (heads.flip(1) == torch.arange(counts.held - 1, counts.held - 1 - m, -1)).all(0).long().cumprod(0)
        sinks = min(counts.sinks, int(kept_in_order.sum()))
        tail = min(self.form.window, int(newest.sum()), m - sinks, counts.exact - counts.sinks)
        for layers in self.sections:
            layers.keep(torch.stack([index[layer] for layer in layers.layers]), counts, sinks, tail)
        most_sinks = sinks + max(0, self.form.sink_tokens - counts.end)
        self.counts = Counts(most_sinks, counts.end, sinks + tail, m - sinks - tail)

    def hold_at_least(self, entries: int) -> None:
        """Nothing is forgotten but by `keep`."""

    def mark(self) -> Any:
        return self.counts, self.expected, self._observed, [layers.mark() for layers in self.sections]

    def reset(self, mark: Any) -> None:
        self.counts, self.expected, self._observed, of_sections = mark
        for layers, one in zip(self.sections, of_sections, strict=True):
            layers.reset(one)

    def fork(self) -> CodedGroup:
        twin = copy(self)
        twin.sections = tuple(layers.fork() for layers in self.sections)
        return twin

    def blocks(self) -> dict[int, int]:
        return {key: n for layers in self.sections for key, n in layers.blocks().items()}

    def write(self, layer: int, k: Tensor, v: Tensor) -> None:
        """Fill the staged entries of a layer. k, v: [T, kv_heads, head_dim], k normed and rotated."""
        CodedRows([self], [Share(len(v), 0, True, self.counts.end)]).write(layer, k, v)

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        """(keys, values) [kv_heads, n, head_dim] of all entries of a layer, decoded."""
        number, i = self._places[layer]
        return self.alike(number).read(i, self.counts)

    def entries(self, layer: int) -> Tensor:
        """Positions of all entries: int64 [kv_heads, n]."""
        number, i = self._places[layer]
        return self.alike(number).positions(i, self.counts).cpu()

    def state(self, layer: int) -> dict[str, Tensor]:
        number, i = self._places[layer]
        return self.alike(number).state(i, self.counts)

    def restore(self, length: int, states: Mapping[int, dict[str, Tensor]]) -> None:
        first = states[self.layers[0]]
        end, most_sinks, coded = first["counts"].tolist()
        counts = Counts(most_sinks, end, len(first["v_tail"]), coded)
        for layers in self.sections:
            layers.restore([states[layer] for layer in layers.layers], counts)
        self.counts, self._observed = counts, None if length else {}

    @staticmethod
    def together(groups: Sequence[CodedGroup], shares: Sequence[Share]) -> CodedRows:
        return CodedRows(groups, shares)


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
    alike, noise = dict[tuple[AttentionSpec, bool], list[int]](), dict[int, LogitNoise]()
    for i, spec in specs.items():
        is_tied = spec.value_only and keys_from_values[i] is not None
        alike.setdefault((spec, is_tied), []).append(i)
        noise[i] = LogitNoise(form, spec.head_dim, key_biases[i], "values" if is_tied else "keys")
    sections = []
    for (spec, is_tied), layers in alike.items():
        shape, roles = (spec.num_key_value_heads, spec.head_dim), ("values",) if is_tied else ("keys", "values")
        coders = [[make_coder(form, i, role, *shape, device) for role in roles] for i in layers]
        tied = [found for i in layers if is_tied and (found := keys_from_values[i]) is not None]
        biases = [key_biases[i] for i in layers]
        sections.append(CodedLayers(spec, layers, coders, dtype, device, tied, biases))
    return CodedGroup(kv, form, sections, noise)
