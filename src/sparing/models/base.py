"""What every model offers, whatever its layers: logits, hidden states, memories."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, Self

import torch
from torch import Tensor

from sparing import kernels
from sparing.config.generation import named_ends
from sparing.config.policy import Budget, parse_policy
from sparing.config.protocol import ModelConfig
from sparing.config.roles import LOOKUP, QUERY, Tensors, layer_of
from sparing.errors import shown
from sparing.kernels import KeysFromValues
from sparing.kernels.vocabulary import VocabularyResult
from sparing.memory.digest import weights_digest
from sparing.memory.plan import MemoryPlan, plan_memory
from sparing.memory.sequence import Memory
from sparing.memory.triattention.pruner import make_pruner
from sparing.memory.turboquant.key_bias import KeyBias
from sparing.models.batch import RaggedBatch, Row
from sparing.models.drafting_head import DraftingHead
from sparing.models.layers import Network
from sparing.models.part import check_hidden, owners, part_of

if TYPE_CHECKING:
    from sparing.checkpoint.tokenizer import Tokenizer

__all__ = ["Batch", "LanguageModel", "RecurrentBatch"]


class Batch(Protocol):
    """What a forward needs to know of its rows. `RaggedBatch` serves decoding; training brings its own."""

    positions: Tensor  # int64 [tokens]

    @property
    def ids(self) -> Tensor:
        """int64 [tokens]"""
        ...

    @property
    def hidden(self) -> Tensor | None:
        """[tokens, H], what enters the first layer that runs; None: embeddings of the ids."""
        ...

    @property
    def lengths(self) -> Tensor:
        """int64 [tokens]: length of the text that each was given with, or up to itself where it was generated."""
        ...

    def attend(self, layer: int, q: Tensor, k: Tensor | None, v: Tensor | None, scale: float = 1.0) -> Tensor: ...

    def narrow(self) -> Tensor | None: ...


class RecurrentBatch(Batch, Protocol):
    """What a forward with recurrent layers needs on top."""

    def scan(self, layer: int, xbc: Tensor, dt: Tensor, weights: kernels.MambaWeights) -> Tensor: ...


class LanguageModel(Network):
    """Base of all architectures. `config` is the parsed config.json; `tokenizer` is None if the folder had none."""

    config: ModelConfig  # an architecture says which: it is set here alone, so theirs may be narrower
    tokenizer: Tokenizer | None = None
    path: Path | None = None  # of the checkpoint it was loaded from
    weights: str = "stored"  # as `sparing.load` was asked to keep matrices
    generation_config: dict[str, Any]

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.config = config
        self.generation_config = {}
        self._identities: dict[range, str] = {}  # of some layers
        self.drafting_heads: list[DraftingHead] = []  # the one in the file, once `load_drafting_head` has read it

    def tensors(self) -> Tensors:
        return self.config.tensors()

    @property
    def end_ids(self) -> tuple[int, ...]:
        """Ids that end a text: generation_config's, else config.json's, and the one that the tokenizer itself names."""
        stated = named_ends(self.generation_config)
        ids = self.config.eos_token_ids if stated is None else stated
        own = None if self.tokenizer is None else self.tokenizer.eos_id
        return tuple(dict.fromkeys(i for i in (*ids, own) if i is not None and i >= 0))

    def forward(self, batch: Batch, trace: list[Tensor] | None = None, layers: range | None = None) -> Tensor:
        """Hidden states [wanted tokens, H] after these layers (None: all), final-normed after the model's last.

        trace: collects what enters the first layer, and each layer's output. layers: as `check_layers` returns them.
        Gradients are followed where the batch's `attend` follows them.
        """
        raise TypeError(f"{type(self).__name__} does not define forward")

    def output_table(self) -> Tensor:
        """The output head: [V, H]."""
        raise TypeError(f"{type(self).__name__} does not define output_table")

    def collapsed(self, hidden: Tensor) -> Tensor:
        """What the output table multiplies, [..., H], of what `forward` returns."""
        return hidden

    def head(self, hidden: Tensor) -> Tensor:
        """float32 logits [..., V] of what `forward` returns: final-normed hidden states [..., H], or streams."""
        return self.product(self.collapsed(hidden))

    def product(self, collapsed: Tensor) -> Tensor:
        """float32 logits [..., V] of what the output table multiplies, [..., H]."""
        return kernels.linear(collapsed, self.output_table()).float()

    def predict(
        self, hidden: Tensor, temperature: Tensor, noise: Callable[[int], Tensor] | None, bias: Tensor | None
    ) -> VocabularyResult:
        """What canvases become, from final-normed hidden states [L, H]: see `DiffusionGemma.predict`."""
        raise TypeError(f"{type(self).__name__} has no canvas")

    def keys_from_values(self) -> list[KeysFromValues | None]:
        """Per layer, how keys follow from values; None where they do not."""
        return [None] * self.config.num_hidden_layers

    def key_biases(self) -> list[KeyBias | None]:
        """Per layer, the bias that its key projection adds before the rotation; None where there is none."""
        return [None] * self.config.num_hidden_layers

    @property
    def hidden_shape(self) -> tuple[int, ...]:
        """Of a token's hidden states between layers: (H,), or (streams, H)."""
        return (self.config.hidden_size,)

    @property
    def dtype(self) -> torch.dtype:
        return self.output_table().dtype

    @property
    def device(self) -> torch.device:
        return self.output_table().device

    @torch.inference_mode()
    def run(self, rows: Sequence[Row], layers: tuple[int, int] | None = None) -> Tensor:
        """Forward over rows: tokens are staged in each row's memory; commit or roll back is the caller's.

        layers: (a, b) runs layers a to b - 1, with rows whose memories are of these layers; from a > 0 rows bring
        hidden states. None: all layers.
        Returns hidden states [sum of wanted, H], final-normed after the last layer. If anything raises, no memory has
        changed. Raises ValueError for a memory that still has staged tokens, is in two rows, of another model or of
        other layers.
        """
        part = self.check_layers(layers)
        for row in rows:
            self.check_memory(row.memory, part)
            if row.hidden is not None or part is not None:
                self._check_start(row, part)
        batch = RaggedBatch(rows)
        try:
            return self.pass_over(batch, part)
        except BaseException:
            batch.rollback()
            raise

    def pass_over(self, batch: RaggedBatch, layers: range | None = None) -> Tensor:
        """The forward that suits what the rows of a batch are; returns as `run`."""
        return self.forward(batch, layers=layers)

    def run_layers(
        self,
        layers: tuple[int, int],
        tokens: Sequence[int] | Tensor | None = None,
        *,
        hidden: Tensor | None = None,
        memory: Memory | None = None,
        prompt: bool | None = None,
    ) -> Tensor:
        """Hidden states [T, H] of T tokens after layers a to b - 1 of layers = (a, b), to be changed as one likes.

        After the model's last layer they are final-normed: `head` makes logits of them. Running (0, a) and then
        (a, b) is running (0, b), with native kernels to the bit.
        tokens: ids [T], where the layers start from embeddings or read ids themselves (Gemma 4's per-layer inputs).
        hidden: [T, H] in the model's dtype, what enters layer a in place of embeddings. memory: of
        `memory(layers=...)`, what came before; the tokens are appended and committed. prompt: as in `logits`.
        Raises ValueError for layers that are not there or read entries of a layer outside of them, for hidden states
        of another shape or type, a memory of other layers, and as `logits` does.
        """
        memory = self.memory(layers=layers) if memory is None else memory
        row = Row(None if tokens is None else self.check_tokens(tokens, memory), memory, hidden=hidden)
        self._check_start(row, self.check_layers(layers))
        return self._append(row, prompt, layers).clone()

    def logits(
        self, tokens: Sequence[int] | Tensor, memory: Memory | None = None, *, prompt: bool | None = None
    ) -> Tensor:
        """float32 logits [T, V] for each of T tokens.

        tokens: ids, a sequence or int tensor [T]. memory: what came before; the tokens are appended and committed.
        prompt: whether they were given or generated, which a memory with a budget wants to know (None: given if the
        memory is empty). Raises ValueError for no tokens, ids out of range, more tokens than the model's context, or a
        prompt that does not fit the memory's budget.
        """
        row = Row(self.check_tokens(tokens, memory), self.memory() if memory is None else memory)
        return self._append(row, prompt, None, self.head)

    def _append(
        self,
        row: Row,
        prompt: bool | None,
        layers: tuple[int, int] | None,
        then: Callable[[Tensor], Tensor] = lambda hidden: hidden,
    ) -> Tensor:
        """Run a row and commit it; what `then` makes of its hidden states."""
        prompt = row.memory.length == 0 if prompt is None else prompt
        if prompt:
            row.memory.check_prompt(row.size)
        try:
            with torch.inference_mode():
                found = then(self.run([row], layers))
            row.memory.commit(row.size, prompt=prompt)
        except BaseException:
            row.memory.rollback()  # the head may fail too: its logits are the largest tensor of all
            raise
        return found

    @torch.inference_mode()
    def hidden_states(self, tokens: Sequence[int] | Tensor) -> list[Tensor]:
        """L + 1 tensors [T, H]: the stack's input, then the output of each layer, before the final norm."""
        trace: list[Tensor] = []
        self.forward(RaggedBatch([Row(self.check_tokens(tokens), self.memory())]), trace)
        return trace

    def memory(self, kv: str = "dense", *, layers: tuple[int, int] | None = None, **options: Any) -> Memory:
        """An empty memory for one sequence.

        kv, options: the policy, as in `sparing.config.policy`, of the whole model. layers: (a, b), of which part of the
        model it is; None: of all. Raises ValueError for an unknown policy or option, and as `check_layers` does.
        """
        return self.memory_plan(kv, layers=layers, **options).memory()

    def memory_plan(self, kv: str = "dense", *, layers: tuple[int, int] | None = None, **options: Any) -> MemoryPlan:
        """A memory policy prepared for this model; `memory()` of it is empty, for one sequence, and costs allocations.

        kv, layers, options: as in `memory`, which raises the same.
        """
        policy, part = parse_policy(kv, options), self.check_layers(layers)
        pruner = None
        if isinstance(policy.keep, Budget):
            weights = self.query_weights()
            pruner = make_pruner(self.config, policy, weights=weights, device=self.device, remembered=part)
        return plan_memory(
            self.config.memory_specs(),
            policy,
            dtype=self.dtype,
            device=self.device,
            keys_from_values=self.keys_from_values(),
            key_biases=self.key_biases(),
            pruner=pruner,
            model=self.identity if part is None else self._identity_of(part),
            layers=part,
        )

    def query_weights(self) -> str:
        """A digest of the query projections, packed or not: differs between fine-tunes of one model."""
        return weights_digest((part, tensor) for _, role, part, tensor in self.parts() if role is QUERY)

    @cached_property
    def entries_digest(self) -> str:
        """Of all that entries depend on: weights (a head of its own makes none), rotations and geometry."""
        return self._digest(range(self.config.num_hidden_layers))

    def _digest(self, layers: range) -> str:
        """Of all that entries of some layers depend on, beside what enters these: where that is made of token ids, or
        ids are read on the way, also what stands outside of all layers."""
        config, part = self.config, slice(layers.start, layers.stop)
        facts = config.model_type, config.hidden_size, config.memory_specs()[part], config.layer_ropes()[part]
        reads_ids = layers.start == 0 or any(role is LOOKUP for _, role in self.tensors().values())
        weights = (
            (part, tensor)
            for name, role, part, tensor in self.parts()
            if role
            and role.kind not in (None, "head")
            and (reads_ids if (layer := layer_of(name)) is None else layer in layers)
        )
        return hashlib.sha256(f"{facts}{weights_digest(weights)}".encode()).hexdigest()[:16]

    @cached_property
    def identity(self) -> str:
        """What tells apart whose entries a memory holds: the digest of what makes them, and their type."""
        return f"{self.entries_digest} in {self._type}"

    def _identity_of(self, part: range) -> str:
        """The same of some layers, whatever the weights of the others."""
        if (found := self._identities.get(part)) is None:
            found = f"{self._digest(part)} in {self._type}, layers {part.start, part.stop}"
            self._identities[part] = found
        return found

    @property
    def _type(self) -> str:
        return str(self.dtype).removeprefix("torch.")

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        self.__dict__.pop("identity", None)  # of another type, perhaps
        self._identities.clear()
        for head in self.drafting_heads:
            head._apply(fn)
        return super()._apply(fn, recurse)

    def check_memory(self, memory: Memory, layers: range | None = None) -> None:
        """Raises ValueError for a memory of another model, or of other layers: its entries mean nothing to these."""
        identity = self.identity if layers is None else self._identity_of(layers)
        if memory.model is not None and memory.model != identity:
            ours = "" if layers is None else f"layers={layers.start, layers.stop}"
            raise ValueError(
                "the memory is of another model, of other weights, another type or other layers of this one"
                f" ({memory.model}, here {identity}): make one with model.memory({ours})"
            )

    def check_layers(self, layers: tuple[int, int] | None) -> range | None:
        """Layers a to b - 1 of (a, b); None for all of them.

        Raises ValueError for what is no such pair, and where one of them reads the entries of a layer before them.
        """
        return None if layers is None else part_of(layers, self._owners)

    @cached_property
    def _owners(self) -> list[int]:
        return owners(self.config.memory_specs())

    def load_memory(
        self, path: str | Path, kv: str = "dense", *, layers: tuple[int, int] | None = None, **options: Any
    ) -> Memory:
        """Read a memory written by `memory.save(path)`.

        kv, layers, options: as in `memory`. Raises CheckpointError if another model, layers or policy made it.
        """
        from sparing.memory.snapshot import load_memory

        memory = self.memory(kv, layers=layers, **options)
        load_memory(path, memory)
        return memory

    def check_tokens(
        self, tokens: Iterable[int] | Tensor, memory: Memory | None = None, *, is_canvas: bool = False
    ) -> Tensor:
        """Ids as int64 [T] on the model's device; raises ValueError saying what is wrong with them.

        is_canvas: noise may hold any id; text may not hold those that stand for an image, sound or video.
        """
        try:
            ids = torch.as_tensor(tokens if isinstance(tokens, Tensor) else list(tokens), device=self.device)
        except (TypeError, ValueError, RuntimeError) as error:
            raise ValueError(f"tokens are {shown(tokens)}: use a list or tensor of ids") from error
        if ids.ndim != 1 or ids.numel() == 0:
            raise ValueError(f"tokens must be a non-empty list of ids, found shape {list(ids.shape)}")
        if ids.is_floating_point() or ids.dtype == torch.bool:
            raise ValueError(f"tokens must be integers, found {ids.dtype}")
        ids = ids.long()
        if bad := [i for i in (int(ids.min()), int(ids.max())) if not 0 <= i < self.config.vocab_size]:
            raise ValueError(f"token id {bad[0]} is out of range: the vocabulary has {self.config.vocab_size} entries")
        for refused in () if is_canvas else self.config.refused_token_ids:
            if (ids == refused).any():
                raise ValueError(f"token id {refused} stands for an image, sound or video: only text is supported")
        self._check_context(len(ids), memory)
        return ids

    def _check_start(self, row: Row, layers: range | None) -> None:
        """Raises ValueError unless a row brings what these layers start from."""
        if row.hidden is not None:
            check_hidden(row, self.hidden_shape, self.dtype, self.device)
            self._check_context(row.size, row.memory)
        elif layers is not None and layers.start:
            raise ValueError(f"layer {layers.start} starts from what layer {layers.start - 1} returned: give hidden")
        elif row.tokens is None:
            raise ValueError("there is nothing to run: give tokens or hidden")

    def _check_context(self, tokens: int, memory: Memory | None) -> None:
        total = tokens + (memory.length if memory is not None else 0)
        if total > self.config.max_position_embeddings:
            context = self.config.max_position_embeddings
            raise ValueError(f"{total} tokens do not fit the model's context of {context}: shorten the prompt")
