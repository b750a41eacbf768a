"""Layers that are alike, whose entries are kept as TurboQuant codes and an exact tail.

Entries lie in the order [sink tokens, exact | codes | newest, exact]. A token is encoded once, from its exact value,
when the committed length has passed its block by `window` tokens; what is only staged stays exact. A pass that reads
codes of staged tokens may make them ahead of the commit. Source: TurboQuant (arXiv 2504.19874); docs/memory.md.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from sparing.config.codes import CodeFormat
from sparing.config.memory import AttentionSpec
from sparing.kernels import KeysFromValues
from sparing.kernels.coded_rows import CodedRow, CodedSpan
from sparing.memory.extents import Entries
from sparing.memory.group import allocations
from sparing.memory.turboquant.code_extents import CodeExtents
from sparing.memory.turboquant.coder import Coder
from sparing.memory.turboquant.key_bias import KeyBias
from sparing.memory.turboquant.quantisers import Encoded

__all__ = ["CodedLayers", "Counts", "Where"]

# Positions of entries: that of the first where they follow one another, else int64 [kv_heads, n].
Where = int | Tensor


@dataclass(frozen=True)
class Counts:
    """How many entries every layer holds, and how.

    most_sinks: how many of the first stay exact at most; end: the position after the newest; exact, coded: entries that
    are held so, staged ones being exact.
    """

    most_sinks: int
    end: int = 0
    exact: int = 0
    coded: int = 0

    @property
    def held(self) -> int:
        return self.exact + self.coded

    @property
    def sinks(self) -> int:
        return min(self.most_sinks, self.exact)

    def coded_at(self, position: int, form: CodeFormat) -> int:
        """Entries that a query at `position` reads as codes; never fewer than are nothing else any more."""
        before = self.held - (self.end - position)  # entries older than the query
        return max(self.coded, before - self.sinks - form.exact(position))


class CodedLayers:
    """Entries of one sequence in layers of one spec.

    coders: of each layer, those of its values last, before them those of its keys unless keys follow from values, which
    keys_from_values then says of each layer. biases: of each layer's keys, where they can be told apart.
    """

    def __init__(
        self,
        spec: AttentionSpec,
        layers: Sequence[int],
        coders: Sequence[Sequence[Coder]],
        dtype: torch.dtype,
        device: torch.device,
        keys_from_values: Sequence[KeysFromValues],
        biases: Sequence[KeyBias | None],
    ):
        self.spec, self.layers = spec, tuple(layers)
        self.keys_from_values, self.biases = tuple(keys_from_values), tuple(biases)
        parts = len(coders[0])
        self.exact = Entries(len(layers), parts, spec.num_key_value_heads, spec.head_dim, dtype, device)
        self.codes = tuple(CodeExtents(coder, len(layers)) for coder in coders[0])
        # What follows is replaced, never changed.
        self._unlearnt = self.coders = tuple(map(tuple, coders))
        self.done = (0,) * len(layers)  # entries with codes, those made ahead of the commit included
        self.scattered: Tensor | None = None  # positions of the oldest entries, int32 [layers, heads, m]

    def nbytes(self, counts: Counts) -> int:
        of_codes = sum(codes.nbytes(counts.coded) for codes in self.codes)
        return self.exact.nbytes + of_codes + sum(x.nbytes for x in self._more() if x is not None)

    def _more(self) -> list[Tensor | None]:
        """What is held beside entries: their positions, and the channels that stand out."""
        return [self.scattered, *(coder.channels for coders in self.coders for coder in coders)]

    @torch.inference_mode()
    def encode(self, i: int, n: int, counts: Counts, expected: int = 0) -> None:
        """Make codes of the oldest exact entries until there are n; the exact ones stay.

        i: the layer's place among these; expected: codes that are known to come, these included.
        """
        done = self.done[i]
        if n <= done:
            return
        for codes in self.codes:
            codes.make_room(n, expected)
        low, high = (counts.sinks + m - counts.coded for m in (done, n))
        coders = list[Coder]()
        for part, (codes, coder) in enumerate(zip(self.codes, self.coders[i], strict=True)):
            x = self._to_encode(i, part, low, high, counts)
            coders.append(coder.learnt(x))
            codes.write(i, done, coders[-1].encode(x))
        self.coders = (*self.coders[:i], tuple(coders), *self.coders[i + 1 :])
        self.done = (*self.done[:i], n, *self.done[i + 1 :])

    @torch.inference_mode()
    def settle(self, counts: Counts, coded: int, expected: int) -> None:
        """Hold the entries that `counts` tell of, and `coded` of them as codes."""
        self.exact.truncate(counts.exact)
        if coded == counts.coded and self._holds_only(coded):
            return
        for i in range(len(self.layers)):
            self.encode(i, coded, counts, expected)
        self._only(coded)
        self.exact.drop(coded - counts.coded, after=counts.sinks)

    def _holds_only(self, coded: int) -> bool:
        return self.done == (coded,) * len(self.layers) and all(codes.room == coded for codes in self.codes)

    def _only(self, coded: int) -> None:
        """Forget all codes but the first, and with the last of them what was learnt from the first."""
        for codes in self.codes:
            codes.truncate(coded)
        self.done = (coded,) * len(self.layers)
        if coded == 0:
            self.coders = self._unlearnt

    @torch.inference_mode()
    def keep(self, index: Tensor, counts: Counts, sinks: int, tail: int) -> None:
        """Hold the entries index int64 [layers, kv_heads, m], ascending; `sinks` and `tail` of them remain exact."""
        # Codes are moved as they are. Entries exact so far that no longer are sinks or tail are encoded now, from their
        # exact values; codes made ahead of time are not used.
        m, places = index.shape[2], range(len(self.layers))
        coded, positions = index[..., sinks : m - tail], [self.positions(i, counts) for i in places]
        made = [
            [self._reordered(i, part, coded[i], counts) for part in range(len(self.codes))]  # of each layer
            for i in places
        ]
        for part, codes in enumerate(self.codes):
            codes.clear()
            codes.make_room(coded.shape[2])
            for i in places:
                codes.write(i, 0, made[i][part][1])
        self.coders = tuple(tuple(coder for coder, _ in of_layer) for of_layer in made)
        self.scattered = torch.stack(
            [where.gather(1, of_layer) for where, of_layer in zip(positions, index, strict=True)]
        ).int()
        self.exact.drop(counts.exact - tail - sinks, after=sinks)
        self.done = (coded.shape[2],) * len(self.layers)
        self._only(coded.shape[2])

    def _reordered(self, i: int, part: int, index: Tensor, counts: Counts) -> tuple[Coder, list[Encoded]]:
        """Codes of the entries index [heads, m] of all that a layer holds, and the coder that made them."""
        codes, coder, order = self.codes[part], self.coders[i][part], index.T  # order: [m, heads]
        exact = self._to_encode(i, part, 0, counts.exact, counts)
        before, after = exact[: counts.sinks], exact[counts.sinks :]
        coder, found = coder.learnt(before if len(before) else after), list[Encoded]()
        pieces = zip(coder.encode(before), codes.canonical(i, counts.coded), coder.encode(after), strict=True)
        for of_part in pieces:
            numbers, scale = (torch.cat(same) for same in zip(*of_part, strict=True))
            wide = order[..., None].expand(-1, -1, numbers.shape[2])
            found.append((numbers.gather(0, wide), scale.gather(0, order)))
        return coder, found

    def _to_encode(self, i: int, part: int, low: int, high: int, counts: Counts) -> Tensor:
        """What becomes codes of exact entries low..high-1: [n, heads, d]."""
        x, bias = self.exact.read(i, part, low, high), self.biases[i]
        if part == 0 and len(self.codes) == 2 and bias is not None:
            x = x.float() - bias.rotated(self.exact_positions(counts)[low:high])
        return x.transpose(0, 1)

    @property
    def is_plain(self) -> bool:
        """Whether a call for many rows reads the codes: keys and values in one part each, that know of no data."""
        return (
            not self.keys_from_values
            and all(len(codes.dims) == 1 for codes in self.codes)
            and all(bias is None for bias in self.biases)
        )

    def coded_row(self, queries: int, n: int) -> CodedRow:
        """The first n codes of layers that are plain, for so many queries."""
        places = zip(*(codes.places(n) for codes in self.codes), strict=True)
        spans = [CodedSpan(tokens, *keys, *values) for (tokens, [keys]), (_, [values]) in places]
        return CodedRow(queries, spans)

    def exact_positions(self, counts: Counts) -> Tensor:
        """int64 [m]: of the entries that are held exactly; they are the first and the last, without gaps."""
        sinks, device = counts.sinks, self.exact.device
        tail = torch.arange(counts.end - (counts.exact - sinks), counts.end, device=device)
        return torch.cat([torch.arange(sinks, device=device), tail]) if sinks else tail

    def positions(self, i: int, counts: Counts) -> Tensor:
        """int64 [kv_heads, n]: of all entries."""
        heads, device = self.spec.num_key_value_heads, self.exact.device
        if self.scattered is None:
            return torch.arange(counts.end - counts.held, counts.end, device=device).expand(heads, -1)
        oldest = self.scattered[i]
        following = torch.arange(counts.end - (counts.held - oldest.shape[1]), counts.end, device=device)
        return torch.cat([oldest.long(), following.expand(heads, -1)], 1)

    def coded_positions(self, i: int, start: int, stop: int, counts: Counts) -> Where:
        """Of coded entries start..stop-1."""
        if self.scattered is None:
            return counts.sinks + start
        return self.positions(i, counts)[:, counts.sinks + start : counts.sinks + stop]

    def exact_keys(self, i: int, counts: Counts) -> Tensor:
        """[kv_heads, m, d] of all entries that are held exactly."""
        if not self.keys_from_values:
            return self.exact.read(i, 0)
        return self.keys_from_values[i](self.exact.read(i, -1), self.exact_positions(counts))

    def read(self, i: int, counts: Counts) -> tuple[Tensor, Tensor]:
        """(keys, values) [kv_heads, n, head_dim] of all entries, decoded."""
        exact = self.exact_keys(i, counts), self.exact.read(i, -1)
        if counts.coded == 0:
            return exact
        sinks, decoded = counts.sinks, self.decode(i, 0, counts.coded, counts)
        keys, values = (
            torch.cat([x[:, :sinks].float(), middle, x[:, sinks:].float()], 1)
            for x, middle in zip(exact, decoded, strict=True)
        )
        return keys, values

    def decode(self, i: int, start: int, stop: int, counts: Counts) -> tuple[Tensor, Tensor]:
        """float32 keys and values [kv_heads, stop - start, d] of codes; start: a multiple of 64."""
        parts = [codes.decode(i, coder, start, stop) for codes, coder in zip(self.codes, self.coders[i], strict=True)]
        values, bias, where = parts[-1], self.biases[i], self.coded_positions(i, start, stop, counts)
        if self.keys_from_values:
            return self.keys_from_values[i](values, listed(where, stop - start, values.device)), values
        if bias is not None:
            parts[0] = parts[0] + bias.rotated(listed(where, stop - start, values.device))
        return parts[0], values

    def mark(self) -> Any:
        return self.exact.mark(), [codes.mark() for codes in self.codes], self.coders, self.done, self.scattered

    def reset(self, mark: Any) -> None:
        exact, of_codes, self.coders, self.done, self.scattered = mark
        self.exact.reset(exact)
        for codes, one in zip(self.codes, of_codes, strict=True):
            codes.reset(one)

    def fork(self) -> CodedLayers:
        twin = copy(self)
        twin.exact, twin.codes = self.exact.fork(), tuple(codes.fork() for codes in self.codes)
        return twin

    def blocks(self) -> dict[int, int]:
        """Bytes of each extent, of positions and of what was learnt, by what tells them apart."""
        found = self.exact.blocks() | allocations(self._more())
        for codes in self.codes:
            found |= codes.blocks()
        return found

    def state(self, i: int, counts: Counts) -> dict[str, Tensor]:
        found = {"counts": torch.tensor([counts.end, counts.most_sinks, counts.coded])}
        for part, (codes, coder) in enumerate(zip(self.codes, self.coders[i], strict=True)):
            prefix = coder.role[0]
            found[f"{prefix}_tail"] = self.exact.read(i, part).transpose(0, 1)
            inner = coder.state() | codes.state(i, counts.coded)
            found |= {f"{prefix}_{name}": tensor for name, tensor in inner.items()}
        return found if self.scattered is None else {**found, "positions": self.scattered[i]}

    @torch.inference_mode()
    def restore(self, states: Sequence[Mapping[str, Tensor]], counts: Counts) -> None:
        """Hold what `state` returned for each layer. Raises CheckpointError for codes of another rotation."""
        coders = []
        for codes in self.codes:
            codes.make_room(counts.coded)
        for i, state in enumerate(states):
            of_layer = list[Coder]()
            for codes, coder in zip(self.codes, self._unlearnt[i], strict=True):
                prefix = f"{coder.role[0]}_"
                mine = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
                of_layer.append(coder.restored(mine))
                codes.restore(i, mine)
            coders.append(tuple(of_layer))
        self.coders, self.done = tuple(coders), (counts.coded,) * len(self.layers)
        names = [f"{coder.role[0]}_tail" for coder in self._unlearnt[0]]
        self.exact.restore([[state[name] for name in names] for state in states], counts.end, None)
        if 0 < counts.sinks < counts.exact:
            (span,), sinks = self.exact.spans, counts.sinks
            self.exact.spans = replace(span.cut(0, sinks), first=0), span.cut(sinks, len(span))
        scattered = [state["positions"] for state in states if "positions" in state]
        self.scattered = torch.stack(scattered).to(self.exact.device) if scattered else None


def listed(where: Where, n: int, device: torch.device) -> Tensor:
    """int64 [n] or [kv_heads, n]: n positions that `where` tells of."""
    return torch.arange(where, where + n, device=device) if isinstance(where, int) else where
