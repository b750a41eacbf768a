"""The policy language of `kv=`: what a user may change about memories that grow. Never imports torch.

A policy has two independent parts: what is kept of a growing memory (everything, or a window), and how that is stored.
They are joined with "+"; either may be left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from sparing.memory.spec import AttentionSpec, MemorySpec

__all__ = ["Policy", "apply_policy", "parse_policy", "policy_options"]

SYNTAX = "dense or window:N"


@dataclass(frozen=True)
class Window:
    """Keep the last entries: a query sees `size` keys, its own included."""

    size: int


@dataclass(frozen=True)
class Policy:
    """A policy taken apart. kv: as it was written; keep: what is kept (None: everything)."""

    kv: str
    keep: Window | None = None


def parse_policy(kv: str, options: Mapping[str, Any] | None = None) -> Policy:
    """The policy that `kv` and its options state.

    Raises ValueError for a policy that is not known, naming the ones that are, and for an option it does not take.
    """
    options = options or {}
    policy = Policy(kv)
    for part in [] if kv == "dense" else kv.split("+"):
        if match := re.fullmatch(r"window:(\d+)", part):
            if int(match[1]) < 1:
                raise ValueError(f"kv={kv!r}: the window must hold at least one token")
            axis, value = "keep", Window(int(match[1]))
        else:
            raise ValueError(f"kv={kv!r} is not a memory policy, use {SYNTAX}")
        if getattr(policy, axis) is not None:
            raise ValueError(f"kv={kv!r}: {part!r} clashes with what comes before it: use one of them")
        policy = replace(policy, **{axis: value})
    known = _options(policy)
    if unknown := sorted(set(options) - set(known)):
        raise ValueError(f"kv={kv!r} takes no option {unknown[0]!r}, it knows: {', '.join(known) or 'none'}")
    return policy


def policy_options(kv: str) -> list[str]:
    """Names of the options a policy takes. Raises ValueError for a policy that is not known."""
    return _options(parse_policy(kv))


def _options(policy: Policy) -> list[str]:
    parts: Iterable[Any] = [part for part in (policy.keep,) if part is not None]
    stated = {"size"}  # in the policy itself
    return [field.name for part in parts for field in fields(part) if field.name not in stated]


def apply_policy(specs: Sequence[MemorySpec | None], policy: Policy) -> list[MemorySpec | None]:
    """The specs as a policy changes them: it bounds or stores anew what grows, and leaves alone what does not.

    `plan` computes bytes from the result, `make_memory` builds it.
    """
    if isinstance(policy.keep, Window):
        size = policy.keep.size
        return [
            replace(spec, window=size) if isinstance(spec, AttentionSpec) and spec.window is None else spec
            for spec in specs
        ]
    return list(specs)
