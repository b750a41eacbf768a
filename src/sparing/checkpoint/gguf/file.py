"""Reading GGUF files: metadata, tensors under Hugging Face names, quantised blocks decoded piece by piece.

Block sizes and decoding are the gguf package's; the header is `header.py`'s, names and settings are
`config.py`'s.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, quants

from sparing.checkpoint.folder import Checkpoint
from sparing.checkpoint.gguf.config import (
    ARCHITECTURES,
    RopeFactors,
    absent_biases,
    generation_config,
    hf_config,
    hf_names,
    neutral_settings,
)
from sparing.checkpoint.gguf.header import StoredTensor
from sparing.checkpoint.gguf.settings import Settings
from sparing.checkpoint.gguf.split import read_model
from sparing.checkpoint.tensors import PIECE_BYTES, TensorSource
from sparing.checkpoint.zeros import WithZeros
from sparing.errors import CheckpointError, shown

if TYPE_CHECKING:
    import torch

    from sparing.checkpoint.tokenizer import Tokenizer

__all__ = ["GGUFTensors", "open_gguf"]

NATIVE = ("F32", "F16", "BF16")
ROPE_FREQS = "rope_freqs.weight"
PRECISION = {"F32": 2**-24, "F16": 2**-11, "BF16": 2**-8, "Q8_0": 2**-6}  # of factors of 1 to 32, in which they lie


@dataclass(frozen=True)
class GGUFCheckpoint(Checkpoint):
    """A checkpoint in one GGUF file, its config spelled as Hugging Face would."""

    metadata: dict[str, Any]
    surplus: dict[str, Any]  # of the metadata
    stored: TensorSource
    has_blocks: ClassVar[bool] = True

    @property
    def unread(self) -> dict[str, Any]:
        return self.surplus

    @property
    def files(self) -> TensorSource:  # pyright: ignore[reportIncompatibleVariableOverride]
        return self.stored

    @cached_property
    def tokenizer(self) -> "Tokenizer | None":
        if "tokenizer.ggml.tokens" not in self.metadata:
            return None
        from sparing.checkpoint.gguf.tokenizer import build_tokenizer

        return build_tokenizer(self.path, self.metadata, self.eos_ids)


def open_gguf(path: Path) -> GGUFCheckpoint:
    """Opens a GGUF file without reading its weights; of a model in several pieces any of them.

    Raises CheckpointError for a damaged or hostile header, an architecture or a quantisation that is not supported,
    and a piece that is missing.
    """
    path, metadata, stored = read_model(path)
    architecture = metadata.get("general.architecture")
    if not isinstance(architecture, str) or architecture not in ARCHITECTURES:
        raise CheckpointError(
            f"{path}: GGUF architecture {str(architecture)[:80]!a} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )
    if (kind := metadata.get("general.type", "model")) != "model":
        raise CheckpointError(f"{path}: holds a {shown(kind)} and no model (general.type); give the model's own file")
    shapes = {tensor.name: tensor.shape for tensor in stored}
    settings = Settings(path, metadata)
    config = hf_config(settings, _rope_factors(stored), shapes)
    names = hf_names(path, config, shapes)
    zeros = absent_biases(config, names, shapes)
    unread = settings.unread(neutral_settings(config))
    tensors = GGUFTensors(path, stored, names, config)
    tensors = WithZeros(tensors, zeros) if zeros else tensors
    return GGUFCheckpoint(path, config, generation_config(path, metadata), metadata, unread, tensors)


class GGUFTensors:
    """The tensors of a GGUF file under Hugging Face names (a TensorSource).

    names: Hugging Face name -> names in the file, whose rows are joined expert by expert where there are two.
    Query and key rows of the llama architecture are stored for interleaved rotary pairs and are put back into the
    half-split order here. Norms of Gemma 3 are stored with the 1 that the model adds, which is taken off.
    """

    def __init__(
        self,
        path: Path,
        stored: list[StoredTensor],
        names: dict[str, tuple[str, ...]],
        config: dict[str, Any],
    ) -> None:
        by_name = {tensor.name: tensor for tensor in stored}
        self._path = path
        self._parts = {name: [by_name[part] for part in parts] for name, parts in names.items()}
        self._heads: dict[str, int] = {}
        if config["model_type"] == "llama":
            counts = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
            self._heads = {name: counts[name.split(".")[-2]] for name in names if name.split(".")[-2] in counts}
        self._ones = {n for n in names if config["model_type"] == "gemma3_text" and n.endswith("norm.weight")}
        first_of = {part.kind: f"{part.file.path}: {name}" for name in reversed(names) for part in self._parts[name]}
        for kind, where in first_of.items():
            _check_decodable(where, kind)
        for name, heads in self._heads.items():
            if self.shape(name)[0] % (2 * heads):
                raise CheckpointError(
                    f"{path}: {name} has shape {list(self.shape(name))}, whose rows are no {heads} heads of pairs"
                )

    def names(self) -> list[str]:
        return list(self._parts)

    def shape(self, name: str) -> tuple[int, ...]:
        first, *rest = self._entry(name)
        return (first.shape[0], first.shape[1] * 2, *first.shape[2:]) if rest else first.shape

    def dtype(self, name: str) -> str:
        return "+".join(dict.fromkeys(part.kind.name for part in self._entry(name)))

    def file(self, name: str) -> Path:
        return self._entry(name)[0].file.path

    def is_mapped(self, name: str) -> bool:
        return len(self._entry(name)) == 1 and not self._is_changed(name)

    def _is_changed(self, name: str) -> bool:
        """Whether its numbers are not those of the file, or not in their order."""
        return name in self._heads or name in self._ones

    def read(self, name: str) -> "torch.Tensor":
        import torch

        if self.is_mapped(name) and self.dtype(name) in NATIVE:
            part = self._entry(name)[0]
            return part.file.tensor(part.start, part.shape, part.kind.name, f"{part.file.path.name}: {name}")
        pieces = list(self.pieces(name))
        return torch.cat(pieces).reshape(self.shape(name))

    def rows(self, name: str) -> "torch.Tensor":
        import torch

        parts = [
            part.file.tensor(part.start, (*part.shape[:-1], part.nbytes // math.prod(part.shape[:-1])), "U8", part.name)
            for part in self._entry(name)
        ]
        if name in self._heads:
            return half_split(parts[0], self._heads[name])
        return parts[0] if len(parts) == 1 else torch.cat(parts, 1)

    def pieces(self, name: str) -> Iterator["torch.Tensor"]:
        import torch

        parts = self._entry(name)
        if name in self._heads:
            whole = torch.cat(list(self._rows(parts[0], 0, math.prod(parts[0].shape[:-1]))))
            yield half_split(whole.reshape(parts[0].shape), self._heads[name]).reshape(-1)
        elif name in self._ones:
            for piece in self._rows(parts[0], 0, math.prod(parts[0].shape[:-1])):
                yield piece.float() - 1
        elif len(parts) == 1:
            yield from self._rows(parts[0], 0, math.prod(parts[0].shape[:-1]))
        else:
            experts, rows = parts[0].shape[:2]
            for expert in range(experts):
                for part in parts:
                    yield from self._rows(part, expert * rows, (expert + 1) * rows)

    def stored(self, name: str) -> Iterator[memoryview]:
        for part in self._entry(name):
            yield from part.file.runs(part.start, part.start + part.nbytes)

    def release(self, name: str) -> None:
        for part in self._entry(name):
            part.file.release(part.start, part.start + part.nbytes)

    def _rows(self, part: StoredTensor, first: int, last: int) -> Iterator["torch.Tensor"]:
        """Rows [first, last) of a tensor, flattened, a few MiB at a time, each released after its turn."""
        width = part.shape[-1]
        row_bytes = part.nbytes // math.prod(part.shape[:-1])
        step = max(1, PIECE_BYTES // (4 * width))
        for begin in range(first, last, step):
            count = min(step, last - begin)
            yield _decoded(part, begin, count)
            start = part.start + begin * row_bytes
            part.file.release(start, start + count * row_bytes)

    def _entry(self, name: str) -> list[StoredTensor]:
        if name not in self._parts:
            raise CheckpointError(f"{self._path}: {name}: no such tensor; the file holds {len(self._parts)} others")
        return self._parts[name]


def half_split(stored: "torch.Tensor", heads: int) -> "torch.Tensor":
    """Rows of a projection from interleaved rotary pairs (0, 1), (2, 3), ... to pairs (m, m + head_dim / 2).

    stored: [heads * head_dim, ...], a weight or a bias. Source: the permutation of llama.cpp's converter, inverted.
    """
    pairs = stored.reshape(heads, stored.shape[0] // heads // 2, 2, *stored.shape[1:])
    return pairs.transpose(1, 2).reshape(stored.shape)


def _decoded(part: StoredTensor, first: int, count: int) -> "torch.Tensor":
    """Some rows of a tensor, flattened: a view in the stored type, or float32 where it was quantised."""
    import torch

    width, row_bytes = part.shape[-1], part.nbytes // math.prod(part.shape[:-1])
    start = part.start + first * row_bytes
    if part.kind.name in NATIVE:
        return part.file.tensor(start, (count * width,), part.kind.name, part.name)
    raw = np.frombuffer(part.file.buffer(), np.uint8, count * row_bytes, start)
    with np.errstate(all="ignore"):  # what is not finite is named by whoever takes the numbers
        return torch.from_numpy(quants.dequantize(raw.reshape(count, row_bytes), part.kind)).reshape(-1)


def _rope_factors(stored: list[StoredTensor]) -> RopeFactors | None:
    """The factors by which a file stretches its rotary wavelengths, None where it does not."""
    for tensor in stored:
        if tensor.name == ROPE_FREQS:
            if tensor.kind.name not in PRECISION or len(tensor.shape) != 1:
                raise CheckpointError(
                    f"{tensor.file.path}: {ROPE_FREQS} is {tensor.kind.name} {list(tensor.shape)}; "
                    f"it can be read as one row of {', '.join(PRECISION)}"
                )
            return RopeFactors(_decoded(tensor, 0, 1).float().tolist(), PRECISION[tensor.kind.name])
    return None


def _check_decodable(where: str, kind: GGMLQuantizationType) -> None:
    if kind.name in NATIVE:
        return
    _, size = GGML_QUANT_SIZES[kind]
    try:
        quants.dequantize(np.zeros((1, size), np.uint8), kind)
    except (NotImplementedError, KeyError) as error:
        raise CheckpointError(
            f"{where}: quantised as {kind.name}, which the gguf package cannot decode; "
            "use a file of F32, F16, BF16, Q8_0, Q4_0, Q4_1, Q5_0, Q5_1, Q2_K to Q6_K or IQ4_NL"
        ) from error
