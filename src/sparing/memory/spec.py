"""What one layer must remember about a sequence, stated without tensors. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["AttentionSpec", "MemorySpec"]


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


MemorySpec = AttentionSpec
