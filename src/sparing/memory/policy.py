"""The policy language of `kv=`: what a user may change about memories that grow. Never imports torch."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace

from sparing.memory.spec import MemorySpec

__all__ = ["apply_policy"]

SYNTAX = "dense or window:N"


def apply_policy(specs: Sequence[MemorySpec], kv: str) -> list[MemorySpec]:
    """The specs as a policy changes them: `window:4096` bounds every growing memory; `dense` changes nothing.

    Raises ValueError for a policy that is not known, naming the ones that are. `plan` computes bytes
    from the result, `make_memory` builds it.
    """
    if kv == "dense":
        return list(specs)
    if match := re.fullmatch(r"window:(\d+)", kv):
        window = int(match[1])
        if window < 1:
            raise ValueError(f"kv={kv!r}: the window must hold at least one token")
        return [replace(spec, window=window) if spec.window is None else spec for spec in specs]
    raise ValueError(f"kv={kv!r} is not a memory policy, use {SYNTAX}")
