"""The efficient language models of 2025-26 in one small, exact, fast PyTorch library.

Importing this module imports neither PyTorch nor any model: names are resolved when first used.
"""

from __future__ import annotations

TYPE_CHECKING = False  # from `typing`, which takes longer to import than everything else here
if TYPE_CHECKING:
    from typing import Any

    from sparing.decoding.events import Commit, Done, Draft
    from sparing.decoding.generate import generate
    from sparing.errors import CheckpointError
    from sparing.inspection.calibration import calibrate
    from sparing.memory.sequence import resident_bytes
    from sparing.memory.triattention.statistics import Statistics
    from sparing.models.loading import load
    from sparing.planning import Plan, plan
    from sparing.training import train

__all__ = [
    "CheckpointError",
    "Commit",
    "Done",
    "Draft",
    "Plan",
    "Statistics",
    "calibrate",
    "generate",
    "load",
    "plan",
    "resident_bytes",
    "train",
]

__version__ = "0.1.0"

_HOMES = {
    "CheckpointError": "errors",
    "Commit": "decoding.events",
    "Done": "decoding.events",
    "Draft": "decoding.events",
    "Plan": "planning",
    "Statistics": "memory.triattention.statistics",
    "calibrate": "inspection.calibration",
    "generate": "decoding.generate",
    "load": "models.loading",
    "plan": "planning",
    "resident_bytes": "memory.sequence",
    "train": "training",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'sparing' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(f"sparing.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
