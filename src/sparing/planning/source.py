"""From what the user names (released model, checkpoint, config) to a parsed config. Never imports torch."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.config import planned_config
from sparing.config.names import names_in_file
from sparing.config.protocol import HasRelease, ModelConfig
from sparing.config.released import RELEASED
from sparing.errors import CheckpointError

if TYPE_CHECKING:
    from sparing.checkpoint import Checkpoint, TensorSource

__all__ = ["ModelSource", "Source", "find_source", "stored_tensors"]

ModelSource = str | Path | Mapping[str, Any] | ModelConfig | None  # ways to say which model


@dataclass(frozen=True)
class Source:
    """config: the parsed config; checkpoint: None where there are no files; raw: the contents of a config.json."""

    name: str
    config: ModelConfig
    checkpoint: Checkpoint | None = None
    raw: Mapping[str, Any] = field(default_factory=dict)


def find_source(source: ModelSource) -> Source:
    """Find a model's config.

    source: a released model's name, a folder, GGUF file or hub id, None for the checkpoint that ships with the
    package, the contents of a config.json, or a parsed config.
    Raises ValueError listing the known names for a name that is none, CheckpointError for a bad config or checkpoint.
    """
    if isinstance(source, Mapping):
        return Source(str(source.get("model_type")), planned_config(source), raw=source)
    if source is not None and not isinstance(source, str | Path):
        if not hasattr(source, "memory_specs"):
            raise ValueError(f"source is of type {type(source).__name__}, expected a name, a path or a config")
        return Source(source.model_type, source)
    if isinstance(source, str) and source in RELEASED:
        return Source(source, planned_config(RELEASED[source]))
    from sparing.checkpoint import open_checkpoint

    try:
        checkpoint = open_checkpoint(source, weights=False)
    except CheckpointError as error:
        if isinstance(source, str) and "/" not in source and not os.path.exists(source):
            raise CheckpointError(f"{error}, or a released model: {', '.join(RELEASED)}") from None
        raise
    return Source("tales" if source is None else str(source), _as_stored(checkpoint), checkpoint)


def _as_stored(checkpoint: Checkpoint) -> ModelConfig:
    """The config, with a head of its own where the files on this disk hold one that differs from the embedding."""
    from sparing.weights.stored import stored_weights
    from sparing.weights.tied import settle_head

    config = planned_config(checkpoint.config)
    if not (checkpoint.is_local and checkpoint.has_weights):
        return config
    try:
        tensors = stored_weights(checkpoint)
    except CheckpointError:  # damaged files are for those to report who look at weights
        return config
    return settle_head(config, tensors)


def stored_tensors(source: Source) -> tuple[TensorSource | None, list[str]]:
    """(the tensors that say which weights are packed, None where there are none to see; notes of what does not load).

    Of a model on the hub they are looked at where its config says that it is quantised.
    Raises CheckpointError for a quantisation that is not supported, and for damaged files of a quantised checkpoint.
    """
    from sparing.weights.foreign import quantization
    from sparing.weights.load import check_names, whole_names
    from sparing.weights.stored import stored_weights

    checkpoint = source.checkpoint
    if checkpoint is None:
        return None, _uncounted(source.raw, source.config)
    if not checkpoint.is_local and quantization(checkpoint.config) is None:
        return None, []
    try:
        if not checkpoint.has_weights:
            return None, _uncounted(checkpoint.config, source.config)
        _ = checkpoint.files
    except CheckpointError as error:
        if quantization(checkpoint.config) is not None:
            raise
        return None, [f"does not load as it is: {error}"]
    tensors = stored_weights(checkpoint)
    try:
        ignore = whole_names(source.config.tolerated_tensors())
        check_names(tensors, names_in_file(source.config, tensors.names()), ignore)
    except CheckpointError as error:
        return tensors, [f"does not load as it is: {error}"]
    return tensors, []


def _uncounted(raw: Mapping[str, Any], config: ModelConfig) -> list[str]:
    """What to know where config.json says that weights are quantised and no file says which."""
    from sparing.weights.foreign import quantization, refuse_method

    refuse_method(raw)
    if quantization(raw) is None or (isinstance(config, HasRelease) and config.is_fp8):
        return []
    return ["counted as if no weight were quantised: there are no files to see"]
