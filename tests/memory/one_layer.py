"""A memory of one layer, told and asked directly what a forward pass would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sparing.config.memory import AttentionSpec
from sparing.config.policy import parse_policy
from sparing.kernels import KeysFromValues
from sparing.memory.plan import plan_memory
from sparing.memory.sequence import Memory
from sparing.memory.turboquant.key_bias import KeyBias


class OneLayer:
    """Stages in one go, which a forward does for all layers before the first of them writes."""

    def __init__(self, memory: Memory):
        self.memory = memory

    @property
    def _layer(self) -> Any:
        return self.memory.layers[0]

    @property
    def group(self) -> Any:
        return self.memory.groups[0]

    @property
    def spec(self) -> AttentionSpec:
        return self._layer.spec

    @property
    def length(self) -> int:
        return self.memory.length

    @property
    def held(self) -> int:
        return self._layer.held

    @property
    def nbytes(self) -> int:
        return self.memory.nbytes

    def stage(self, k: Tensor, v: Tensor) -> None:
        self.memory.stage(len(v))
        self._layer.write(k, v)

    def attend(self, q: Tensor, *, scale: float, causal: bool) -> Tensor:
        return self._layer.attend(q, scale=scale, causal=causal)

    def commit(self, n: int) -> None:
        self.memory.commit(n)

    def keep(self, index: Tensor) -> None:
        self.memory.keep({0: index})

    def read(self) -> tuple[Tensor, Tensor]:
        return self._layer.read()

    def entries(self) -> Tensor:
        return self._layer.entries()

    def state(self) -> dict[str, Tensor]:
        return self._layer.state()

    def fork(self) -> OneLayer:
        return OneLayer(self.memory.fork())


def one_layer(
    spec: AttentionSpec,
    kv: str = "dense",
    *,
    dtype: torch.dtype = torch.float32,
    keys_from_values: KeysFromValues | None = None,
    key_bias: KeyBias | None = None,
    **options: Any,
) -> OneLayer:
    """An empty memory of one attention layer under a policy."""
    plan = plan_memory(
        [spec],
        parse_policy(kv, options),
        dtype=dtype,
        device=torch.device("cpu"),
        keys_from_values=[keys_from_values],
        key_biases=[key_bias],
    )
    return OneLayer(plan.memory())
