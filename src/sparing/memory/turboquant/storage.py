"""Storage as TurboQuant codes, followed by an exact tail.

Entries are held in the order [sink tokens, exact | codes | newest, exact]. A token is encoded once, from its exact
value, when the committed length has passed its block by `window` tokens; what is only staged stays exact. Attention is
one part over the codes and one over the exact entries, merged. Passes over a canvas, which all read the same codes, may
have them decoded once (`hold_decoded`). Source: TurboQuant (arXiv 2504.19874); docs/memory.md.
"""

from __future__ import annotations

from itertools import groupby

import torch
from torch import Tensor

from sparing import kernels
from sparing.config.codes import CodeFormat, TurboQuant
from sparing.config.memory import AttentionSpec
from sparing.kernels import KeysFromValues
from sparing.kernels.codes import attention_over_codes
from sparing.kernels.partial import Part, merge_parts, partial_attention
from sparing.kernels.tied_codes import attention_over_tied_codes
from sparing.memory.turboquant.buffer import Buffer, Where
from sparing.memory.turboquant.coded_vectors import CodedVectors, coded_vectors
from sparing.memory.turboquant.key_bias import KeyBias

__all__ = ["TurboQuantStorage", "turboquant_storage"]

DECODED_AT_ONCE = 1024  # tokens of a canvas' prefix: what decoding needs beside the result


class TurboQuantStorage:
    """Codes with an exact tail. keys is None where keys follow from values: the values alone are stored."""

    def __init__(
        self,
        form: CodeFormat,
        values: Buffer,
        coded_values: CodedVectors,
        keys: tuple[Buffer, CodedVectors] | KeysFromValues,
        bias: KeyBias | None = None,
    ):
        self.form = form
        self._values, self._coded_values = values, coded_values
        self._keys, self._coded_keys = keys if isinstance(keys, tuple) else (None, None)
        self._keys_from_values = None if isinstance(keys, tuple) else keys
        self._bias = bias
        self._length = 0  # tokens ever appended: the position of the next
        self._staged = 0  # of these, not committed yet
        self._sink_tokens = form.sink_tokens  # the most first entries that are sinks
        self._flushed = 0  # entries that are codes and no longer held exactly
        self._holds_decoded = False
        self._decoded: tuple[Tensor, Tensor] | None = None  # keys and values of a canvas' passes, see `_over_canvas`

    def __len__(self) -> int:
        return self._flushed + len(self._values)

    @property
    def committed(self) -> int:
        """Entries that are not staged."""
        return len(self) - self._staged

    @property
    def _sinks(self) -> int:
        return min(self._sink_tokens, len(self._values))

    def append(self, k: Tensor, v: Tensor) -> None:
        for name, x in (("keys", k), ("values", v)):
            if not torch.isfinite(x).all():
                raise ValueError(
                    f"turboquant: {name} hold NaN or infinite numbers, which have no code:"
                    f" use kv='dense', or a dtype wider than {str(x.dtype).removeprefix('torch.')}"
                )
        if self._keys is not None:
            self._keys.append(k)
        self._values.append(v)
        self._length += len(v)
        self._staged += len(v)

    @torch.inference_mode()
    def keep(self, index: Tensor) -> None:
        """Of the entries that stay, sinks and the newest `window` remain exact; all others are codes from then on."""
        # index: [kv_heads, m], ascending. Heads may keep different entries, but exact ones lie in one buffer for all
        # heads: sinks stay exact as far as every head keeps the first entries, the tail as far as it keeps the newest.
        held, m = len(self), index.shape[1]
        kept_in_order = (index.cpu() == torch.arange(m)).all(0).long().cumprod(0)
        sinks = min(self._sinks, int(kept_in_order.sum()))
        newest = (index.cpu().flip(1) == torch.arange(held - 1, held - 1 - m, -1)).all(0).long().cumprod(0)
        tail = min(self.form.window, int(newest.sum()), m - sinks, len(self._values) - self._sinks)
        coded = index[:, sinks : m - tail]
        split, positions = self._sinks, self._exact_positions()
        self._decoded = None
        # Codes are moved as they are. Entries exact so far that no longer are sinks or tail are encoded now, from their
        # exact values; codes that `attend` made ahead of time are dropped first.
        if self._keys is not None and self._coded_keys is not None:
            exact = self._without_bias(self._keys.view, positions)
            self._coded_keys.truncate(self._flushed)
            self._coded_keys.keep(coded, exact[:split], exact[split:])
        exact = self._values.view.transpose(0, 1)
        self._coded_values.truncate(self._flushed)
        self._coded_values.keep(coded, exact[:split], exact[split:])
        for buffer in self._exact_buffers():
            buffer.drop_first(len(buffer) - tail - sinks, after=sinks)
        self._sink_tokens = sinks + max(0, self.form.sink_tokens - self._length)
        self._flushed = m - sinks - tail

    @torch.inference_mode()
    def settle(self, n: int) -> None:
        """Keep the first n staged entries, forget the rest, and encode what is far enough behind."""
        forgotten, self._staged = self._staged - n, 0
        self._length -= forgotten
        for buffer in self._exact_buffers():
            buffer.truncate(len(buffer) - forgotten)
        target = self._coded_at(self._length)
        if target != self._flushed:
            self._decoded = None
        self._encode(target)
        for coded in self._coded():
            coded.truncate(target)
        for buffer in self._exact_buffers():
            buffer.drop_first(target - self._flushed, after=self._sinks)
        self._flushed = target

    def attend(self, q: Tensor, where: Where, *, scale: float, causal: bool, window: int | None) -> Tensor:
        if window is not None:
            raise ValueError("turboquant: codes are read whole, a window over them is not defined: use kv='dense'")
        if self._holds_decoded and not causal and self._flushed:
            return self._over_canvas(q, where, scale)
        # Within a prompt, each query reads as codes what it would read as codes if it came alone. That number stays the
        # same for a run of queries (a block, mostly), so they are answered run by run: codes below it, exact above.
        tokens, held = len(q), len(self._values)
        keys: Tensor | None = None
        streaming = causal and self.form.prefill == "stream"
        positions = range(self._length - tokens, self._length)
        read_as_codes = [self._coded_at(position) if streaming else self._flushed for position in positions]
        self._encode(read_as_codes[-1])  # all at once
        outputs = []
        for coded, group in groupby(range(tokens), read_as_codes.__getitem__):
            members = list(group)
            start, stop = members[0], members[-1] + 1
            # The group's exact entries: sinks, and the tail from what it reads as codes up to its last query.
            high = held - tokens + stop if causal else held
            part = q[start:stop]
            if coded == 0:
                outputs.append(self._over_exact(part, high, scale, causal))
                continue
            low, keys = coded - self._flushed, self._exact_keys() if keys is None else keys
            k, v = (_without(x[:, :high], self._sinks, low) for x in (keys, self._values.view))
            wide = part.float()
            # The rounding of products of bytes hides in a bfloat16 model's own.
            parts = [self._over_codes(wide, coded, where, scale, exact=q.dtype == torch.float32)]
            if k.shape[1]:
                parts.append(partial_attention(wide, k, v, scale=scale, causal=causal))
            outputs.append(merge_parts(parts).to(q.dtype))
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs)

    def hold_decoded(self, on: bool) -> None:
        self._holds_decoded, self._decoded = on, None

    def read(self, where: Where) -> tuple[Tensor, Tensor]:
        keys, values = self._exact_keys(), self._values.view
        if self._flushed == 0:
            return keys, values
        decoded_keys, decoded = self._decode(where, 0, self._flushed)
        sinks = self._sinks
        return (
            torch.cat([keys[:, :sinks].float(), decoded_keys, keys[:, sinks:].float()], 1),
            torch.cat([values[:, :sinks].float(), decoded, values[:, sinks:].float()], 1),
        )

    def _decode(self, where: Where, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """float32 keys and values [kv_heads, stop - start, d] of codes; start: a multiple of 64."""
        values = self._coded_values.decode(start, stop)
        positions = self._coded_positions(where, start, stop)
        if self._coded_keys is None:
            assert self._keys_from_values is not None
            return self._keys_from_values(values, positions), values
        keys = self._coded_keys.decode(start, stop)
        return keys if self._bias is None else keys + self._bias.rotated(positions), values

    def _over_canvas(self, q: Tensor, where: Where, scale: float) -> Tensor:
        """Attention of tokens that see each other and every entry: pass after pass over the same codes.

        The first pass decodes them, in the queries' dtype; the next ones only write the exact entries after them (in
        what order entries lie makes no difference here). Held until other entries are codes, or `hold_decoded` ends it.
        """
        n, exact = self._flushed, (self._exact_keys(), self._values.view)
        held = self._decoded
        if held is None or held[0].shape[1] != len(self) or held[0].dtype != q.dtype:
            heads, m, d = exact[1].shape
            held = (q.new_empty(heads, n + m, d), q.new_empty(heads, n + m, d))
            for start in range(0, n, DECODED_AT_ONCE):
                stop = min(start + DECODED_AT_ONCE, n)
                for whole, part in zip(held, self._decode(where, start, stop), strict=True):
                    whole[:, start:stop] = part
            self._decoded = held
        for whole, part in zip(held, exact, strict=True):
            whole[:, n:] = part
        return kernels.attention(q, *held, scale=scale, causal=False)

    @property
    def nbytes(self) -> int:
        decoded = 0 if self._decoded is None else sum(part.nbytes for part in self._decoded)
        return decoded + sum(part.nbytes for part in (*self._exact_buffers(), *self._coded()))

    def tensors(self) -> list[Tensor]:
        """Everything that is held."""
        streams = [stream for coded in self._coded() for stream in coded.streams]
        codes = [tensor for stream in streams for tensor in stream.codes[:2]]
        return [buffer.view for buffer in self._exact_buffers()] + codes

    def fork(self) -> TurboQuantStorage:
        twin = object.__new__(TurboQuantStorage)
        twin.__dict__.update(self.__dict__)
        for name in ("_keys", "_values", "_coded_keys", "_coded_values"):
            part = getattr(self, name)
            setattr(twin, name, None if part is None else part.fork())
        twin.hold_decoded(False)
        return twin

    def state(self) -> dict[str, Tensor]:
        found = {"counts": torch.tensor([self._length, self._sink_tokens, self._flushed])}
        for prefix, exact, coded in (("k", self._keys, self._coded_keys), ("v", self._values, self._coded_values)):
            if exact is not None and coded is not None:
                found[f"{prefix}_tail"] = exact.view.transpose(0, 1)
                found |= {f"{prefix}_{name}": tensor for name, tensor in coded.state().items()}
        return found

    def restore(self, state: dict[str, Tensor]) -> None:
        for prefix, exact, coded in (("k", self._keys, self._coded_keys), ("v", self._values, self._coded_values)):
            if exact is not None and coded is not None:
                exact.append(state[f"{prefix}_tail"])
                mine = {n.removeprefix(f"{prefix}_"): x for n, x in state.items() if n.startswith(f"{prefix}_")}
                coded.restore(mine)
        self._length, self._sink_tokens, self._flushed = state["counts"].tolist()
        self._staged = 0

    def _exact_buffers(self) -> list[Buffer]:
        return [self._values] if self._keys is None else [self._keys, self._values]

    def _coded(self) -> list[CodedVectors]:
        return [self._coded_values] if self._coded_keys is None else [self._coded_keys, self._coded_values]

    def _coded_at(self, position: int) -> int:
        """How many entries a query at `position` reads as codes; never fewer than are nothing else any more."""
        before = len(self) - (self._length - position)  # entries older than the query
        return max(self._flushed, before - self._sinks - self.form.exact(position))

    @torch.inference_mode()
    def _encode(self, coded: int) -> None:
        """Make codes of the oldest exact entries until there are `coded`; the exact ones stay."""
        done = len(self._coded_values)
        if coded <= done:
            return
        low, high = (self._sinks + n - self._flushed for n in (done, coded))
        if self._keys is not None and self._coded_keys is not None:
            positions = self._exact_positions()[low:high]
            self._coded_keys.append(self._without_bias(self._keys.view[:, low:high], positions))
        self._coded_values.append(self._values.view[:, low:high].transpose(0, 1))

    def _exact_positions(self) -> Tensor:
        """int64 [m]: positions of the entries that are held exactly; they are the first and the last, without gaps."""
        sinks, held = self._sinks, len(self._values)
        device = self._values.view.device
        tail = torch.arange(self._length - (held - sinks), self._length, device=device)
        return torch.cat([torch.arange(sinks, device=device), tail])

    def _where_coded(self, where: Where, start: int, stop: int) -> Where:
        """What `where` says of coded entries start..stop-1."""
        first = self._sinks + start
        if isinstance(where, int):
            return where + first
        return where[:, first : self._sinks + stop].to(self._values.view.device)

    def _coded_positions(self, where: Where, start: int, stop: int) -> Tensor:
        """int64 [n] or [kv_heads, n]: positions of coded entries start..stop-1."""
        coded = self._where_coded(where, start, stop)
        if isinstance(coded, int):
            return torch.arange(coded, coded + stop - start, device=self._values.view.device)
        return coded

    def _without_bias(self, keys: Tensor, positions: Tensor) -> Tensor:
        """What is encoded of exact keys [kv_heads, n, d]: [n, kv_heads, d]."""
        if self._bias is not None:
            keys = keys.float() - self._bias.rotated(positions)
        return keys.transpose(0, 1)

    def _exact_keys(self) -> Tensor:
        if self._keys is not None:
            return self._keys.view
        assert self._keys_from_values is not None
        return self._keys_from_values(self._values.view, self._exact_positions())

    def _over_exact(self, q: Tensor, n: int, scale: float, causal: bool) -> Tensor:
        """Attention over the first n entries, all of them exact."""
        v = self._values.view[:, :n]
        if self._keys is not None:
            return kernels.attention(q, self._keys.view[:, :n], v, scale=scale, causal=causal)
        assert self._keys_from_values is not None
        where = self._exact_positions()[:n].expand(len(v), n)
        return kernels.attention_over_values(q, v, self._keys_from_values, where, scale=scale, causal=causal)

    def _over_codes(self, q: Tensor, n: int, where: Where, scale: float, exact: bool) -> Part:
        """Attention over the first n codes, in the queries' frame. q: float32 [T, heads, d]."""
        values = [stream.codes for stream in self._coded_values.streams]
        if self._coded_keys is None:
            assert self._keys_from_values is not None
            keys, coded = self._keys_from_values, self._where_coded(where, 0, n)
            out, lse = attention_over_tied_codes(
                q, values, n, keys, coded, self._coded_values, scale=scale, exact=exact
            )
        else:
            bias = None
            if self._bias is not None:
                bias = self._bias.logits(q, self._coded_positions(where, 0, n)) * scale
            keys = [stream.codes for stream in self._coded_keys.streams]
            projected = self._coded_keys.project(q)
            out, lse = attention_over_codes(projected, keys, values, n, scale=scale, bias=bias, exact=exact)
        return self._coded_values.quantiser.assemble(out), lse


def _without(x: Tensor, start: int, n: int) -> Tensor:
    """x [heads, m, d] without the n entries from `start` on."""
    if n == 0:
        return x
    return x[:, n:] if start == 0 else torch.cat([x[:, :start], x[:, start + n :]], 1)


def turboquant_storage(
    spec: AttentionSpec,
    policy: TurboQuant,
    layer: int,
    *,
    dtype: torch.dtype,
    device: torch.device,
    keys_from_values: KeysFromValues | None,
    bias: KeyBias | None,
) -> TurboQuantStorage:
    """An empty storage of one layer. bias: of the layer's key projection, where it can be told apart from the keys."""
    heads, d = spec.num_key_value_heads, spec.head_dim
    values = Buffer(heads, d, dtype, device)
    coded = coded_vectors(policy, layer, "values", heads, d, device)
    if spec.value_only and keys_from_values is not None:
        return TurboQuantStorage(policy, values, coded, keys_from_values)
    keys = Buffer(heads, d, dtype, device), coded_vectors(policy, layer, "keys", heads, d, device)
    return TurboQuantStorage(policy, values, coded, keys, bias)
