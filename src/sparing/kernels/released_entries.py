"""What DeepSeek-V4 remembers of a token, in the bytes of its release: FP8 entries, and FP4 keys of the indexer.

    entry  float8_e4m3fn [d - rotary] | bfloat16 [rotary] | UE8M0, one for 64 of the former | zeros
    key    E2M1 [d], two a byte       | UE8M0, one for 32

The scale of a block is the least power of two with which its largest magnitude fits, so decoded numbers are exact in
bfloat16. Keys and the queries that meet them are turned by the Walsh-Hadamard matrix first, which spreads a large
number over all dimensions and changes no dot product. Sizes: `config/entry_formats.py`.
Source: DeepSeek-V4 `kernel.py` (`act_quant`, `fp4_act_quant`), arXiv 2606.19348.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparing.config.entry_formats import ENTRY_BLOCK, KEY_BLOCK, entry_bytes, key_bytes
from sparing.kernels import dispatch
from sparing.kernels.hadamard import hadamard
from sparing.kernels.microscaling import E4M3_LARGEST, mxfp4_pack, mxfp4_unpack, to_e4m3, ue8m0_decode, ue8m0_encode
from sparing.kernels.shapes import misfit

__all__ = ["decode_entries", "decode_keys", "encode_entries", "encode_keys", "round_queries"]

SMALLEST = 1e-4  # largest magnitude that a block of an entry is taken to have at least


def encode_entries(x: Tensor, rotary: int) -> Tensor:
    """uint8 [..., entry_bytes(d, rotary)] of entries x [..., d], any float dtype; the last `rotary` numbers turn.

    Numbers that turn are rounded to bfloat16, the others to E4M3 in blocks of 64, the last of which may be partial. A
    block with a number that is not finite becomes NaN. Raises ValueError unless 0 <= rotary < d.
    """
    size = x.shape[-1]
    packed = x.new_empty(*x.shape[:-1], entry_bytes(size, rotary), dtype=torch.uint8)
    if dispatch.takes(x):
        _native(dispatch.native.encode_entries, x.contiguous(), packed, rotary=rotary)
        return packed
    plain, turning = x.float().split([size - rotary, rotary], -1)
    blocks = _blocks(plain)
    scale = ue8m0_encode(blocks.abs().amax(-1).clamp_min(SMALLEST) / E4M3_LARGEST)
    codes = to_e4m3(blocks / ue8m0_decode(scale)[..., None]).flatten(-2)[..., : size - rotary]
    parts = codes.view(torch.uint8), turning.bfloat16().contiguous().view(torch.uint8), scale
    filled = sum(part.shape[-1] for part in parts)
    torch.cat(parts, -1, out=packed[..., :filled])
    packed[..., filled:] = 0
    return packed


def decode_entries(packed: Tensor, size: int, rotary: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Entries [..., size] of what `encode_entries` returned; bfloat16 and float32 hold them exactly.

    Raises ValueError for bytes of another number or type.
    """
    _expect_bytes(packed, entry_bytes(size, rotary))
    x = packed.new_empty(*packed.shape[:-1], size, dtype=dtype)
    if dispatch.takes(x):
        _native(dispatch.native.decode_entries, x, packed.contiguous(), rotary=rotary)
        return x
    plain = size - rotary
    codes, turning, scale = packed.split([plain, 2 * rotary, packed.shape[-1] - plain - 2 * rotary], -1)
    blocks = _blocks(codes.view(torch.float8_e4m3fn).float())
    numbers = blocks * ue8m0_decode(scale[..., : blocks.shape[-2]])[..., None]
    turning = turning.contiguous().view(torch.bfloat16).float()
    return torch.cat([numbers.flatten(-2)[..., :plain], turning], -1).to(dtype)


def encode_keys(x: Tensor) -> Tensor:
    """uint8 [..., key_bytes(d)] of an indexer's keys x [..., d]: turned by `hadamard`, then E2M1 in blocks of 32.

    Turned keys have x's dtype. Raises ValueError where d is not a power of two from 32 on.
    """
    packed = x.new_empty(*x.shape[:-1], key_bytes(x.shape[-1]), dtype=torch.uint8)
    if dispatch.takes(x):
        _native(dispatch.native.encode_keys, x.contiguous(), packed)
        return packed
    return torch.cat(mxfp4_pack(hadamard(x)), -1, out=packed)


def decode_keys(packed: Tensor, size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Turned keys [..., size] of what `encode_keys` returned; bfloat16 and float32 hold them exactly.

    Raises ValueError for bytes of another number or type.
    """
    _expect_bytes(packed, key_bytes(size))
    x = packed.new_empty(*packed.shape[:-1], size, dtype=dtype)
    if dispatch.takes(x):
        _native(dispatch.native.decode_keys, x, packed.contiguous())
        return x
    codes, scale = packed.split([size // 2, size // KEY_BLOCK], -1)
    return mxfp4_unpack(codes, scale).to(dtype)


def round_queries(q: Tensor) -> Tensor:
    """An indexer's queries [..., d] as its keys are: turned, and rounded to what FP4 can hold; q's dtype.

    Raises ValueError where d is not a power of two from 32 on.
    """
    key_bytes(q.shape[-1])
    if dispatch.takes(q):
        rounded = torch.empty_like(q, memory_format=torch.contiguous_format)
        _native(dispatch.native.encode_keys, q.contiguous(), None, rounded=rounded)
        return rounded
    return mxfp4_unpack(*mxfp4_pack(hadamard(q))).to(q.dtype)


def _expect_bytes(packed: Tensor, count: int) -> None:
    if packed.shape[-1:] != (count,):
        raise misfit("packed", packed, "...", count)
    if packed.dtype != torch.uint8:
        raise ValueError(f"packed has dtype {str(packed.dtype).removeprefix('torch.')}, expected uint8")


def _native(kernel: Callable[..., None], x: Tensor, packed: Tensor | None, **fields: Any) -> None:
    """One of the native kernels: x [..., size] and `packed` contiguous."""
    size = x.shape[-1]
    kernel(x=x, packed=packed, rows=x.numel() // size, size=size, **fields, bfloat16=x.dtype is torch.bfloat16)


def _blocks(x: Tensor) -> Tensor:
    """[..., n] -> [..., ceil(n / 64), 64], filled up with zeros."""
    return torch.nn.functional.pad(x, (0, -x.shape[-1] % ENTRY_BLOCK)).unflatten(-1, (-1, ENTRY_BLOCK))
