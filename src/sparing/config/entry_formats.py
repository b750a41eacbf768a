"""How DeepSeek's releases store what they remember of a token: sizes of the parts, in bytes. Never imports torch.

DeepSeek-V4:

    entry  float8_e4m3fn [d - rotary] | bfloat16 [rotary] | UE8M0, one for 64 of the former | zeros
    key    E2M1 [d], two a byte       | UE8M0, one for 32

The scales of an entry are filled up to a multiple of 8 bytes: 584 for d = 512 and 64 rotary dimensions; keys of the
indexer with d = 128 take 68. DeepSeek-V3.2 has float32 scales, one for 128 numbers of an entry, and keys in FP8 with
one scale: 656 (d = 576) and 132. Source: arXiv 2606.19348; the layouts of entries are those of FlashMLA.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["DEEPSEEK_V3_2", "DEEPSEEK_V4", "ENTRY_BLOCK", "KEY_BLOCK", "EntryFormat", "entry_bytes", "key_bytes"]

ENTRY_BLOCK, KEY_BLOCK = 64, 32  # numbers that share a scale
FILLED_UP = 8  # bytes of an entry's scales: a multiple of this


@dataclass(frozen=True)
class EntryFormat:
    """How a release keeps entries and the indexer's keys of them.

    Of an entry, numbers that turn in 16 bits, the others in FP8 with a scale of scale_bytes for each `block`. key_bits:
    of a number of a key; 4: FP4 with a scale of a byte for 32, 8: FP8 with one float32 scale.
    """

    block: int = ENTRY_BLOCK
    scale_bytes: int = 1
    key_bits: int = 4

    def entry_bytes(self, size: int, rotary: int) -> int:
        """Bytes of an entry of `size` numbers, of which the last `rotary` are those that turn.

        Raises ValueError unless 0 <= rotary < size.
        """
        if not 0 <= rotary < size:
            raise ValueError(f"an entry of {size} numbers cannot have {rotary} that turn: use 0 to {size - 1}")
        scales = -(-(size - rotary) // self.block) * self.scale_bytes
        return size - rotary + 2 * rotary + -(-scales // FILLED_UP) * FILLED_UP

    def key_bytes(self, size: int) -> int:
        """Bytes of an indexer's key of `size` numbers.

        Raises ValueError where FP4 does not take as many: a power of two from 32 on, as a Hadamard matrix turns keys.
        """
        if self.key_bits == 8:
            return size + 4
        if size < KEY_BLOCK or size.bit_count() != 1:
            raise ValueError(f"a key of {size} numbers has no FP4 form: use a power of two of at least {KEY_BLOCK}")
        return size // 2 + size // KEY_BLOCK


DEEPSEEK_V4, DEEPSEEK_V3_2 = EntryFormat(), EntryFormat(block=128, scale_bytes=4, key_bits=8)
entry_bytes, key_bytes = DEEPSEEK_V4.entry_bytes, DEEPSEEK_V4.key_bytes
