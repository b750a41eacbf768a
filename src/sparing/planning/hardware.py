"""The machines a plan can be made for: one table. Never imports torch.

Sources: the vendors' data sheets, dense rates with float32 accumulation; `cpu-2core` is measured (two cores of an AMD
EPYC with AVX-512: reading 512 MiB on both cores, a bfloat16 product of 2048 x 2048 matrices on one).
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = ["HARDWARE", "Hardware", "find_hardware"]


@dataclass(frozen=True)
class Hardware:
    """memory: bytes; bandwidth: bytes per second; bf16, fp8: FLOP per second (fp8 = bf16 where there is no unit)."""

    name: str
    memory: float
    bandwidth: float
    bf16: float
    fp8: float


HARDWARE = (
    Hardware("A100", 80e9, 2.039e12, 312e12, 312e12),
    Hardware("H100", 80e9, 3.35e12, 989e12, 1979e12),
    Hardware("H200", 141e9, 4.8e12, 989e12, 1979e12),
    Hardware("B200", 180e9, 8e12, 2250e12, 4500e12),
    Hardware("L4", 24e9, 300e9, 121e12, 242e12),
    Hardware("RTX 4090", 24e9, 1.008e12, 165.2e12, 330.3e12),
    Hardware("RTX 5090", 32e9, 1.792e12, 209.5e12, 419e12),
    Hardware("cpu-2core", 24 * 2**30, 42e9, 500e9, 500e9),
)


def find_hardware(name: str) -> Hardware:
    """The machine of a name, in any case and with or without separators. Raises ValueError listing all names."""
    wanted = _plain(name)
    for machine in HARDWARE:
        if _plain(machine.name) == wanted:
            return machine
    raise ValueError(f"hardware={name!r} is not known, use {', '.join(machine.name for machine in HARDWARE)}")


def _plain(name: str) -> str:
    return re.sub(r"[\s_-]", "", name).lower()
