"""TurboQuant and TriAttention for people who stay with transformers: caches to pass as `past_key_values`.

    cache = TriAttentionCache(model.config, 2048, "queries.safetensors")
    model.generate(**inputs, past_key_values=cache)

A cache holds one of our memories; layers with a sliding window stay transformers' own. A forward stages its keys and
values and attends over what the memory holds; the next forward commits them first, which is when entries become codes
or are forgotten. One sequence at a time: rows of a batch are padded, and padding cannot be told from here.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicSlidingWindowLayer

from sparing.config import parse_config
from sparing.memory.attention import AttentionMemory
from sparing.memory.policy import Budget, parse_policy
from sparing.memory.sequence import Memory, make_memory
from sparing.memory.spec import AttentionSpec
from sparing.memory.statistics import Statistics
from sparing.memory.triattention import make_pruner

__all__ = ["MemoryCache", "TriAttentionCache", "TurboQuantCache"]


class MemoryLayer(CacheLayerMixin):
    """A layer whose entries one of our memories holds."""

    is_sliding = False
    supports_early_init = False

    def __init__(self, cache: MemoryCache, layer: int):
        super().__init__()
        self._cache, self._layer = cache, layer

    @property
    def _memory(self) -> AttentionMemory | None:
        memory = self._cache.memory
        return None if memory is None else memory.layers[self._layer]  # type: ignore[return-value]

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self._cache.start(key_states)
        self.is_initialized = True

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """key_states, value_states: [1, kv_heads, T, d]; returns all that the new queries see."""
        if key_states.shape[0] != 1:
            raise ValueError(
                f"{type(self._cache).__name__} holds one sequence, the batch has {key_states.shape[0]}: generate one"
                " after another, without beams"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        memory = self._memory
        assert memory is not None
        if memory.staged:
            self._cache.settle()
        memory.stage(key_states[0].transpose(0, 1), value_states[0].transpose(0, 1))
        keys, values = memory.storage.read(memory.where())
        return keys[None].to(key_states.dtype), values[None].to(value_states.dtype)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Keys there will be, and by how much the position of the first is moved so that the new ones stand right."""
        self._cache.settle()
        memory = self._memory
        return (query_length, 0) if memory is None else (memory.held + query_length, memory.length - memory.held)

    def get_seq_length(self) -> int:
        memory = self._memory
        return 0 if memory is None else memory.length + memory.staged

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self._cache.memory = None
        self.is_initialized = False

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove:
            self._refuse("go back to fewer tokens: entries may be codes or forgotten; decode without an assistant")

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self._refuse("change rows: use num_beams=1")

    def batch_repeat_interleave(self, repeats: int) -> None:
        if repeats != 1:
            self._refuse("repeat rows: use num_return_sequences=1")

    def offload(self) -> None:
        self._refuse("be moved to another device")

    def _refuse(self, what: str) -> NoReturn:
        raise ValueError(f"{type(self._cache).__name__} cannot {what}")


class MemoryCache(Cache):
    """A transformers cache that keeps a sequence as a policy of ours says.

    config: of the model (Llama, Mistral, Qwen2, Qwen3, Gemma 4); kv, options: as of `model.memory`.
    memory: our memory once something is cached, with `nbytes`, `evictions` and `entries(layer)`; of the newest token
    it knows after the following forward. Raises ValueError for what the policy refuses.
    """

    def __init__(self, config: Any, kv: str, **options: Any):
        text = config.get_text_config(decoder=True)
        self._config = parse_config(text.to_dict())
        self._policy = parse_policy(kv, options)
        self.memory: Memory | None = None
        self._pruner(torch.device("cpu"))  # what it refuses is refused here
        specs = self._config.memory_specs()
        layers: list[Any] = []
        for i, spec in enumerate(specs):
            if not isinstance(spec, AttentionSpec):
                raise ValueError(f"layer {i} remembers more than keys and values: use transformers' own cache")
            if spec.shared_with is not None:
                break  # these layers come last and cache nothing
            layers.append(MemoryLayer(self, i) if spec.window is None else DynamicSlidingWindowLayer(spec.window))
        super().__init__(layers=layers)

    def start(self, keys: Tensor) -> None:
        """Make the memory, of the type and on the device of the first keys."""
        if self.memory is not None:
            return
        # Windows are transformers'; keys that follow from values would need the model's weights.
        specs = [
            None if spec.window is not None else replace(spec, value_only=False) for spec in self._config.memory_specs()
        ]
        none = [None] * len(specs)
        self.memory = make_memory(
            specs,
            self._policy,
            dtype=keys.dtype,
            device=keys.device,
            keys_from_values=none,
            key_biases=none,
            pruner=self._pruner(keys.device),
        )

    def settle(self) -> None:
        """Commit what the forward before left. Forwards of one token follow a prompt; all others are one."""
        memory = self.memory
        if memory is None or not memory.staged:
            return
        if len({layer.staged for layer in memory.own}) > 1:
            raise ValueError("a forward stopped half-way through the layers: start again with a new cache")
        memory.commit(memory.staged, prompt=memory.staged > 1 or memory.length == 0)

    def kv_len(self) -> int:
        """Entries held by a layer without a window; `get_seq_length()` counts tokens."""
        held = [layer.held + layer.staged for layer in self.memory.own] if self.memory is not None else []  # type: ignore[union-attr]
        return held[0] if held else 0

    def _pruner(self, device: torch.device) -> Any:
        if not isinstance(self._policy.keep, Budget):
            return None
        return make_pruner(self._config, self._policy, weights=None, device=device)


class TriAttentionCache(MemoryCache):
    """Keeps `budget` entries of each layer without a window, those that queries to come should look at most.

    statistics: of the model's queries (`sparing calibrate`), or their file; options: of "triattention:N", such as mode,
    interval, protect_prompt; also of "turboquant:B" where `bits` says how many the entries are stored in.
    """

    def __init__(
        self, config: Any, budget: int, statistics: Statistics | str | Path, *, bits: Any = None, **options: Any
    ):
        codes = "" if bits is None else f"+turboquant:{bits}"
        if bits is not None:
            options.setdefault("prefill", "exact")
        super().__init__(config, f"triattention:{budget}{codes}", statistics=statistics, **options)


class TurboQuantCache(MemoryCache):
    """Stores entries of layers without a window in few bits.

    bits: a number, or "k4v3" for keys and values; options: of "turboquant:B". Tokens of the current forward are read
    exactly (prefill="exact").
    """

    def __init__(self, config: Any, bits: Any = 4, **options: Any):
        options.setdefault("prefill", "exact")
        super().__init__(config, f"turboquant:{bits}", **options)
