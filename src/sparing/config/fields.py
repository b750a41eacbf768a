"""Typed reading of a config.json: each key read once, with an error that names key, value and way out."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from sparing.config.unread import refuse_unread
from sparing.errors import CheckpointError, shown

__all__ = ["LARGEST_COUNT", "LARGEST_SIZE", "Fields"]

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

# What `dtype` may say -> the type that is meant; weights of types that no model computes in are read as float32.
DTYPES = {name: name for name in ("bfloat16", "float16", "float32", "float64", "float8_e4m3fn", "float8_e5m2")} | {
    "auto": "float32", "float": "float32", "half": "float16", "double": "float64",
}  # fmt: skip

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
            raise self.error(f"{key} is {shown(value)}, expected an integer of at least {minimum}")
        if value > maximum:
            raise self.error(f"{key} is over {maximum}, which no model has")
        return value

    def optional_integer(self, key: str, default: int | None = None, *, minimum: int = 1) -> int | None:
        return None if self.get(key, default) is None else self.integer(key, default, minimum=minimum)

    def number(self, key: str, default: Any = _REQUIRED, *, above: float = -LARGEST_NUMBER) -> float:
        value = self.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) < LARGEST_NUMBER:
            raise self.error(f"{key} is {shown(value)}, expected a finite number")
        if value <= above:
            raise self.error(f"{key} is {shown(value)}, expected a number above {above:g}")
        return float(value)

    def epsilon(self, key: str, default: float) -> float:
        """What is added under the root of a norm."""
        value = self.number(key, default)
        if value < 0:
            raise self.error(f"{key} is {value}, expected a number of at least 0: it keeps a root from being negative")
        return value

    def optional_number(
        self, key: str, default: float | None = None, *, above: float = -LARGEST_NUMBER
    ) -> float | None:
        return None if self.get(key, default) is None else self.number(key, default, above=above)

    def boolean(self, key: str, default: Any = _REQUIRED) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(f"{key} is {shown(value)}, expected true or false")
        return value

    def choice(self, key: str, choices: Sequence[Any], default: Any = _REQUIRED) -> Any:
        value = self.get(key, default)
        if value not in choices:
            raise self.error(f"{key} is {shown(value)}, supported: {', '.join(map(repr, choices))}")
        return value

    def strings(self, key: str, default: Sequence[str] | None = None) -> list[str] | None:
        value = self.get(key, default)
        if value is None:
            return None
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"{key} is {shown(value)}, expected a list of strings")
        return list(value)

    def token_ids(self, key: str, default: Any = None) -> tuple[int, ...]:
        """One id, a list of ids or null -> tuple of ids. A file may spell that there is none as -1."""
        value = self.get(key, default)
        ids = () if value is None else tuple(value) if isinstance(value, list) else (value,)
        if not all(isinstance(item, int) and not isinstance(item, bool) and item >= -1 for item in ids):
            raise self.error(f"{key} is {shown(value)}, expected a token id or a list of token ids")
        return tuple(item for item in ids if item >= 0)

    def token_id(self, key: str, default: int | None = None) -> int | None:
        """One id; None where there is none, which a file may spell as -1."""
        return None if self.get(key, default) == -1 else self.optional_integer(key, default, minimum=0)

    def stored_dtype(self, *others: Mapping[str, Any]) -> str:
        """The name of the type of the weights, "float32" where none is stated here or in the other objects."""
        for raw in (self.raw, *others):
            for key in ("dtype", "torch_dtype"):
                value = raw.get(key)
                if value is not None:
                    name = value.removeprefix("torch.") if isinstance(value, str) else None
                    if name not in DTYPES:
                        raise self.error(f"{key} is {shown(value)}, supported: {', '.join(map(repr, DTYPES))}")
                    return DTYPES[name]
        return "float32"

    def placeholders(self, vocab_size: int) -> tuple[int, ...]:
        """Ids of the vocabulary that stand for an image, a sound or a video."""
        keys = ("image_token_id", "image_token_index", "audio_token_id", "video_token_id")
        return tuple(i for key in keys if (i := self.token_id(key)) is not None and i < vocab_size)

    def ignore(self, *keys: str) -> None:
        """Mark keys as known to have no effect on the computation."""
        self._used.update(keys)

    def unknown(self) -> dict[str, Any]:
        return {key: value for key, value in self.raw.items() if key not in self._used and key not in BOOKKEEPING}

    def harmless(self, model_type: str, neutral: Mapping[str, Collection[Any]] | None = None) -> dict[str, Any]:
        """`unknown()`. Raises CheckpointError where one of them would change what the model computes.

        neutral: as in `refuse_unread`.
        """
        rest = self.unknown()
        refuse_unread(rest, file=self.file, model_type=model_type, neutral=neutral)
        return rest
