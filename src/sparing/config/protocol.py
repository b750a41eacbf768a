"""What every config offers, whatever its architecture. Never imports torch."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import Field
from typing import Any, ClassVar, Protocol, Self, runtime_checkable

from sparing.config.memory import MemorySpec
from sparing.config.roles import Tensors
from sparing.config.rope import RopeParameters
from sparing.config.stored_parts import StoredPart

__all__ = ["HasCopies", "HasRelease", "HasTensors", "ModelConfig"]


class HasTensors(Protocol):
    """A model's config, or that of a head beside it."""

    def tensors(self) -> Tensors:
        """Checkpoint name -> (shape, role): everything that must be in the file."""
        ...


class ModelConfig(HasTensors, Protocol):
    """A parsed config.json: a frozen dataclass.

    canvas_length: tokens denoised at once, None where text comes token by token. refused_token_ids: those that stand
    for images, sounds or videos. stored_dtype: the type that the file states. unknown: what config.json says and
    nothing reads.
    """

    __dataclass_fields__: ClassVar[dict[str, Field[Any]]]

    @property
    def model_type(self) -> str: ...
    @property
    def hidden_size(self) -> int: ...
    @property
    def vocab_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def top_k_experts(self) -> int: ...
    @property
    def max_position_embeddings(self) -> int: ...
    @property
    def tie_word_embeddings(self) -> bool: ...
    @property
    def canvas_length(self) -> int | None: ...
    @property
    def bos_token_id(self) -> int | None: ...
    @property
    def eos_token_ids(self) -> tuple[int, ...]: ...
    @property
    def pad_token_id(self) -> int | None: ...
    @property
    def refused_token_ids(self) -> tuple[int, ...]: ...
    @property
    def stored_dtype(self) -> str: ...
    @property
    def unknown(self) -> Mapping[str, Any]: ...

    def mixers(self) -> tuple[str, ...]:
        """What mixes in each layer: "attention", "mamba", "moe" or "mlp"."""
        ...

    def memory_specs(self) -> Sequence[MemorySpec | None]:
        """What each layer remembers; None: nothing."""
        ...

    def layer_ropes(self) -> Sequence[RopeParameters | None]:
        """How each layer rotates its queries and keys; None: not at all."""
        ...

    def tolerated_tensors(self) -> tuple[str, ...]:
        """Patterns of whole names that may be present and mean nothing."""
        ...

    def untied(self, file: str) -> Self:
        """The same with a head of its own, which `file` holds. Raises CheckpointError where it cannot have one."""
        ...


@runtime_checkable
class HasRelease(Protocol):
    """A config that says what the release's files hold, if is_fp8: matrices in FP8 or fewer bits."""

    @property
    def is_fp8(self) -> bool: ...

    def released(self, *, drafting: bool) -> Iterator[StoredPart]:
        """What the files hold, with or without the layers that draft."""
        ...


@runtime_checkable
class HasCopies(Protocol):
    """A config of two networks that share weights, which a file may hold twice."""

    def copy_of(self, name: str) -> str | None:
        """Which tensor this one of a file must equal; None where it is no copy."""
        ...
