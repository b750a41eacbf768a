"""What one layer must remember about a sequence, stated without tensors. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from sparing.config.codes import CodeFormat

__all__ = ["AttentionSpec", "MemorySpec", "RecurrentSpec", "Rounds"]

ELEMENT_SIZES = {"float32": 4, "bfloat16": 2, "float16": 2}


@dataclass(frozen=True)
class Rounds:
    """When a growing memory is cut back to `budget` entries (TriAttention), decided by integers alone.

    interval: tokens between rounds. trigger: "slack" waits until `interval` entries too many are held, "interval" for
    the sequence's length to pass a multiple of `interval`.
    """

    budget: int
    interval: int = 128
    trigger: str = "slack"

    def due(self, held: int, before: int, after: int) -> bool:
        """Whether `held` entries are cut back after a commit that took the sequence's length from before to after."""
        if self.trigger == "slack":
            return held >= self.budget + self.interval
        return held > self.budget and before // self.interval < after // self.interval

    def entries(self, tokens: int) -> int:
        """Entries held after `tokens` tokens committed one at a time after a prompt that fits the budget."""
        if tokens < self.first():
            return tokens
        return self.budget + (tokens - (self.budget if self.trigger == "slack" else 0)) % self.interval

    def first(self) -> int:
        """Tokens at which the first round comes."""
        if self.trigger == "slack":
            return self.budget + self.interval
        return (self.budget // self.interval + 1) * self.interval


@dataclass(frozen=True)
class AttentionSpec:
    """Keys and values of one attention layer.

    num_key_value_heads, head_dim: shape of one entry.
    window: a query sees this many keys including its own, so `window - 1` entries are kept; None: all.
    shared_with: index of the layer whose entries this one reads; it then stores nothing itself.
    value_only: keys follow from values (K = V projections), so only values are stored.
    rounds: when entries in between are forgotten; the positions of those that stayed are then kept beside them.
    codes: how entries are quantised (a layer with a window keeps them as they are).
    """

    num_key_value_heads: int
    head_dim: int
    window: int | None = None
    shared_with: int | None = None
    value_only: bool = False
    rounds: Rounds | None = None
    codes: CodeFormat | None = None

    @property
    def depends_on_cuts(self) -> bool:
        """Whether what is held, or read, differs with how tokens were cut into passes and commits, apart from rounding:
        entries are forgotten after a commit, of one token or of several."""
        return self.rounds is not None or (self.codes is not None and self.codes.depends_on_cuts)

    def entries(self, tokens: int) -> int:
        """Entries held after `tokens` committed tokens."""
        if self.shared_with is not None:
            return 0
        if self.rounds is not None:
            return self.rounds.entries(tokens)
        return tokens if self.window is None else min(tokens, self.window - 1)

    def nbytes(self, tokens: int, element_size: int) -> int:
        """Bytes held after `tokens` committed tokens; `element_size` bytes a number that is not a code."""
        tensors = 1 if self.value_only else 2
        held, entry = self.entries(tokens), tensors * self.head_dim * element_size
        total = held * entry
        if self.codes is not None and self.window is None and (coded := held - self.exact(tokens)) > 0:
            code = self.codes.entry_nbytes(self.head_dim, value_only=self.value_only)
            total += coded * (code - entry) + self.codes.outlier_nbytes(self.head_dim, value_only=self.value_only)
        if self.rounds is not None and tokens >= self.rounds.first():
            total += 4 * min(held, self.rounds.budget)  # positions of what the last round kept
        return total * self.num_key_value_heads

    def decoded_nbytes(self, tokens: int, canvas: int, element_size: int) -> int:
        """Bytes held in addition while `canvas` tokens after `tokens` committed ones are denoised: decoded codes."""
        held = self.entries(tokens)
        if self.codes is None or self.window is not None or held <= self.exact(tokens):
            return 0
        return 2 * self.num_key_value_heads * (held + canvas) * self.head_dim * element_size

    def exact(self, tokens: int) -> int:
        """Entries that are not codes after `tokens` committed tokens."""
        assert self.codes is not None
        newest = self.codes.exact(tokens)
        if self.rounds is not None and tokens >= self.rounds.first():
            # A round leaves `window` of the newest as they are; those that came after it follow the rule.
            newest = min(newest, self.codes.window + self.entries(tokens) - self.rounds.budget)
        return newest + min(tokens, self.codes.sink_tokens)


@dataclass(frozen=True)
class RecurrentSpec:
    """State of one Mamba-2 layer: as large for one token as for a million.

    num_heads, head_dim, state_size: shape of the state; num_groups: of B and C, which the convolution also covers;
    conv_kernel: taps of the convolution, of which the inputs of all but the last are kept.
    state_dtype: "float32", "bfloat16" or "float16"; state_rounding: "stochastic" or "nearest", of a 16-bit state;
    state_seed: of stochastic rounding.
    """

    num_heads: int
    head_dim: int
    state_size: int
    num_groups: int
    conv_kernel: int
    state_dtype: str = "float32"
    state_rounding: str = "stochastic"
    state_seed: int = 0

    @property
    def depends_on_cuts(self) -> bool:
        """As in `AttentionSpec`: a 16-bit state is rounded once a commit, however many tokens that keeps."""
        return self.state_dtype != "float32"

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
