"""From what the user names (released model, checkpoint, config) to a parsed config. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.config import parse_config
from sparing.config.released import RELEASED
from sparing.errors import CheckpointError

if TYPE_CHECKING:
    from sparing.checkpoint import Checkpoint, TensorSource

__all__ = ["Source", "find_source", "packed_tensors"]


@dataclass(frozen=True)
class Source:
    """config: the parsed config; checkpoint: None where there are no files."""

    name: str
    config: Any
    checkpoint: Checkpoint | None = None


def find_source(source: Any) -> Source:
    """Find a model's config.

    source: a released model's name, a folder, GGUF file or hub id, None for the checkpoint that ships with the
    package, the contents of a config.json, or a parsed config.
    Raises ValueError listing the known names for a name that is none, CheckpointError for a bad config or checkpoint.
    """
    if isinstance(source, Mapping):
        return Source(str(source.get("model_type")), parse_config(source))
    if hasattr(source, "memory_specs"):
        return Source(source.model_type, source)
    if source in RELEASED:
        return Source(source, parse_config(RELEASED[source]))
    if source is not None and not isinstance(source, str | Path):
        raise ValueError(f"source is of type {type(source).__name__}, expected a name, a path or a config")
    from sparing.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(source, weights=False)
    except CheckpointError as error:
        if isinstance(source, str) and "/" not in source and not os.path.exists(source):
            raise CheckpointError(f"{error}, or a released model: {', '.join(RELEASED)}") from None
        raise
    return Source("tales" if source is None else str(source), parse_config(checkpoint.config), checkpoint)


def packed_tensors(source: Source) -> TensorSource | None:
    """The tensors of a checkpoint that says it is quantised, None for any other and where there are no files.

    Raises CheckpointError for damaged files.
    """
    if source.checkpoint is None or not source.checkpoint.config.get("quantization_config"):
        return None
    return source.checkpoint.tensors
