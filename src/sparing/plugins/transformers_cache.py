"""TurboQuant and TriAttention for people who stay with transformers: caches to pass as `past_key_values`.

    cache = TurboQuantCache(model, bits=4)
    model.generate(**inputs, past_key_values=cache)

A cache holds one of our memories for each row of the batch. It keeps the layers with full attention; all others stay
transformers' own. A forward stages its keys and values and is given what the memory holds, decoded: attention there
wants dense tensors, so what is saved is the memory between steps. The next forward commits what was staged, which is
when entries become codes or are forgotten; until then `crop` can take it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING, Cache, CacheLayerMixin, get_layer_types_and_kwargs

from sparing.config import parse_config
from sparing.config.gemma4 import Gemma4Config
from sparing.config.memory import AttentionSpec
from sparing.config.policy import Budget, Policy, parse_policy
from sparing.errors import CheckpointError
from sparing.kernels import KeysFromValues
from sparing.memory.digest import weights_digest
from sparing.memory.plan import plan_memory
from sparing.memory.sequence import Memory
from sparing.memory.triattention.pruner import Pruner, make_pruner
from sparing.memory.triattention.statistics import Statistics
from sparing.plugins.key_biases import key_biases

__all__ = ["TriAttentionCache", "TurboQuantCache"]


class MemoryLayer(CacheLayerMixin):
    """A layer whose entries our memories hold, one a row."""

    is_sliding = False
    supports_early_init = False  # the memories are made from the first keys

    def __init__(self, cache: MemoryCache, layer: int):
        super().__init__()
        self._cache, self._layer = cache, layer
        self.tokens = 0  # columns of the batch ever given, padding included

    @property
    def is_croppable(self) -> bool:  # type: ignore[override]
        return not self._cache.prunes

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._cache.start(key_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """key_states, value_states: [rows, kv_heads, T, d]. Returns all that the new queries see, padding as zeros."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.tokens > self._cache.committed:
            self._cache.settle()
        self._cache.check(self._layer, key_states, value_states)
        rows = []
        for memory, pad, k, v in zip(self._cache.memories, self._cache.padding, key_states, value_states, strict=True):
            first, layer = min(max(0, pad - self.tokens), k.shape[1]), memory.layers[self._layer]
            assert layer is not None
            if self._cache.is_first(self):
                memory.stage(k.shape[1] - first)
            layer.write(k[:, first:].transpose(0, 1), v[:, first:].transpose(0, 1))
            rows.append(layer.read())
        self.tokens += key_states.shape[2]
        keys, values = zip(*rows, strict=True)
        return _stacked(keys, key_states), _stacked(values, value_states)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys there will be, and by how much the position of the first is moved so that the new ones stand right."""
        self._cache.settle()
        layer = self._cache.memories[0].layers[self._layer] if self.is_initialized else None
        forgotten = 0 if layer is None else layer.length - layer.held
        return self.tokens - forgotten + query_length, forgotten

    def get_seq_length(self) -> int:
        return self.tokens

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.tokens, self.is_initialized = 0, False

    def offload(self) -> None:
        raise ValueError(f"{type(self._cache).__name__} cannot be offloaded: leave offloading out")


def _stacked(parts: Sequence[Tensor], like: Tensor) -> Tensor:
    """[heads, n, d] of each row -> [rows, heads, most, d] in the type of `like`, with zeros before shorter rows."""
    most = max(part.shape[1] for part in parts)
    return torch.stack([nn.functional.pad(part.to(like.dtype), (0, 0, most - part.shape[1], 0)) for part in parts])


class MemoryCache(Cache):
    """What the two caches share: rows of our memories under a policy `kv` with its options.

    memories: one for each row once something is cached, with `entries(layer)`; of the newest tokens they know after the
    forward that follows. attention_mask: [rows, T] of the prompt, needed for more than one row: padding, on the left,
    is not remembered.
    """

    def __init__(self, model: PreTrainedModel, kv: str, attention_mask: Tensor | None, options: dict[str, Any]):
        self._policy = _with_exact_prefill(parse_policy(kv, options), options)
        config = model.config.get_text_config(decoder=True)
        self._specs: list[AttentionSpec | None] = []
        layers: list[Any] = []
        described = zip(*get_layer_types_and_kwargs(config), config.per_layer_config, strict=True)
        for i, (kind, settings, layer) in enumerate(described):
            ours = kind == "full_attention"
            self._specs.append(_spec(layer) if ours else None)
            layers.append(MemoryLayer(self, i) if ours else DYNAMIC_LAYER_TYPE_MAPPING[kind](**settings))
        if not any(self._specs):
            raise ValueError(f"no layer of {type(model).__name__} grows without bound: use transformers' own cache")
        self._biases = key_biases(model, config, self._specs)
        self._keys_from_values = _keys_from_values(model, config, self._specs)
        self._specs = [
            spec if spec is None or rebuild is None else replace(spec, value_only=True)
            for spec, rebuild in zip(self._specs, self._keys_from_values, strict=True)
        ]
        self._pruner = _pruner(model, config, self._policy)
        self._pads = None if attention_mask is None else _padding(attention_mask)
        if self.prunes and len(set(self._pads or [0])) > 1:
            raise ValueError(
                "the prompts of a batch differ in length: once entries are forgotten, no mask of transformers can say"
                " which are padding; batch prompts of one length, or use sparing.generate, which needs no padding"
            )
        super().__init__(layers=layers)
        self._clear()

    def _clear(self) -> None:
        self.memories: list[Memory] = []
        self.padding: list[int] = []  # of each row
        self.committed = 0  # columns of the batch

    @property
    def prunes(self) -> bool:
        return isinstance(self._policy.keep, Budget)

    @property
    def evictions(self) -> list[dict[str, int]]:
        """Every round in which entries were forgotten: the same in all rows, see `memory.triattention.pruner`."""
        return self.memories[0].evictions if self.memories else []

    @property
    def nbytes(self) -> int:
        """Bytes of all entries, in transformers' own layers too."""
        tensors = [getattr(layer, name, None) for layer in self._theirs() for name in ("keys", "values")]
        return sum(memory.nbytes for memory in self.memories) + sum(x.nbytes for x in tensors if x is not None)

    def start(self, keys: Tensor) -> None:
        """Make the memories, of the type and on the device of the first keys."""
        if self.memories:
            return
        rows = len(keys)
        if self._pads is None and rows > 1:
            raise ValueError(
                f"the batch has {rows} rows: pass attention_mask= of the prompt, which says what is padding"
            )
        pads = self._pads or [0]
        if rows % len(pads):
            raise ValueError(f"attention_mask has {len(pads)} rows, the batch has {rows}: pass that of the prompt")
        self.padding = [pad for pad in pads for _ in range(rows // len(pads))]
        plan = plan_memory(
            self._specs,
            self._policy,
            dtype=keys.dtype,
            device=keys.device,
            keys_from_values=self._keys_from_values,
            key_biases=self._biases,
            pruner=self._pruner,
        )
        self.memories = [plan.memory() for _ in range(rows)]

    def check(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Raises ValueError for what cannot be staged."""
        spec = self._specs[layer]
        assert spec is not None
        rows, heads, new, d = keys.shape
        if rows != len(self.padding):
            raise ValueError(f"the cache holds {len(self.padding)} rows, the batch has {rows}: make a cache for each")
        if (heads, d) != (spec.num_key_value_heads, spec.head_dim) or values.shape != keys.shape:
            raise ValueError(
                f"layer {layer} gives keys {list(keys.shape)} and values {list(values.shape)}, expected"
                f" {spec.num_key_value_heads} heads of {spec.head_dim} for both: use transformers' own cache"
            )
        if self._is_prompt(new):
            for memory in self.memories:
                memory.check_prompt(new)

    def is_first(self, layer: MemoryLayer) -> bool:
        """Whether a layer is the first that a forward reaches."""
        return layer is self._ours()[0]

    def _is_prompt(self, new: int) -> bool:
        """Forwards of one token follow a prompt; all others are one, or part of one."""
        return new > 1 or self.committed == 0

    def _ours(self) -> list[MemoryLayer]:
        return [layer for layer in self.layers if isinstance(layer, MemoryLayer)]

    def _theirs(self) -> list[Any]:
        return [layer for layer in self.layers if not isinstance(layer, MemoryLayer)]

    def settle(self, *, without: int = 0) -> None:
        """Commit what the forward before left, without its last tokens."""
        ours = self._ours()
        tokens = ours[0].tokens
        if any(layer.tokens != tokens for layer in ours):
            raise ValueError("a forward stopped half-way through the layers: start again with a new cache")
        if tokens == self.committed:
            return
        prompt = self._is_prompt(tokens - self.committed)
        for memory in self.memories:
            memory.commit(max(0, memory.staged - without), prompt=prompt)
        self.committed = tokens - without
        for layer in ours:
            layer.tokens = self.committed

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens of the last forward. tokens_to_remove: minus how many, as in transformers.

        Raises ValueError for more than that, and where entries are evicted.
        """
        last = self._ours()[0].tokens - self.committed
        if tokens_to_remove and self.prunes:
            self.activate_past_recording()
        if not -last <= tokens_to_remove <= 0:
            raise ValueError(
                f"cannot crop by {tokens_to_remove}: the {last} tokens of the last forward can be taken back (0 to"
                f" {-last}), those before are committed and may be codes"
            )
        self.settle(without=-tokens_to_remove)
        for layer in self._theirs():
            layer.crop(tokens_to_remove)

    def activate_past_recording(self) -> None:
        if self.prunes:
            raise ValueError(
                "an assistant's drafts cannot be told from a prompt, which is never evicted: generate without"
                " assistant_model and prompt_lookup_num_tokens, or use sparing.generate"
            )
        super().activate_past_recording()

    def reset(self) -> None:
        super().reset()
        self._clear()

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        self._take(beam_idx.tolist())
        for layer in self._theirs():
            layer.reorder_cache(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._take([row for row in range(len(self.memories)) for _ in range(repeats)])
        for layer in self._theirs():
            layer.batch_repeat_interleave(repeats)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._take(torch.arange(len(self.memories))[indices.cpu()].tolist())
        for layer in self._theirs():
            layer.batch_select_indices(indices)

    def _take(self, rows: list[int]) -> None:
        """Have these rows, some of them perhaps several times."""
        self.settle()
        # The first use of a row takes it over: a fork is copied when either side writes.
        self.memories = [
            self.memories[row] if row not in rows[:i] else self.memories[row].fork() for i, row in enumerate(rows)
        ]
        self.padding = [self.padding[row] for row in rows]


def _with_exact_prefill(policy: Policy, options: dict[str, Any]) -> Policy:
    if policy.store is None:
        return policy
    if options.get("prefill", "exact") != "exact":
        raise ValueError(
            f"prefill={options['prefill']!r} shows every query of a prompt other keys, transformers attends over one"
            " set of them: leave it out, or use sparing.generate"
        )
    return replace(policy, store=replace(policy.store, prefill="exact"))


def _spec(layer: Any) -> AttentionSpec:
    heads = layer.num_attention_heads
    kv_heads = getattr(layer, "num_key_value_heads", None) or heads
    return AttentionSpec(kv_heads, getattr(layer, "head_dim", None) or layer.hidden_size // heads)


def _keys_from_values(
    model: PreTrainedModel, config: PreTrainedConfig, specs: Sequence[AttentionSpec | None]
) -> list[KeysFromValues | None]:
    """Per layer, how keys follow from values where one projection makes both (Gemma 4): values alone are then held."""
    found: list[KeysFromValues | None] = [None] * len(specs)
    if not getattr(config, "attention_k_eq_v", False):
        return found
    try:
        ours = parse_config(config.to_dict())
    except CheckpointError:  # hold both
        return found
    if not isinstance(ours, Gemma4Config):
        return found
    decoder: Any = model.get_decoder()
    for i, layer in enumerate(ours.layers):
        if specs[i] is not None and layer.value_is_key and layer.is_producer:
            found[i] = KeysFromValues(decoder.layers[i].self_attn.k_norm.weight, ours.rope[layer.kind])
    return found


def _pruner(model: PreTrainedModel, config: PreTrainedConfig, policy: Policy) -> Pruner | None:
    if not isinstance(policy.keep, Budget):
        return None
    try:
        ours = parse_config(config.to_dict())
    except CheckpointError as error:
        raise ValueError(f"TriAttention has to know how the model rotates its keys: {error}") from None
    queries = (("", p) for name, p in model.get_decoder().named_parameters() if name.endswith("q_proj.weight"))
    return make_pruner(ours, policy, weights=weights_digest(queries), device=model.device)


def _padding(attention_mask: Tensor) -> list[int]:
    """How many tokens of padding stand before each row."""
    seen = attention_mask.bool()
    pads = seen.shape[1] - seen.sum(1)
    if not torch.equal(seen, torch.arange(seen.shape[1], device=seen.device) >= pads[:, None]):
        raise ValueError("attention_mask: padding must stand before the prompts, use tokenizer.padding_side='left'")
    return pads.tolist()


class TurboQuantCache(MemoryCache):
    """Entries of layers with full attention as codes of a few bits, in any model of transformers.

    bits: 1 to 8, 2.5 or 3.5, or "k4v3" for keys and values; options: those of "turboquant:N" (`config/policy.py`), of
    which prefill is "exact": tokens of the current forward are read exactly. Raises ValueError for what they refuse.
    """

    def __init__(
        self, model: PreTrainedModel, bits: float | str = 4, *, attention_mask: Tensor | None = None, **options: Any
    ):
        super().__init__(model, f"turboquant:{bits}", attention_mask, options)


class TriAttentionCache(MemoryCache):
    """At most `budget` entries of each layer with full attention: those that queries to come should look at most.

    statistics: of the model's queries, from `sparing calibrate`, or their file; bits: store what is kept as
    `TurboQuantCache` does; options: those of "triattention:N" (`config/policy.py`), and of "turboquant:N" with bits.
    Positions stay true: `get_seq_length()` counts tokens, not entries. Raises ValueError for what they refuse.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        budget: int,
        statistics: Statistics | str | Path,
        *,
        bits: float | str | None = None,
        attention_mask: Tensor | None = None,
        **options: Any,
    ):
        kv = f"triattention:{budget}" + ("" if bits is None else f"+turboquant:{bits}")
        super().__init__(model, kv, attention_mask, {"statistics": statistics, **options})
