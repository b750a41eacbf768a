"""Reading the JSON files of a checkpoint."""

import json
from pathlib import Path
from typing import Any

from sparing.errors import CheckpointError

__all__ = ["read_object"]


def read_object(path: Path, missing: Any = None) -> Any:
    """The JSON object in a file; `missing` where there is no such file. Raises CheckpointError for anything else."""
    if not path.is_file():
        return missing
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object, is {type(value).__name__}")
    return value
