"""Blocks of a GGUF file: a weight as it lies there, each row a run of blocks with the scales of their own numbers.

    codes  uint8  [..., out, bytes]   the blocks of a row one after the other (`config.formats.BLOCKS`)

Of a block every 16 or 32 numbers share a scale, and in some kinds a minimum:

    weight = code * scale             weight = code * scale - minimum

Both are products of float16 numbers d and m of the block with small integers, and exact in float32, as is the product
with a code: a weight is rounded once, and the same bits as `gguf.quants.dequantize` gives.
Source: ggml-quants.c of ggml for the layouts.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor

from sparing.config.formats import BLOCKS
from sparing.kernels import dispatch
from sparing.kernels.finite import all_finite
from sparing.weights.weight import PackedWeight

__all__ = ["KINDS", "BlockWeight"]

IQ4_NL = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
# Where in a block its float16 numbers begin.
HALVES = {
    "q4_0": (0,), "q4_1": (0, 2), "q5_0": (0,), "q5_1": (0, 2), "q8_0": (0,), "q2_k": (80, 82), "q3_k": (108,),
    "q4_k": (0, 2), "q5_k": (0, 2), "q6_k": (208,), "iq4_nl": (0,), "f16": (0,),
}  # fmt: skip

# A block as its codes [n, numbers], and scales and minima [n, numbers / 16 or / 32]; minima None: there are none.
Parts = tuple[Tensor, Tensor, Tensor | None]


def half(blocks: Tensor, at: int) -> Tensor:
    """float32 [n, 1] of the float16 that begins at a byte of each block."""
    return blocks[:, at : at + 2].contiguous().view(torch.float16).float()


def fields(data: Tensor, bits: int, run: int) -> Tensor:
    """[n, bytes * 8 / bits]: of every `run` bytes the lowest `bits` bits of each, then the next of each, and so on."""
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=data.device)[:, None]
    return ((data.unflatten(1, (-1, 1, run)) >> shifts) & (1 << bits) - 1).flatten(1)


def fifth_bits(data: Tensor) -> Tensor:
    """[n, 32]: the bits of four bytes in order, the lowest first, each at the place of a fifth bit."""
    shifts = torch.arange(8, dtype=torch.uint8, device=data.device)
    return ((data[..., None] >> shifts) & 1).flatten(1) << 4


def six_bits(data: Tensor) -> tuple[Tensor, Tensor]:
    """The eight scales and eight minima of 6 bits in 12 bytes, [n, 8] each."""
    first, second, third = data.split(4, 1)
    scales = torch.cat((first & 63, third & 15 | first >> 6 << 4), 1)
    return scales, torch.cat((second & 63, third >> 4 | second >> 6 << 4), 1)


def q4_0(b: Tensor) -> Parts:
    """d, 16 bytes of two codes: in the low nibbles the first 16."""
    return fields(b[:, 2:], 4, 16).float() - 8, half(b, 0), None


def q4_1(b: Tensor) -> Parts:
    """d, m, codes as in q4_0."""
    return fields(b[:, 4:], 4, 16).float(), half(b, 0), -half(b, 2)


def q5_0(b: Tensor) -> Parts:
    """d, 32 fifth bits, codes as in q4_0."""
    return (fields(b[:, 6:], 4, 16) | fifth_bits(b[:, 2:6])).float() - 16, half(b, 0), None


def q5_1(b: Tensor) -> Parts:
    """d, m, 32 fifth bits, codes as in q4_0."""
    return (fields(b[:, 8:], 4, 16) | fifth_bits(b[:, 4:8])).float(), half(b, 0), -half(b, 2)


def q8_0(b: Tensor) -> Parts:
    """d, 32 signed bytes."""
    return b[:, 2:].view(torch.int8).float(), half(b, 0), None


def q2_k(b: Tensor) -> Parts:
    """16 bytes of a scale and a minimum of 4 bits, 64 bytes of codes, d, m."""
    codes, small = fields(b[:, 16:80], 2, 32).float(), b[:, :16]
    return codes, half(b, 80) * (small & 15).float(), half(b, 82) * (small >> 4).float()


def q3_k(b: Tensor) -> Parts:
    """32 bytes of third bits, without which 4 is subtracted; 64 bytes of codes; 16 scales of 6 bits; d."""
    codes = fields(b[:, 32:96], 2, 32).float() - 4 + 4 * fields(b[:, :32], 1, 32).float()
    scales = fields(b[:, 96:104], 4, 8) | fields(b[:, 104:108], 2, 4) << 4
    return codes, half(b, 108) * (scales.float() - 32), None


def q4_k(b: Tensor) -> Parts:
    """d, m, eight scales and minima of 6 bits, 128 bytes of codes."""
    scales, minima = six_bits(b[:, 4:16])
    return fields(b[:, 16:], 4, 32).float(), half(b, 0) * scales.float(), half(b, 2) * minima.float()


def q5_k(b: Tensor) -> Parts:
    """As q4_k, 32 bytes of fifth bits before the codes."""
    scales, minima = six_bits(b[:, 4:16])
    codes = fields(b[:, 48:], 4, 32) | fields(b[:, 16:48], 1, 32) << 4
    return codes.float(), half(b, 0) * scales.float(), half(b, 2) * minima.float()


def q6_k(b: Tensor) -> Parts:
    """128 bytes of four bits and 64 of two more, 16 signed scales, d."""
    codes = fields(b[:, :128], 4, 64) | fields(b[:, 128:192], 2, 32) << 4
    return codes.float() - 32, half(b, 208) * b[:, 192:208].view(torch.int8).float(), None


def iq4_nl(b: Tensor) -> Parts:
    """As q4_0 with codes of a table."""
    table = torch.tensor(IQ4_NL, dtype=torch.float32, device=b.device)
    return table[fields(b[:, 2:], 4, 16).int()], half(b, 0), None


def f16(b: Tensor) -> Parts:
    return half(b, 0), torch.ones(len(b), 1, device=b.device), None


def bf16(b: Tensor) -> Parts:
    return b.contiguous().view(torch.bfloat16).float(), torch.ones(len(b), 1, device=b.device), None


def numbers(parts: Parts) -> Tensor:
    """float32 [n, numbers]."""
    codes, scales, minima = parts
    values = codes.unflatten(1, (scales.shape[1], -1)) * scales[..., None]
    return (values if minima is None else values - minima[..., None]).flatten(1)


class BlockWeight(PackedWeight):
    """A weight in blocks of one of `KINDS`."""

    parts_of: ClassVar[Callable[[Tensor], Parts]]  # of blocks [n, bytes]
    has_gpu_kernel = False

    @property
    def shape(self) -> torch.Size:
        block, nbytes = BLOCKS[self.format]
        return torch.Size((*self.codes.shape[:-1], self.codes.shape[-1] // nbytes * block))

    @classmethod
    def decode(cls, parts: Mapping[str, Tensor]) -> Tensor:
        """float32 [n, in] of the blocks of n rows."""
        codes, (block, nbytes) = parts["codes"], BLOCKS[cls.format]
        rows, size = len(codes), codes.shape[1] // nbytes * block
        values = torch.empty(rows, size, device=codes.device)
        if not dispatch.takes(values):
            return numbers(cls.parts_of(codes.reshape(-1, nbytes))).view(rows, size)
        dispatch.native.unpack(codes=codes, y=values, inputs=size, outputs=rows, packing=cls.format, bfloat16=False)
        return values

    def has_finite_scales(self) -> bool:
        """Whether no scale is infinite or NaN, which a file that is damaged may hold anywhere."""
        codes, nbytes = self.codes, BLOCKS[self.format][1]
        if codes.is_cpu and dispatch.active() != dispatch.REFERENCE:
            return dispatch.native.finite_blocks(codes=codes, count=codes.numel() // nbytes, packing=self.format)
        if self.format == "bf16":
            return all_finite(codes.view(torch.bfloat16))
        blocks = codes.view(-1, nbytes)
        return all(int((blocks[:, at + 1] & 0x7C).amax()) < 0x7C for at in HALVES[self.format])

    def multiplies_beside(self, other: Any) -> bool:
        return isinstance(other, BlockWeight)  # experts may mix kinds

    def native_operands(self) -> dict[str, Any]:
        codes = self.codes
        return {
            "codes": codes,
            "inputs": self.shape[-1],
            "outputs": codes.shape[-2],
            "codes_bytes": codes.nbytes // max(1, len(codes)),
            "packing": self.format,
        }


def _class(parts_of: Callable[[Tensor], Parts]) -> type[BlockWeight]:
    name = parts_of.__name__
    return type(f"{name.upper()}Weight", (BlockWeight,), {"format": name, "parts_of": staticmethod(parts_of)})


KINDS = {
    each.__name__: _class(each)
    for each in (q4_0, q4_1, q5_0, q5_1, q8_0, q2_k, q3_k, q4_k, q5_k, q6_k, iq4_nl, f16, bf16)
}
