"""The metadata of a GGUF file, each key read once, with errors that name key, value and file."""

import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from sparing.config.unread import refuse_unread
from sparing.errors import CheckpointError, shown

__all__ = ["Settings"]

LARGEST = 2**31 - 1
# What names, describes or counts the file, or belongs to other readers: sampling and the tokenizer's.
ELSEWHERE = ("general.", "tokenizer.", "split.", "quantize.")
BOOKKEEPING = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")


class Settings:
    """Metadata of one architecture; `unread()` are the keys that nobody asked for."""

    def __init__(self, path: Path, metadata: Mapping[str, Any]) -> None:
        self.path = path
        self.metadata = metadata
        self.architecture: str = metadata["general.architecture"]
        self._used = {f"{self.architecture}.{key}" for key in BOOKKEEPING}

    def error(self, key: str, message: str) -> CheckpointError:
        value = shown(self.metadata.get(f"{self.architecture}.{key}"))
        return CheckpointError(f"{self.path}: {self.architecture}.{key} is {value}, {message}")

    def get(self, key: str, default: Any = None) -> Any:
        self._used.add(f"{self.architecture}.{key}")
        return self.metadata.get(f"{self.architecture}.{key}", default)

    def count(self, key: str, default: int | None = None, *, minimum: int = 1, maximum: int = LARGEST) -> int:
        value = self.get(key, default)
        if type(value) is not int or not minimum <= value <= maximum:
            raise self.error(key, f"must be a count of {minimum} to {maximum}")
        return value

    def real(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if not isinstance(value, float) or not 0 < value < math.inf:
            raise self.error(key, "must be a positive number")
        return value

    def expect(self, key: str, *values: Any, reason: str) -> None:
        """Raises CheckpointError where the file has the key with none of these values; reason: why no other will do."""
        value = self.get(key, values[0])
        if not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in values):
            raise self.error(key, f"not {shown(values[0])}: {reason}")

    def per_layer(self, key: str, layers: int) -> list[int]:
        """A count that the file states once or once per layer."""
        value = self.get(key)
        values = value if isinstance(value, list) else [value] * layers
        if len(values) != layers or not all(type(v) is int and 1 <= v <= LARGEST for v in values):
            raise CheckpointError(f"{self.path}: {self.architecture}.{key} is not a count, nor {layers} of them")
        return values

    def unread(self, neutral: Mapping[str, Collection[Any]]) -> dict[str, Any]:
        """What the file says and nobody asked for.

        neutral: by key without the architecture, values that say what the model does anyway.
        Raises CheckpointError for settings that would change what the model computes.
        """
        rest = {
            key: value
            for key, value in self.metadata.items()
            if key not in self._used and not key.startswith(ELSEWHERE)
        }
        prefix = f"{self.architecture}."
        own = {key.removeprefix(prefix): value for key, value in rest.items() if key.startswith(prefix)}
        refuse_unread(own, file=str(self.path), model_type=self.architecture, neutral=neutral)
        return rest
