"""MXFP4: E2M1 codes, a power of two for 32 of them. 4.25 bits a weight.

    codes  uint8  [..., out, in / 2]    two E2M1 codes a byte, the earlier in the low nibble
    scale  uint8  [..., out, in / 32]   UE8M0: the exponent plus 127, of 32 consecutive inputs

    weight = e2m1(code) * 2^(scale - 127)

What packs and unpacks is `kernels/microscaling.py`.
"""

from __future__ import annotations

from sparing.kernels.microscaling import mxfp4_pack, mxfp4_unpack
from sparing.weights.weight import PackedWeight

__all__ = ["MXFP4Weight"]


class MXFP4Weight(PackedWeight):
    """A weight in MXFP4."""

    format = "mxfp4"
    per_byte = 2
    native_rows = 16

    pack, unpack = staticmethod(mxfp4_pack), staticmethod(mxfp4_unpack)
