"""Rotary embedding parameters, in every spelling that config.json files use."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from sparing.config.fields import Fields

__all__ = ["RopeParameters"]

ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "proportional")


@dataclass(frozen=True)
class RopeParameters:
    """Which rotation frequencies a layer uses. Meaning of each field: `sparing.kernels.rope.inverse_frequencies`."""

    rope_type: str = "default"
    rope_theta: float = 10000.0
    partial_rotary_factor: float = 1.0
    factor: float = 1.0
    original_max_position_embeddings: int = 0  # positions the model was trained on before scaling
    beta_fast: float = 32.0  # yarn
    beta_slow: float = 1.0  # yarn
    attention_factor: float | None = None  # yarn; None: derived from factor
    mscale: float | None = None  # yarn
    mscale_all_dim: float | None = None  # yarn
    truncate: bool = True  # yarn
    low_freq_factor: float = 1.0  # llama3
    high_freq_factor: float = 4.0  # llama3

    @classmethod
    def parse(
        cls, raw: Mapping[str, Any] | None, *, theta: float, max_positions: int, file: str = "config.json"
    ) -> RopeParameters:
        """From a `rope_parameters` or `rope_scaling` object (None: plain rotation with `theta`).

        Raises CheckpointError for an unknown rope_type, a scaling without factor or a value of the wrong kind.
        """
        fields = Fields(raw or {}, f"{file}: rope_parameters")
        key = "type" if "type" in fields.raw and "rope_type" not in fields.raw else "rope_type"
        fields.ignore("type")
        if nested := next((name for name, value in fields.raw.items() if isinstance(value, Mapping)), None):
            raise fields.error(f"{nested} holds an object: this model has one rotation for all layers")
        rope_type = fields.choice(key, ROPE_TYPES, "default")
        original = fields.optional_integer("original_max_position_embeddings") or max_positions
        if rope_type == "dynamic":
            original = max_positions  # the only length that the reference looks at
        factor = fields.optional_number("factor")
        if factor is None and rope_type == "yarn":
            factor = max_positions / original
        if factor is None and rope_type in ("linear", "dynamic", "llama3"):
            raise fields.error(f"rope_type {rope_type!r} needs a factor")
        return cls(
            rope_type=rope_type,
            rope_theta=fields.number("rope_theta", theta),
            partial_rotary_factor=fields.number("partial_rotary_factor", 1.0),
            factor=1.0 if factor is None else factor,
            original_max_position_embeddings=original,
            beta_fast=fields.optional_number("beta_fast") or 32.0,
            beta_slow=fields.optional_number("beta_slow") or 1.0,
            attention_factor=fields.optional_number("attention_factor"),
            mscale=fields.optional_number("mscale"),
            mscale_all_dim=fields.optional_number("mscale_all_dim"),
            truncate=fields.boolean("truncate", True),
            low_freq_factor=fields.number("low_freq_factor", 1.0),
            high_freq_factor=fields.number("high_freq_factor", 4.0),
        )
