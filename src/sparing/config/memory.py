"""What one layer must remember about a sequence, stated without tensors. Never imports torch."""

from __future__ import annotations

from dataclasses import dataclass

from sparing.config.codes import CodeFormat
from sparing.config.entry_formats import DEEPSEEK_V4, EntryFormat

__all__ = [
    "AttentionSpec", "CompressedSpec", "Indexer", "MemorySpec", "RecurrentSpec", "Rounds",
]  # fmt: skip

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


@dataclass(frozen=True)
class Indexer:
    """What chooses entries for a query (DeepSeek's lightning indexer): num_heads queries of head_dim numbers meet a key
    of each entry, and the topk entries of the highest scores are read."""

    num_heads: int
    head_dim: int
    topk: int


@dataclass(frozen=True)
class CompressedSpec:
    """Entries of one layer whose vectors are key and value in one, of which older ones stand for several tokens each.

    head_dim: of an entry, of which the last rope_dim numbers turn. window: the last tokens that a query sees as they
    are, its own included (0: none). ratio: tokens to a compressed entry; 0: there are none. is_overlapping: an entry is
    made of its own window and the one before. index: what chooses among compressed entries; None: all are read.
    value_dim: how many numbers of an entry are its value; None: all. released: how the release keeps entries; codes:
    the same once a policy says that they are kept so, None where they are numbers of the model's type.

    Beside entries, each compressor holds the softmax of the open window so far, per channel (largest logit, sum,
    weighted sum) in float32, however many tokens have come; one that overlaps also that of the next window.
    Source: DeepSeek-V4, arXiv 2606.19348, sparse and heavily compressed attention.
    """

    head_dim: int
    rope_dim: int
    window: int
    ratio: int = 0
    is_overlapping: bool = False
    index: Indexer | None = None
    value_dim: int | None = None
    released: EntryFormat = DEEPSEEK_V4
    codes: EntryFormat | None = None

    depends_on_cuts = False

    @property
    def is_compressed(self) -> bool:
        """Whether a compressor makes its entries, rather than each token leaving one as it is (no window, V3.2)."""
        return self.ratio > 0 and self.window > 0

    def window_entries(self, tokens: int) -> int:
        """Entries of single tokens held after `tokens` committed tokens."""
        return min(tokens, self.window)

    def entries(self, tokens: int) -> int:
        """Compressed entries held after `tokens` committed tokens: those of windows that are complete."""
        return tokens // self.ratio if self.ratio else 0

    def read_entries(self, tokens: int) -> int:
        """Compressed entries that a query reads after `tokens` tokens, its own included."""
        return self.entries(tokens) if self.index is None else min(self.entries(tokens), self.index.topk)

    def entry_nbytes(self, element_size: int) -> int:
        """Bytes of an entry, of a single token or compressed; `element_size` bytes a number that is not a code.

        This and `key_nbytes` raise ValueError for sizes that the release's formats do not take.
        """
        if self.codes is None:
            return self.head_dim * element_size
        return self.codes.entry_bytes(self.head_dim, self.rope_dim)

    def key_nbytes(self, element_size: int) -> int:
        """Bytes of the indexer's key of a compressed entry."""
        if self.index is None:
            return 0
        return self.index.head_dim * element_size if self.codes is None else self.codes.key_bytes(self.index.head_dim)

    @property
    def state_nbytes(self) -> int:
        """Bytes of the compressors' open windows, also where no token is in them."""
        if not self.is_compressed:
            return 0
        channels = self.head_dim + (0 if self.index is None else self.index.head_dim)
        return 4 * 3 * channels * (2 if self.is_overlapping else 1)

    def nbytes(self, tokens: int, element_size: int) -> int:
        """Bytes held after `tokens` committed tokens."""
        entry = self.entry_nbytes(element_size)
        held = self.window_entries(tokens) * entry + self.entries(tokens) * (entry + self.key_nbytes(element_size))
        return held + self.state_nbytes


MemorySpec = AttentionSpec | RecurrentSpec | CompressedSpec
