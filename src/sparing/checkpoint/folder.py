"""A checkpoint: a folder in the layout of the Hugging Face hub, here or on the hub."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from sparing.checkpoint.file_names import OTHER_VOCABULARIES
from sparing.checkpoint.safetensors import open_safetensors
from sparing.checkpoint.tensors import TensorSource
from sparing.config.generation import parse_generation_config
from sparing.errors import CheckpointError

if TYPE_CHECKING:
    from sparing.checkpoint.tokenizer import Tokenizer

__all__ = ["Checkpoint", "HubCheckpoint"]


@dataclass(frozen=True)
class Checkpoint:
    """A folder in the layout of the Hugging Face hub. Tensors and tokenizer are opened when first asked for."""

    path: Path
    config: dict[str, Any] = field(repr=False)
    generation_config: dict[str, Any] = field(repr=False)

    @cached_property
    def files(self) -> TensorSource:
        """The weights as the files name them. Raises CheckpointError where there are none or a file is damaged."""
        return open_safetensors(self.path)

    @cached_property
    def tokenizer(self) -> "Tokenizer | None":
        """The tokenizer, None where the folder has none. Raises CheckpointError where its files are damaged."""
        if not any(file for form in ("tokenizer.json", *OTHER_VOCABULARIES) for file in self.path.glob(form)):
            return None
        from sparing.checkpoint.tokenizer import read_tokenizer

        return read_tokenizer(self.path, self.eos_ids)

    is_local: ClassVar[bool] = True  # weights are read from this disk
    has_blocks: ClassVar[bool] = False  # they may be rows of GGUF's blocks

    def check_generation_config(self) -> None:
        """Raises CheckpointError naming file, key and value for a setting of another type or out of range."""
        name = self.path / "generation_config.json" if self.path.is_dir() else self.path
        parse_generation_config(self.generation_config, str(name))

    @property
    def unread(self) -> Mapping[str, Any]:
        """Settings beside those of `config` that nobody reads: of a GGUF file's metadata."""
        return {}

    @property
    def has_weights(self) -> bool:
        """Whether there are weights to look for, damaged or not."""
        return not self.path.is_dir() or any(self.path.glob("*.safetensors*"))

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """Ids that end a text, as generation_config.json states them, else config.json; empty where neither does."""
        for name, values in (("generation_config.json", self.generation_config), ("config.json", self.config)):
            value = values.get("eos_token_id")
            if value is None and isinstance(text := values.get("text_config"), dict):
                value = text.get("eos_token_id")
            if value is not None:
                ids = value if isinstance(value, list) else [value]
                if not all(type(i) is int and i >= -1 for i in ids):
                    raise CheckpointError(f"{self.path / name}: eos_token_id {value!r} is not an id or a list of ids")
                return tuple(i for i in ids if i >= 0)  # -1 is how some files say that there is none
        return ()


@dataclass(frozen=True)
class HubCheckpoint(Checkpoint):
    """A model on the hub of which only what is looked at gets downloaded, and never the weights."""

    repo_id: str
    is_local: ClassVar[bool] = False

    @cached_property
    def files(self) -> TensorSource:
        """Names, shapes and types of the weights: of those in the local cache, else as the hub's files state them."""
        from sparing.checkpoint.hub import read_headers

        try:
            return open_safetensors(self.path)
        except CheckpointError:
            return read_headers(self.repo_id, self.path.name)

    @cached_property
    def tokenizer(self) -> "Tokenizer | None":
        from sparing.checkpoint.hub import TOKENIZER, download

        return Checkpoint(download(self.repo_id, self.path.name, files=TOKENIZER), {}, self.generation_config).tokenizer

    @property
    def has_weights(self) -> bool:
        return True
