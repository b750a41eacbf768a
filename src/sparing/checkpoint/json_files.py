"""Reading the JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from sparing.errors import CheckpointError, shown

__all__ = ["read_object"]

LARGEST_JSON = 16 << 20  # bytes of a file of settings, which is read whole


def read_object(path: Path, missing: Any = None) -> Any:
    """The JSON object in a file; `missing` where there is no such file. Raises CheckpointError for anything else."""
    if not path.is_file():
        return missing
    try:
        if (size := path.stat().st_size) > LARGEST_JSON:
            raise CheckpointError(f"{path}: has {size} bytes, over {LARGEST_JSON}, which no file of settings has")
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_once)
    except CheckpointError:
        raise
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object, is {type(value).__name__}")
    return value


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object. Raises ValueError for a key that is there twice with two values."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found and found[key] != value:
            raise ValueError(f"{shown(key)} is both {shown(found[key])} and {shown(value)}, give one of them")
        found[key] = value
    return found
