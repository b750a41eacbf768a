"""How DeepSeek-V4's release stores what it remembers of a token: sizes of the parts, in bytes. Never imports torch.

    entry  float8_e4m3fn [d - rotary] | bfloat16 [rotary] | UE8M0, one for 64 of the former | zeros
    key    E2M1 [d], two a byte       | UE8M0, one for 32

The scales of an entry are filled up to a multiple of 8 bytes: 584 for d = 512 and 64 rotary dimensions; keys of the
indexer with d = 128 take 68. Source: arXiv 2606.19348; the layout of an entry is that of FlashMLA.
"""

from __future__ import annotations

__all__ = ["ENTRY_BLOCK", "KEY_BLOCK", "entry_bytes", "key_bytes"]

ENTRY_BLOCK, KEY_BLOCK = 64, 32  # numbers that share a scale
FILLED_UP = 8  # bytes of an entry's scales: a multiple of this


def entry_bytes(size: int, rotary: int) -> int:
    """Bytes of an entry of `size` numbers, of which the last `rotary` are those that turn.

    Raises ValueError unless 0 <= rotary < size.
    """
    if not 0 <= rotary < size:
        raise ValueError(f"an entry of {size} numbers cannot have {rotary} that turn: use 0 to {size - 1}")
    scales = -(-(size - rotary) // ENTRY_BLOCK)
    return size - rotary + 2 * rotary + -(-scales // FILLED_UP) * FILLED_UP


def key_bytes(size: int) -> int:
    """Bytes of an indexer's key of `size` numbers. Raises ValueError unless size is a positive multiple of 32."""
    if size < 1 or size % KEY_BLOCK:
        raise ValueError(f"a key of {size} numbers has no FP4 form: use a multiple of {KEY_BLOCK}")
    return size // 2 + size // KEY_BLOCK
