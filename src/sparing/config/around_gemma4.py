"""Configs around the text stack of a Gemma 4: what they say of themselves is what the stack says. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparing.config.gemma4 import Gemma4Config, Gemma4Layer
from sparing.config.memory import AttentionSpec
from sparing.config.rope import RopeParameters

__all__ = ["AroundGemma4"]


@dataclass(frozen=True)
class AroundGemma4:
    """text: the stack; unknown: what config.json says around and in it and nothing reads."""

    text: Gemma4Config
    unknown: Mapping[str, Any]

    @property
    def hidden_size(self) -> int:
        return self.text.hidden_size

    @property
    def vocab_size(self) -> int:
        return self.text.vocab_size

    @property
    def layers(self) -> tuple[Gemma4Layer, ...]:
        return self.text.layers

    @property
    def num_hidden_layers(self) -> int:
        return self.text.num_hidden_layers

    @property
    def num_attention_heads(self) -> int:
        return self.text.num_attention_heads

    @property
    def num_experts(self) -> int:
        return self.text.num_experts

    @property
    def top_k_experts(self) -> int:
        return self.text.top_k_experts

    @property
    def max_position_embeddings(self) -> int:
        return self.text.max_position_embeddings

    @property
    def final_logit_softcapping(self) -> float | None:
        return self.text.final_logit_softcapping

    @property
    def tie_word_embeddings(self) -> bool:
        return self.text.tie_word_embeddings

    @property
    def bos_token_id(self) -> int | None:
        return self.text.bos_token_id

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        return self.text.eos_token_ids

    @property
    def pad_token_id(self) -> int | None:
        return self.text.pad_token_id

    @property
    def refused_token_ids(self) -> tuple[int, ...]:
        return self.text.refused_token_ids

    @property
    def stored_dtype(self) -> str:
        return self.text.stored_dtype

    def mixers(self) -> tuple[str, ...]:
        return self.text.mixers()

    def memory_specs(self) -> list[AttentionSpec]:
        return self.text.memory_specs()

    def layer_ropes(self) -> list[RopeParameters | None]:
        """How each layer rotates its queries and keys; None: not at all."""
        return self.text.layer_ropes()
