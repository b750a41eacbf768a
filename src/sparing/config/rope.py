"""Rotary embedding parameters, in every spelling that config.json files use."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

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
        cls,
        fields: Fields,
        *,
        theta: float | None,
        max_positions: int,
        head_dim: int,
        original: int | None = None,
        partial: float = 1.0,
        shares: bool = False,
        types: Sequence[str] = ROPE_TYPES,
    ) -> RopeParameters:
        """From a `rope_parameters` or `rope_scaling` object (an empty one: plain rotation with `theta`).

        theta, partial: where the object has none (theta None: it must have one); original: positions before scaling
        as stated beside the object, which "llama3" and "yarn" prefer; shares: whether every type may turn a share of a
        head; types: those that the model can turn by.
        Raises CheckpointError for another rope_type, a scaling without factor or a value of the wrong kind.
        """
        if nested := next((name for name, value in fields.raw.items() if isinstance(value, Mapping)), None):
            raise fields.error(f"{nested} holds an object: this model has one rotation for all layers")
        key = "type" if "type" in fields.raw and "rope_type" not in fields.raw else "rope_type"
        fields.ignore("type")
        rope_type = fields.choice(key, types, "default")
        within = fields.optional_integer("original_max_position_embeddings")
        if rope_type in ("llama3", "yarn"):
            within = original or within
        elif rope_type == "dynamic":
            within = None  # the reference looks at max_position_embeddings alone
        within = within or max_positions
        factor = fields.optional_number("factor", above=0.0)
        if factor is None and rope_type == "yarn":
            factor = max_positions / within
        if factor is None and rope_type in ("linear", "dynamic", "llama3"):
            raise fields.error(f"rope_type {rope_type!r} needs a factor")
        low, high = (fields.optional_number(f"{end}_freq_factor", above=0.0) for end in ("low", "high"))
        rope = cls(
            rope_type=rope_type,
            rope_theta=fields.number("rope_theta", *(() if theta is None else (theta,)), above=0.0),
            partial_rotary_factor=_share(fields, rope_type, head_dim, partial, shares),
            factor=1.0 if factor is None else factor,
            original_max_position_embeddings=within,
            beta_fast=fields.optional_number("beta_fast", above=0.0) or 32.0,
            beta_slow=fields.optional_number("beta_slow", above=0.0) or 1.0,
            attention_factor=fields.optional_number("attention_factor", above=0.0),
            mscale=fields.optional_number("mscale"),
            mscale_all_dim=fields.optional_number("mscale_all_dim"),
            truncate=fields.boolean("truncate", True),
            low_freq_factor=1.0 if low is None else low,
            high_freq_factor=4.0 if high is None else high,
        )
        if rope_type == "llama3" and rope.low_freq_factor >= rope.high_freq_factor:
            raise fields.error(f"low_freq_factor {low} is not below high_freq_factor {high}")
        if rope_type == "yarn" and rope.rope_theta == 1.0:
            raise fields.error("rope_theta is 1.0: every pair turns equally fast, and yarn has nothing to choose from")
        if rope_type == "dynamic" and head_dim <= 2:
            raise fields.error(f"rope_type 'dynamic' stretches pairs against each other, head_dim is {head_dim}")
        return rope


def _share(fields: Fields, rope_type: str, head_dim: int, default: float, shares: bool) -> float:
    """How much of a head turns. The plain rotation of most models turns all of it, whatever their config says."""
    share = fields.optional_number("partial_rotary_factor")
    share = default if share is None else share
    if rope_type == "default" and not shares:
        return 1.0
    if not 0 <= share <= 1:
        raise fields.error(f"partial_rotary_factor is {share}, expected a share between 0 and 1")
    if not shares and rope_type != "proportional" and int(head_dim * share) != head_dim:
        raise fields.error(f"partial_rotary_factor is {share}: with rope_type {rope_type!r} whole heads turn here")
    return share
