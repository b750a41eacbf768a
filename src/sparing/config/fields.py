"""Typed reading of a config.json: each key read once, with an error that names key, value and way out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sparing.errors import CheckpointError

__all__ = ["LARGEST_COUNT", "Fields"]

# Written by tools into every config.json; they describe the file or training, not the computation.
BOOKKEEPING = {
    "_attn_implementation_autoset", "_name_or_path", "add_cross_attention", "architectures", "attention_dropout",
    "chunk_size_feed_forward", "cross_attention_hidden_size", "dtype", "hidden_dropout", "id2label",
    "initializer_range", "is_decoder", "is_encoder_decoder", "label2id", "model_type", "output_attentions",
    "output_hidden_states", "pretraining_tp", "problem_type", "quantization_config", "return_dict",
    "tie_encoder_decoder", "tokenizer_class", "torch_dtype", "transformers_version", "use_cache",
}  # fmt: skip

# No released config comes near these; what lies beyond would fail somewhere deep inside, or never end.
LARGEST_SIZE = 2**31 - 1
LARGEST_COUNT = 2**14  # of layers, or of experts
LARGEST_NUMBER = 1e30  # NaN, which Python's JSON admits, is not below it either

_REQUIRED: Any = object()


class Fields:
    """The keys of one JSON object; `unknown()` lists those that nobody asked for."""

    def __init__(self, raw: Mapping[str, Any], file: str = "config.json"):
        if not isinstance(raw, Mapping):
            raise CheckpointError(f"{file}: expected a JSON object, found {type(raw).__name__}")
        self.raw = raw
        self.file = file
        self._used: set[str] = set()

    def error(self, message: str) -> CheckpointError:
        return CheckpointError(f"{self.file}: {message}")

    def get(self, key: str, default: Any = _REQUIRED) -> Any:
        self._used.add(key)
        if key in self.raw:
            return self.raw[key]
        if default is _REQUIRED:
            raise self.error(f"the key {key} is missing")
        return default

    def integer(self, key: str, default: Any = _REQUIRED, *, minimum: int = 1, maximum: int = LARGEST_SIZE) -> int:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise self.error(f"{key} is {value!r}, expected an integer of at least {minimum}")
        if value > maximum:
            raise self.error(f"{key} is over {maximum}, which no model has")
        return value

    def optional_integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int | None:
        return None if self.get(key, default) is None else self.integer(key, default, minimum=minimum)

    def number(self, key: str, default: Any = _REQUIRED) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST_NUMBER:
            raise self.error(f"{key} is {value!r}, expected a finite number")
        return float(value)

    def optional_number(self, key: str, default: float | None = None) -> float | None:
        return None if self.get(key, default) is None else self.number(key, default)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} is {value!r}, expected true or false")
        return value

    def choice(self, key: str, choices: Sequence[Any], default: Any = _REQUIRED) -> Any:
        value = self.get(key, default)
        if value not in choices:
            raise self.error(f"{key} is {value!r}, supported: {', '.join(map(repr, choices))}")
        return value

    def strings(self, key: str, default: Sequence[str] | None = None) -> list[str] | None:
        value = self.get(key, default)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"{key} is {value!r}, expected a list of strings")
        return list(value)

    def token_ids(self, key: str, default: Any = None) -> tuple[int, ...]:
        """One id, a list of ids or null -> tuple of ids. A file may spell that there is none as -1."""
        value = self.get(key, default)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= -1 for item in ids):
            raise self.error(f"{key} is {value!r}, expected a token id or a list of token ids")
        return tuple(item for item in ids if item >= 0)

    def token_id(self, key: str, default: int | None = None) -> int | None:
        """One id; None where there is none, which a file may spell as -1."""
        return None if self.get(key, default) == -1 else self.optional_integer(key, default, minimum=0)

    def ignore(self, *keys: str) -> None:
        """Mark keys as known to have no effect on the computation."""
        self._used.update(keys)

    def unknown(self) -> dict[str, Any]:
        return {key: value for key, value in self.raw.items() if key not in self._used and key not in BOOKKEEPING}
