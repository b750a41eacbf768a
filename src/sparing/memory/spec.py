"""What one layer must remember about a sequence, stated without tensors. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AttentionSpec", "MemorySpec", "RecurrentSpec"]

ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class AttentionSpec:
    """Keys and values of one attention layer.

    num_key_value_heads, head_dim: shape of one entry.
    window: a query sees this many keys including its own, so `window - 1` entries are kept; None: all.
    shared_with: index of the layer whose entries this one reads; it then stores nothing itself.
    value_only: keys follow from values (K = V projections), so only values are stored.
    """

    num_key_value_heads: int
    head_dim: int
    window: int | None = None
    shared_with: int | None = None
    value_only: bool = False

    def entries(self, tokens: int) -> int:
        """Entries held after `tokens` committed tokens."""
        if self.shared_with is not None:
            return 0
        return tokens if self.window is None else min(tokens, self.window - 1)

    def nbytes(self, tokens: int, element_size: int) -> int:
        """Bytes held after `tokens` committed tokens, stored densely with `element_size` bytes a number."""
        tensors = 1 if self.value_only else 2
        return tensors * self.entries(tokens) * self.num_key_value_heads * self.head_dim * element_size


@dataclass(frozen=True)
class RecurrentSpec:
    """State of one Mamba-2 layer: as large for one token as for a million.

    num_heads, head_dim, state_size: shape of the state; num_groups: of B and C, which the convolution also covers;
    conv_kernel: taps of the convolution, of which the inputs of all but the last are kept.
    state_dtype: "float32", "bfloat16" or "float16"; state_rounding: "stochastic" or "nearest", of a 16-bit state.
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_kernel: int
    state_dtype: str = "float32"
    state_rounding: str = "stochastic"

    @property
    def conv_size(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.num_heads * self.head_dim + 2 * self.num_groups * self.state_size

    @property
    def state_nbytes(self) -> int:
        return self.num_heads * self.head_dim * self.state_size * ELEMENT_SIZES[self.state_dtype]

    def conv_nbytes(self, element_size: int) -> int:
        return (self.conv_kernel - 1) * self.conv_size * element_size

    def nbytes(self, tokens: int, element_size: int) -> int:
        """Bytes held after any number of tokens; `element_size` bytes a number of the convolution's inputs."""
        return self.state_nbytes + self.conv_nbytes(element_size)


MemorySpec = AttentionSpec | RecurrentSpec
