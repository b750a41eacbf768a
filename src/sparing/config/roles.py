"""What each tensor of a model is for, and what follows from it. Never imports torch.

A config states the role of every tensor beside its shape (`config.tensors()`). Loading, packing, planning, casting and
training ask the role; a name says only where a tensor belongs.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

__all__ = [
    "BIAS", "COMPRESSOR", "CONSTANT", "CONV", "CORRECTION", "DECAY", "DOWN", "DRAFTING_TABLE", "EMBEDDING", "EXPERTS",
    "HASH_TABLE", "HEAD", "HYPER_CONNECTION", "HYPER_GATE", "KEY", "KINDS", "LATENT_IN", "LATENT_OUT", "LOOKUP",
    "MATRIX", "MIXED_TABLE", "NORM", "OUTPUT", "POSITION_BIAS", "PROJECTIONS", "QK_NORM", "QUERY", "ROLES", "ROUTER",
    "SCALE", "SELF_CONDITIONING", "SELF_CONDITIONING_NORM", "SELF_CONDITIONING_UP", "SINK", "STATE", "TIED_TABLE",
    "TIME_STEP", "UP", "VALUE", "Role", "Shape", "Stacked", "Tensors", "layer_of",
]  # fmt: skip

# What a forward pass does with a tensor decides the kind that a plan counts it under:
#   matrices           multiplied for every token
#   vectors            norms, biases, router scales
#   float32            vectors and tables that stay in float32
#   experts            multiplied for top_k of num_experts
#   embedding          looked up by id; read in full where it also is the head
#   head               an output head of its own
#   lookup             per-layer embedding table: looked up only, can live outside the accelerator
#   self_conditioning  runs in denoising passes only
KINDS: tuple[str, ...] = (
    "matrices", "vectors", "float32", "experts", "embedding", "head", "lookup", "self_conditioning",
)  # fmt: skip


@dataclass(frozen=True)
class Role:
    """kind: one of `KINDS`; None: a constant of the file, which released parameter counts leave out. is_packable: may
    be held in a packed format; is_float32: is so whatever type the model has; is_looked_up: read row by row, by id;
    is_head: logits are products with it; is_fused: engines make one matrix of those of its module that are;
    is_residual: what it yields is added to the residual stream; is_map: a matrix that maps what a token holds, though
    never a packed one."""

    name: str
    kind: str | None
    is_packable: bool = False
    is_float32: bool = False
    is_looked_up: bool = False
    is_head: bool = False
    is_fused: bool = False
    is_residual: bool = False
    is_map: bool = False

    @property
    def is_matrix(self) -> bool:
        """Whether it is a matrix inside the model that tokens are multiplied with, or a stack of them."""
        return self.is_packable and not self.is_head

    @property
    def is_orthogonalised(self) -> bool:
        """Whether Muon trains it, where that is chosen: matrices between features; not tables, vectors or filters."""
        return self.is_matrix or self.is_map

    @property
    def is_tied(self) -> bool:
        """Whether it is one table for embedding and head, which files may store under either name."""
        return self.is_head and self.kind == "embedding"


QUERY = Role("query projection", "matrices", is_packable=True, is_fused=True)
KEY = Role("key projection", "matrices", is_packable=True, is_fused=True)
VALUE = Role("value projection", "matrices", is_packable=True, is_fused=True)
OUTPUT = Role("output projection", "matrices", is_packable=True, is_residual=True)  # of attention, or of a Mamba layer
UP = Role("up projection", "matrices", is_packable=True, is_fused=True)  # of an MLP; its gate too
DOWN = Role("down projection", "matrices", is_packable=True, is_residual=True)
LATENT_IN = Role("latent input", "matrices", is_packable=True)  # to the width that routed experts work in
LATENT_OUT = Role("latent output", "matrices", is_packable=True, is_residual=True)
MATRIX = Role("matrix", "matrices", is_packable=True)  # any other
EXPERTS = Role("experts", "experts", is_packable=True)  # a stack, the first dimension counts them
ROUTER = Role("router", "matrices", is_map=True)  # chooses between experts, or clusters of tokens, in full precision
CONV = Role("convolution", "matrices")
COMPRESSOR = Role("compressor", "matrices", is_map=True)  # makes entries of windows, or weighs an indexer's heads
HYPER_CONNECTION = Role("hyper-connection", "matrices", is_float32=True, is_map=True)  # from streams to what mixes them
NORM = Role("norm", "vectors")
QK_NORM = Role("query or key norm", "vectors")
SCALE = Role("scale", "vectors")  # of a router's inputs and outputs
BIAS = Role("bias", "vectors")

EMBEDDING = Role("embedding", "embedding", is_looked_up=True)
HEAD = Role("head", "head", is_packable=True, is_head=True)
TIED_TABLE = Role("tied table", "embedding", is_packable=True, is_looked_up=True, is_head=True)
# The same where predictions are mixed from the table too, by products that want it dense.
MIXED_TABLE = Role("mixed table", "embedding", is_looked_up=True, is_head=True)
# A drafter's: what goes in are the target's embeddings, and a clustered head reads few rows of it.
DRAFTING_TABLE = Role("drafting table", "embedding", is_head=True)
LOOKUP = Role("lookup", "lookup", is_looked_up=True)

DECAY = Role("decay", "float32", is_float32=True)  # of a recurrence: what enters an exponential
TIME_STEP = Role("time step", "float32", is_float32=True)  # its bias
STATE = Role("state", "float32", is_float32=True)  # what stands by them
HYPER_GATE = Role("hyper-connection gate", "float32", is_float32=True)  # its base and scale
SINK = Role("attention sink", "float32", is_float32=True)  # a logit of each head without a value
POSITION_BIAS = Role("position bias", "float32", is_float32=True)  # of a compressor's gate, by place in the window
CORRECTION = Role("correction", None, is_float32=True)  # decides between experts
HASH_TABLE = Role("hash table", None, is_looked_up=True)  # the experts of each token id, whole numbers
CONSTANT = Role("constant", None)
SELF_CONDITIONING = Role("self-conditioning", "self_conditioning", is_packable=True)
SELF_CONDITIONING_UP = Role("self-conditioning up", "self_conditioning", is_packable=True, is_fused=True)
SELF_CONDITIONING_NORM = Role("self-conditioning norm", "self_conditioning")

ROLES = (
    QUERY, KEY, VALUE, OUTPUT, UP, DOWN, LATENT_IN, LATENT_OUT, MATRIX, EXPERTS, ROUTER, CONV,
    COMPRESSOR, HYPER_CONNECTION, NORM, QK_NORM, SCALE, BIAS, EMBEDDING, HEAD, TIED_TABLE, MIXED_TABLE, DRAFTING_TABLE,
    LOOKUP, DECAY, TIME_STEP, STATE, HYPER_GATE, SINK, POSITION_BIAS, CORRECTION, HASH_TABLE, CONSTANT,
    SELF_CONDITIONING, SELF_CONDITIONING_UP, SELF_CONDITIONING_NORM,
)  # fmt: skip

# What checkpoints of all families call the projections of attention and MLP.
PROJECTIONS = {
    "q_proj": QUERY, "k_proj": KEY, "v_proj": VALUE, "o_proj": OUTPUT, "gate_proj": UP, "up_proj": UP,
    "down_proj": DOWN,
}  # fmt: skip

Shape = tuple[int, ...]


class Stacked(Shape):
    """The shape of a matrix that is several independent ones above one another, `rows` of each, or of a stack of such:
    engines multiply with all at once, Muon takes each by itself."""

    rows: tuple[int, ...]

    def __new__(cls, rows: tuple[int, ...], columns: int, *stack: int) -> Stacked:
        shape = super().__new__(cls, (*stack, sum(rows), columns))
        shape.rows = rows
        return shape

    def __getnewargs__(self) -> tuple[object, ...]:  # for copies
        return self.rows, self[-1], *self[:-2]


Tensors = dict[str, tuple[Shape, Role]]  # by name


def layer_of(name: str) -> int | None:
    """Number of the layer that a tensor of a model belongs to; None for embedding, head and final norm."""
    match = re.search(r"\.layers\.(\d+)\.", name)
    return int(match[1]) if match else None
