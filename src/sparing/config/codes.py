"""TurboQuant's settings: what becomes codes, when, and in how many bytes. Never imports torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

__all__ = ["EXACT", "CodeFormat", "CodePart", "TurboQuant", "is_among"]

EXACT = 16  # bits that mean: do not quantise
FRACTIONS = {2.5: (4, 2), 3.5: (5, 3)}  # bits of the quarter of the channels that stand out, and of the others
ROTATIONS = ("rht", "haar", "hadamard", "identity")
CHOICES = {
    "scale": ("unbiased", "norm", "renorm", "lsq"),
    "variant": ("mse", "prod"),
    "prefill": ("stream", "exact"),
    "scale_dtype": ("float16", "float32"),
}


def is_among(value: Any, known: Sequence[Any]) -> bool:
    """Whether a setting is one of these: not of a type that only compares with them, as a tensor does."""
    return (value is None or isinstance(value, str)) and value in known


@dataclass(frozen=True)
class CodePart:
    """Codes of one part of a vector: `dims` coordinates of `bits` bits, and a scale."""

    dims: int
    bits: int

    def nbytes(self, scale_size: int) -> int:
        """Bytes of a token: a kernel reads 16 coordinates at a time."""
        return -(-self.dims // 16) * 16 * self.bits // 8 + scale_size


@dataclass(frozen=True)
class CodeFormat:
    """How a layer's committed keys and values become codes of a few bits (TurboQuant).

    k_bits, v_bits: 1 to 8 bits a coordinate, or 2.5 and 3.5, where a quarter of the channels gets more. scale: what
    the stored scale makes exact (`encode_directions`). rotation: "rht", "haar", "hadamard", "identity", or a pair of
    tensors for keys and values, one [d, d] matrix per layer. window, block: token j is read exactly by queries before
    index (j // block + 1) * block + window, from then on as codes; block: 1 or a multiple of 16. sink_tokens: how
    many first tokens stay exact. prefill: "stream" applies that rule inside a prompt too, so that results do not depend
    on how it is cut; "exact" reads all tokens of the current forward exactly. variant: "prod" spends one of the bits on
    a sketch of the residual. scale_dtype: of the stored scales. seed: of the rotations.
    Raises ValueError for values out of range or that contradict each other.
    """

    k_bits: float
    v_bits: float
    scale: str = "unbiased"
    rotation: Any = "rht"
    window: int = 0
    block: int = 64
    sink_tokens: int = 0
    prefill: str = "stream"
    variant: str = "mse"
    scale_dtype: str = "float16"
    seed: int = 0

    def __post_init__(self) -> None:
        for bits in (self.k_bits, self.v_bits):
            if bits not in FRACTIONS and bits not in range(1, 9):
                raise ValueError(f"turboquant: {bits} bits is not among 1 to 8, 2.5 and 3.5, use one of them")
        for name in ("window", "sink_tokens", "seed", "block"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise ValueError(f"turboquant: {name} is {value!r}, expected a whole number of at least 0")
        if self.block != 1 and (self.block == 0 or self.block % 16):
            raise ValueError(f"turboquant: block is {self.block}, use 1 or a multiple of 16")
        for name, known in CHOICES.items():
            if not is_among(getattr(self, name), known):
                raise ValueError(f"turboquant: {name}={getattr(self, name)!r} is not known, use {', '.join(known)}")
        if not isinstance(self.rotation, str) and FRACTIONS.keys() & {self.k_bits, self.v_bits}:
            raise ValueError(
                "turboquant: explicit rotations clash with fractional bits, which need two: use whole bits"
            )
        if self.variant == "prod" and self.scale in ("renorm", "lsq"):
            raise ValueError(
                f"turboquant: scale={self.scale!r} clashes with variant='prod', whose sketch corrects the norm:"
                " leave scale out"
            )

    @property
    def depends_on_cuts(self) -> bool:
        """Whether what is read differs with how tokens were cut into passes: a pass may read its own exactly."""
        return self.prefill == "exact"

    def split(self, d: int, role: str) -> list[tuple[int, int]]:
        """(channels, bits) of the independent quantisers of a vector of size d. role: "keys" or "values"."""
        bits = self.k_bits if role == "keys" else self.v_bits
        if bits not in FRACTIONS:
            return [(d, int(bits))]
        # Of keys whole pairs that RoPE turns are chosen, as their energy moves between the two.
        outliers = 2 * max(1, d // 8) if role == "keys" else max(2, d // 4)
        high, low = FRACTIONS[bits]
        return [(outliers, high), (d - outliers, low)]

    def parts(self, d: int, role: str) -> list[CodePart]:
        """What is stored of each vector of size d: it is their sum."""
        found = []
        for channels, bits in self.split(d, role):
            if self.variant == "mse":
                found.append(CodePart(channels, bits))
            else:
                found += [CodePart(channels, bits - 1)] * (bits > 1) + [CodePart(channels, 1)]
        return found

    def entry_nbytes(self, d: int, *, value_only: bool) -> int:
        """Bytes of one token and kv head, once it is codes."""
        size = 2 if self.scale_dtype == "float16" else 4
        roles = ("values",) if value_only else ("keys", "values")
        return sum(part.nbytes(size) for role in roles for part in self.parts(d, role))

    def outlier_nbytes(self, d: int, *, value_only: bool) -> int:
        """Bytes of the indices of the channels that stand out, of one kv head."""
        roles = ("values",) if value_only else ("keys", "values")
        return sum(2 * split[0][0] for role in roles if len(split := self.split(d, role)) == 2)

    def exact(self, length: int) -> int:
        """How many of `length` committed tokens, the newest, are not codes yet (sink tokens not counted)."""
        coded = max(0, length - self.window) // self.block * self.block
        return length - min(max(coded, self.sink_tokens), length)


@dataclass(frozen=True)
class TurboQuant(CodeFormat):
    """What a policy states: the format, and `skip_layers`, indices (from either end) of layers that stay exact."""

    skip_layers: Sequence[int] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.rotation, str):
            if self.rotation not in ROTATIONS:
                raise ValueError(
                    f"turboquant: rotation={self.rotation!r} is not known, use {', '.join(ROTATIONS)}, or a pair of"
                    " tensors for keys and values, one [d, d] matrix per layer"
                )
        elif not isinstance(self.rotation, Sequence) or len(self.rotation) != 2:
            raise ValueError(
                f"turboquant: rotation is a {type(self.rotation).__name__}, expected a name"
                f" ({', '.join(ROTATIONS)}) or a pair of tensors for keys and values, one [d, d] matrix per layer"
            )
        indices = self.skip_layers
        if isinstance(indices, str | bytes) or not isinstance(indices, Sequence):
            raise ValueError(f"turboquant: skip_layers is {indices!r}, expected a list of layer indices")
        if bad := [i for i in indices if isinstance(i, bool) or not isinstance(i, int)]:
            raise ValueError(f"turboquant: skip_layers holds {bad[0]!r}, expected layer indices")

    def for_layer(self) -> CodeFormat:
        """What a layer's spec states: the format, without tensors."""
        stated = {field.name: getattr(self, field.name) for field in fields(CodeFormat)}
        return CodeFormat(**(stated if isinstance(self.rotation, str) else {**stated, "rotation": "explicit"}))
