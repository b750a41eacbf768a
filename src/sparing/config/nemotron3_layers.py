"""Layers of Nemotron-H hybrids as config.json states them: their order, and the numbers of each kind. No torch.

The order is a pattern of letters (Nano, Super, Ultra) or a list of words (what transformers writes).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparing.config.fields import LARGEST_COUNT, Fields
from sparing.errors import shown

__all__ = ["ATTENTION", "MAMBA", "MLP", "MOE", "expert_numbers", "layer_kinds", "mamba_numbers"]

MAMBA, ATTENTION, MOE, MLP = "mamba", "attention", "moe", "mlp"
LETTERS = {"M": MAMBA, "*": ATTENTION, "E": MOE, "-": MLP}
# A list of layers in the releases' words, or in those that transformers writes.
WORDS = {MAMBA: MAMBA, "linear_attention": MAMBA, ATTENTION: ATTENTION, "full_attention": ATTENTION, MOE: MOE, MLP: MLP}
DTYPES = ("float32", "bfloat16", "float16")

ALIASES = {  # second names, which older files use
    "n_groups": "mamba_n_groups",
    "conv_kernel": "mamba_d_conv",
    "time_step_limit": "mamba_dt_limit",
    "use_conv_bias": "mamba_conv_bias",
}


def layer_kinds(fields: Fields, pattern_key: str, list_keys: tuple[str, ...]) -> tuple[str, ...] | None:
    """Kinds of layers from a list of words, else from a pattern of letters; None where neither is given."""
    for key in list_keys:
        words = fields.strings(key)
        if words is not None:
            fields.ignore(pattern_key, *list_keys)
            if (i := next((i for i, word in enumerate(words) if word not in WORDS), None)) is not None:
                raise fields.error(f"{key}[{i}] is {shown(words[i])}, supported: {', '.join(map(repr, WORDS))}")
            if len(words) > LARGEST_COUNT:
                raise fields.error(f"{key} has {len(words)} entries, over {LARGEST_COUNT}, which no model has")
            if not words:
                raise fields.error(f"{key} is empty: a model has at least one layer")
            return tuple(WORDS[word] for word in words)
    pattern = fields.get(pattern_key, None)
    if pattern is None:
        return None
    if not isinstance(pattern, str) or not pattern:
        raise fields.error(f"{pattern_key} is {shown(pattern)}, expected a string of the letters {' '.join(LETTERS)}")
    if len(pattern) > LARGEST_COUNT:
        raise fields.error(f"{pattern_key} has {len(pattern)} letters, over {LARGEST_COUNT}, which no model has")
    if (i := next((i for i, letter in enumerate(pattern) if letter not in LETTERS), None)) is not None:
        raise fields.error(f"{pattern_key}[{i}] is {pattern[i]!r}, supported: {' '.join(LETTERS)}")
    return tuple(LETTERS[letter] for letter in pattern)


def mamba_numbers(fields: Fields, present: bool) -> dict[str, Any]:
    """Numbers of the Mamba layers; defaults where there are none."""
    for key, alias in ALIASES.items():
        a, b = fields.get(key, None), fields.get(alias, None)
        if a is not None and b is not None and a != b:
            raise fields.error(f"{key} is {shown(a)}, {alias} is {shown(b)}: the two are one number, give one of them")

    def name(key: str) -> str:
        return ALIASES[key] if fields.raw.get(ALIASES[key]) is not None else key

    heads, groups = fields.integer("mamba_num_heads", 128), fields.integer(name("n_groups"), 8)
    values = {
        "mamba_num_heads": heads,
        "mamba_head_dim": fields.integer("mamba_head_dim", 64),
        "n_groups": groups,
        "ssm_state_size": fields.integer("ssm_state_size", 128),
        "conv_kernel": fields.integer(name("conv_kernel"), 4),
        "use_conv_bias": fields.boolean(name("use_conv_bias"), True),
        "use_bias": fields.boolean("use_bias", False),
        "time_step_limit": _limit(fields, name("time_step_limit")),
        "ssm_dtype": fields.choice("mamba_ssm_cache_dtype", DTYPES, "float32"),
    }
    if present and heads % groups:
        raise fields.error(f"mamba_num_heads {heads} is not a multiple of n_groups {groups}")
    return values if present else {}


def _limit(fields: Fields, key: str) -> tuple[float, float]:
    """Bounds of dt. Infinity is a JSON extension, which files spell `Infinity`, "inf" or {"__float__": "Infinity"}."""
    raw = fields.get(key, None)
    if raw is None:
        return 0.0, math.inf
    items = raw if isinstance(raw, list | tuple) else []
    bounds: list[Any] = [item.get("__float__") if isinstance(item, Mapping) else item for item in items]
    try:
        low, high = (math.nan if isinstance(bound, bool) else float(bound) for bound in bounds)
    except OverflowError:
        raise fields.error(f'{key} holds a number that no step reaches: write "inf" for no upper bound') from None
    except (TypeError, ValueError):
        low = high = math.nan
    if not 0 <= low < high:
        raise fields.error(f'{key} is {shown(raw)}, expected two bounds like [0.0, "inf"]')
    return low, high


def expert_numbers(fields: Fields, present: bool) -> dict[str, Any]:
    """Numbers of the mixture layers; defaults where there are none."""
    fields.choice("n_shared_experts", (1,), 1)
    latent = fields.optional_integer("moe_latent_size")
    experts = fields.integer("n_routed_experts", 8, maximum=LARGEST_COUNT)
    k = fields.integer("num_experts_per_tok", 2)
    groups, best = fields.integer("n_group", 1), fields.integer("topk_group", 1)
    values = {
        "num_experts": experts,
        "top_k_experts": k,
        "n_group": groups,
        "topk_group": best,
        "norm_topk_prob": fields.boolean("norm_topk_prob", True),
        "routed_scaling_factor": fields.number("routed_scaling_factor", 1.0),
        "moe_intermediate_size": fields.integer("moe_intermediate_size", 7688),
        "moe_shared_expert_intermediate_size": fields.integer("moe_shared_expert_intermediate_size", 7688),
        "moe_latent_size": latent,
    }
    if not present:
        return {}
    if experts % groups:
        raise fields.error(f"n_routed_experts {experts} is not a multiple of n_group {groups}")
    if best > groups:
        raise fields.error(f"topk_group is {best}, there are only {groups} groups (n_group)")
    if k > best * (experts // groups):
        raise fields.error(
            f"num_experts_per_tok is {k}, but {best} groups of {experts // groups} experts hold only"
            f" {best * (experts // groups)}: raise topk_group ({best}) or lower num_experts_per_tok"
        )
    return values
