"""Biases that a model has and its file leaves out, because they are zeros: beside q, k and v there may be none of o."""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparing.checkpoint.tensors import TensorSource

if TYPE_CHECKING:
    import torch

__all__ = ["WithZeros", "absent_output_biases"]


class WithZeros:
    """The tensors of a source and some that are zeros (a TensorSource). zeros: name -> shape, in float32."""

    def __init__(self, source: TensorSource, zeros: Mapping[str, tuple[int, ...]]) -> None:
        self._source, self._zeros = source, zeros

    def names(self) -> list[str]:
        return [*self._source.names(), *self._zeros]

    def shape(self, name: str) -> tuple[int, ...]:
        return self._zeros[name] if name in self._zeros else self._source.shape(name)

    def dtype(self, name: str) -> str:
        return "F32" if name in self._zeros else self._source.dtype(name)

    def file(self, name: str) -> Path:
        return self._source.file(self._source.names()[0] if name in self._zeros else name)

    def is_mapped(self, name: str) -> bool:
        return name not in self._zeros and self._source.is_mapped(name)

    def read(self, name: str) -> "torch.Tensor":
        import torch

        return torch.zeros(self._zeros[name]) if name in self._zeros else self._source.read(name)

    def rows(self, name: str) -> "torch.Tensor":
        import torch

        return self.read(name).view(torch.uint8) if name in self._zeros else self._source.rows(name)

    def pieces(self, name: str) -> Iterator["torch.Tensor"]:
        import torch

        if name in self._zeros:
            yield torch.zeros(math.prod(self._zeros[name]))
        else:
            yield from self._source.pieces(name)

    def stored(self, name: str) -> Iterator[memoryview]:
        if name in self._zeros:
            yield memoryview(bytes(4 * math.prod(self._zeros[name])))
        else:
            yield from self._source.stored(name)

    def release(self, name: str) -> None:
        if name not in self._zeros:
            self._source.release(name)


def absent_output_biases(config: Mapping[str, Any], source: TensorSource) -> dict[str, tuple[int, ...]]:
    """Name -> shape of the biases of output projections where config.json has one switch for all four and the files
    have those of q, k and v alone, in every layer.

    Source: transformers 5.23, which starts with zeros what a file lacks of these.
    """
    names = source.names()
    present = set(names)
    if config.get("attention_bias") is not True or any(name.endswith(".o_proj.bias") for name in names):
        return {}
    zeros: dict[str, tuple[int, ...]] = {}
    for name in names:
        stem, dot, leaf = name.rpartition(".o_proj.")
        if dot and leaf in ("weight", "weight_packed"):
            if not all(f"{stem}.{each}_proj.bias" in present for each in "qkv"):
                return {}
            zeros[f"{stem}.o_proj.bias"] = source.shape(name)[:1]
    return zeros
