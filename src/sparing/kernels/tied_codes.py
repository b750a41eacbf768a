"""Attention over the codes of layers that project keys and values with one matrix: only values are stored, as codes.

With v a decoded value, k = rope(v * w, position). The keys of a tile are made from it where it is decoded. The native
kernel makes less: a channel that does not turn is met in the frame of the codes, <q, w * v> = <R (w * q), R v>, so only
those that turn are taken out of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from sparing.kernels import dispatch
from sparing.kernels.codes import Codes, code_parts, decode_codes, expect_codes, native_layout, online_softmax
from sparing.kernels.partial import group_rows, ungroup_rows
from sparing.kernels.shapes import dimensions, expect
from sparing.kernels.tied_keys import KeysFromValues, expect_positions, native_positions, native_tied

__all__ = ["Frame", "TurningChannels", "attention_over_tied_codes"]


class TurningChannels(NamedTuple):
    """How the channels m and d / 2 + m of vectors, for the first m, come out of the frames of their parts.

    With X [a, b] the parts of a vector, each padded to a multiple of 16, one after the other: they are
    `left X right * signs`, read as [2, m]. All float32; left: [a_out, a]; right: [1 or kv_heads, b, b_out]; signs:
    [a_out * b_out].
    """

    left: Tensor
    right: Tensor
    signs: Tensor


class Frame(Protocol):
    """The frames that a layer's values are stored in."""

    def project(self, q: Tensor) -> list[Tensor]:
        """Queries [T, heads, d] in the frame of each part."""
        ...

    def assemble(self, parts: list[Tensor]) -> Tensor:
        """Decoded parts [kv_heads, n, dims] -> vectors [kv_heads, n, d]."""
        ...

    def turning_channels(self, pairs: int) -> TurningChannels:
        """Of at least the first `pairs` channels of each half."""
        ...


def attention_over_tied_codes(
    q: Tensor,
    values: Sequence[Codes],
    n: int,
    keys: KeysFromValues,
    where: int | Tensor,
    frame: Frame,
    *,
    scale: float = 1.0,
    exact: bool = True,
) -> tuple[list[Tensor], Tensor]:
    """As `attention_over_codes` where keys follow from the values, which alone are stored.

    q: [T, heads, d], not in a frame; where: the first of n consecutive positions, or int64 [kv_heads, n] all of them.
    """
    tokens, heads, _ = dimensions("q", q, "T", "heads", "d")
    expect("q", q, tokens, heads, len(keys.weight))
    kv_heads = expect_codes("values", values, heads, n)
    where = expect_positions(where, kv_heads, n)
    if dispatch.takes(q) and native_layout(q, values):
        q_still, tied = _in_frame(q, n, keys, where, frame)
        return code_parts(q_still, values, values, n, scale=scale, exact=exact, tied=tied)
    rows = group_rows(q, kv_heads)
    decoded: list[Tensor] = []

    def scores(start: int, stop: int) -> Tensor:
        decoded[:] = [decode_codes(part, "values", start, stop, rows.dtype) for part in values]
        positions = where[:, start:stop] if isinstance(where, Tensor) else torch.arange(where + start, where + stop)
        return (rows @ keys(frame.assemble(decoded), positions.to(q.device)).transpose(-1, -2)) * scale

    def mix(weights: Tensor, start: int, stop: int) -> list[Tensor]:
        return [weights @ part for part in decoded]  # of the tile whose scores were just computed

    out, lse = online_softmax(n, scores, mix)
    return [ungroup_rows(part, tokens) for part in out], ungroup_rows(lse, tokens)[..., 0]


def _in_frame(
    q: Tensor, n: int, keys: KeysFromValues, where: int | Tensor, frame: Frame
) -> tuple[list[Tensor], dict[str, Any]]:
    """Queries for the channels that do not turn, in the frame; of those that do, the fields of TiedCodes."""
    # A key is k = rope(v * w). Channel m and its partner m + d / 2 turn together, for the first `turning` m alone; each
    # [.., 2, d / 2] below is such pairs. All other channels are still: <q, w * v> = <R (w * q), R v>, met in the frame.
    left, right, signs = frame.turning_channels(keys.turning)
    pairs, weight = len(signs) // 2, keys.weight.float()
    turning = q.unflatten(-1, (2, -1))[..., : keys.turning]  # [T, heads, 2, turning]
    turning = F.pad(turning, (0, pairs - keys.turning)).flatten(-2)
    still = (q * weight).unflatten(-1, (2, -1))  # [T, heads, 2, d / 2]
    still[..., : keys.turning] = 0
    # Signs are of the values; those of pairs that turn may stand in the weight as well.
    weight = weight.unflatten(0, (2, -1))[:, :pairs].flatten() * signs
    left, right = left.contiguous(), right.contiguous()
    positions, first, rows = native_positions(where, n)
    tied = {
        "q": turning.contiguous(),
        "left": left,
        "right": right,
        "a": left.shape[1],
        "a_out": left.shape[0],
        "b": right.shape[1],
        "b_out": right.shape[2],
        "right_head": right.stride(0) if len(right) > 1 else 0,
        "keys": native_tied(keys, weight, rows, torch.float32),
        "where": {"positions": positions, "head": n, "first": first},
    }
    return frame.project(still.flatten(-2)), tied
