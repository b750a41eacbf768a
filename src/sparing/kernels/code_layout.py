"""Codes of 1 to 8 bits in blocks of 64 tokens, laid out so that a kernel reads whole lines of 64 bytes.

Codes of b bits are cut into planes of 8, 4, 2 and 1 bits (3 = 2 + 1, 7 = 4 + 2 + 1). An odd number of bits is stored
as magnitude and sign (1 = negative): a codebook is symmetric, so the planes of 3 bits index its four positive values.

A plane of a matrix [lanes, depth] goes 16 lanes at a time. A line holds, for each lane, four bytes; byte j of line g
holds, from the low bits up, the fields of depth `4 F g + 4 i + j`, i = 0..F-1, where F = 8 / width. The plane of one
bit holds a little-endian word of 64 bits for each four depths: bit 4 t + j is lane t, depth 4 g + j.

Keys: lanes are tokens, depth is the head's dimensions; a block is 4 x [16 tokens]: scores need no sum across lanes.
Values: lanes are dimensions, depth is tokens; a block is (dimensions / 16) x [64 tokens]: an accumulator stays in its
register over a whole block. Within 16 lanes the planes follow one another, the widest first.
"""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor

__all__ = ["BLOCK", "block_bytes", "canonical", "lay_out", "padded", "planes"]

BLOCK = 64  # tokens
LANES = 16
ROLES = ("keys", "values")


def planes(bits: int) -> list[int]:
    """Widths of the planes of `bits` bits, the widest first. Raises ValueError for bits not 1..8."""
    if not 1 <= bits <= 8:
        raise ValueError(f"bits is {bits}: use 1 to 8")
    return [width for width in (8, 4, 2, 1) if bits & width]


def padded(dims: int) -> int:
    """Dimensions stored: the next multiple of 16."""
    return -(-dims // LANES) * LANES


def block_bytes(dims: int, bits: int) -> int:
    """Bytes of the codes of 64 tokens."""
    return BLOCK * padded(dims) * bits // 8


def lay_out(codes: Tensor, bits: int, role: str) -> Tensor:
    """Canonical codes uint8 [..., n, dims], each below 2^bits -> uint8 [..., blocks, block_bytes].

    role: "keys" or "values". The last block and the last dimensions are filled up with the code of the smallest
    positive centroid. Inverse of `canonical`.
    """
    n, dims = codes.shape[-2:]
    blocks = -(-n // BLOCK)
    full = codes.new_full((*codes.shape[:-2], blocks * BLOCK, padded(dims)), 1 << (bits - 1))
    full[..., :n, :dims] = codes
    block = full.unflatten(-2, (blocks, BLOCK))  # [..., blocks, 64, padded]
    matrix = block if _lanes_are_tokens(role) else block.transpose(-1, -2)
    lanes = matrix.unflatten(-2, (-1, LANES))  # [..., blocks, groups of lanes, 16, depth]
    if bits % 2 and bits > 1:
        top = 1 << (bits - 1)
        negative = (lanes < top).to(torch.uint8)
        magnitude = (lanes - top) ^ (negative * 255)  # in arithmetic of bytes, -1 - m is m with all bits turned
        parts = [_plane_bytes(plane, width) for plane, width in _split(magnitude, planes(bits)[:-1])]
        parts.append(_sign_bytes(negative))
    elif bits == 1:
        parts = [_sign_bytes(1 - lanes)]
    else:
        parts = [_plane_bytes(plane, width) for plane, width in _split(lanes, planes(bits))]
    return torch.cat(parts, -1).flatten(-2)


def canonical(blocks: Tensor, bits: int, role: str, n: int, dims: int) -> Tensor:
    """Laid-out uint8 [..., blocks, block_bytes] -> canonical codes uint8 [..., n, dims] of the first n tokens."""
    tokens_in_lanes = _lanes_are_tokens(role)
    if n == 0:
        return blocks.new_empty(*blocks.shape[:-2], 0, dims)
    groups, depth = (BLOCK // LANES, padded(dims)) if tokens_in_lanes else (padded(dims) // LANES, BLOCK)
    parts = blocks.unflatten(-1, (groups, -1))  # [..., blocks, groups, bytes]
    codes = torch.zeros(*parts.shape[:-1], LANES, depth, dtype=torch.uint8, device=blocks.device)
    start = shift = 0
    for width in planes(bits):
        part = parts[..., start : start + LANES * depth * width // 8]
        start += part.shape[-1]
        if width == 1:
            # In arithmetic of bytes -1 - m is m with all bits turned.
            codes = (codes ^ _sign_fields(part, depth)) + (1 << (bits - 1))
        else:
            plane = _plane_fields(part, width, depth)
            codes = plane << shift if shift == 0 else codes | (plane << shift)
            shift += width
    matrix = codes.flatten(-3, -2)  # [..., blocks, lanes, depth]
    block = matrix if tokens_in_lanes else matrix.transpose(-1, -2)
    return block.flatten(-3, -2)[..., :n, :dims]


def _lanes_are_tokens(role: str) -> bool:
    if role not in ROLES:
        raise ValueError(f"role is {role!r}: use 'keys' or 'values'")
    return role == "keys"


def _split(codes: Tensor, widths: list[int]) -> list[tuple[Tensor, int]]:
    """Fields of a code from the low bits up, with their widths."""
    fields, shift = [], 0
    for width in widths:
        fields.append(((codes >> shift) & ((1 << width) - 1), width))
        shift += width
    return fields


def _plane_bytes(fields: Tensor, width: int) -> Tensor:
    """Fields [..., 16, depth] -> bytes [..., 16 * depth * width / 8]."""
    parts = fields.unflatten(-1, (-1, 8 // width, 4)).unbind(-2)  # each [..., 16, lines, 4]
    line = parts[0]
    for i, part in enumerate(parts[1:], 1):
        line = line | (part << (i * width))
    return line.transpose(-3, -2).flatten(-3)


def _plane_fields(lines: Tensor, width: int, depth: int) -> Tensor:
    """Bytes [..., 16 * depth * width / 8] -> fields [..., 16, depth]."""
    line = lines.unflatten(-1, (-1, LANES, 4)).transpose(-3, -2)  # [..., 16, lines, 4]
    mask = (1 << width) - 1
    fields = [(line >> shift) & mask for shift in range(0, 8, width)]
    return torch.stack(fields, -2).flatten(-3)


def _sign_bytes(signs: Tensor) -> Tensor:
    """0 or 1 [..., 16, depth] -> bytes [..., 2 * depth]."""
    fours = signs.contiguous().view(torch.int32)  # [..., 16, words], a sign in the lowest bit of each byte
    nibbles = (fours | (fours >> 7) | (fours >> 14) | (fours >> 21)) & 15
    pairs = nibbles.unflatten(-2, (-1, 2))  # [..., 8 bytes, 2 lanes, words]
    words = (pairs[..., 0, :] | (pairs[..., 1, :] << 4)).to(torch.uint8)
    return words.transpose(-1, -2).flatten(-2)


def _sign_fields(lines: Tensor, depth: int) -> Tensor:
    """Bytes [..., 2 * depth] -> 255 where negative, else 0 [..., 16, depth]."""
    eights = _sign_table(lines.device).index_select(0, lines.flatten().int())  # 2 lanes x 4 depths in each
    lanes = eights.view(torch.int32).view(*lines.shape[:-1], depth // 4, LANES)
    return lanes.transpose(-1, -2).contiguous().view(torch.uint8)


@cache
def _sign_table(device: torch.device) -> Tensor:
    """int64 [256]: for each byte, a byte of 255 for each of its bits that is set."""
    bits = (torch.arange(256)[:, None] >> torch.arange(8)) & 1
    return (bits * 255).to(torch.uint8).view(torch.int64).flatten().to(device)
