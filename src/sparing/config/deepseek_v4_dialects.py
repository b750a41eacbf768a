"""What a DeepSeek-V4 config.json says of layers, rotation and storage, in either of its dialects. Never imports torch.

The releases list `compress_ratios` (of the layers, then of those that draft), `num_hash_layers`, `qk_rope_head_dim` and
`rope_scaling`; transformers 5 writes `layer_types`, `mlp_layer_types`, `compress_rates`, `partial_rotary_factor` and
`rope_parameters`. A file may hold both where they agree. Without any list of layers, those are what transformers takes:
two heavily compressed ones, then the two compressed kinds in turn.
Source: transformers' `configuration_deepseek_v4.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from sparing.config.fields import Fields
from sparing.config.rope import RopeParameters
from sparing.errors import shown

__all__ = [
    "CSA", "HCA", "SLIDING", "V4_1", "DeepseekV4Layer", "read_layers", "read_ropes", "read_storage", "read_turning",
]  # fmt: skip

SLIDING, CSA, HCA = "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"
HASH, SCORE = "hash_moe", "moe"
RATES = {CSA: 4, HCA: 128}  # tokens to an entry
V4_1 = "DeepSeek-V4.1, whose attention and routing are another architecture, is not supported"


@dataclass(frozen=True)
class DeepseekV4Layer:
    """kind: "sliding_attention", "compressed_sparse_attention" (CSA) or "heavily_compressed_attention" (HCA). ratio:
    tokens to a compressed entry, 0 for a sliding layer. is_hash: a token's experts are looked up by its id, not
    chosen by score."""

    kind: str
    ratio: int
    is_hash: bool = False


def read_layers(
    fields: Fields, count: int, drafting: int
) -> tuple[tuple[DeepseekV4Layer, ...], tuple[DeepseekV4Layer, ...]]:
    """The layers, and those that draft: score-routed, and sliding unless `compress_ratios` says otherwise."""
    rates = _rates(fields)
    ratios, listed = fields.get("compress_ratios", None), fields.strings("layer_types")
    kinds, extra = [HCA] * min(count, 2) + [CSA if i % 2 else HCA for i in range(count - 2)], [SLIDING] * drafting
    if ratios is not None:
        found = _kinds(fields, ratios, rates)
        if len(found) not in (count, count + drafting):
            raise fields.error(
                f"compress_ratios has {len(found)} entries, expected num_hidden_layers {count} +"
                f" num_nextn_predict_layers {drafting} = {count + drafting}"
            )
        kinds, extra = found[:count], found[count:] or extra
    if listed is not None:
        _check_list(fields, "layer_types", listed, count, (SLIDING, CSA, HCA))
        if ratios is not None and (i := _differing(listed, kinds)) is not None:
            raise fields.error(
                f"compress_ratios[{i}] is {ratios[i]}, layer_types[{i}] is {listed[i]!r}: the two say"
                " the same, give one"
            )
        kinds = listed
    routing = fields.strings("mlp_layer_types")
    hashed = fields.integer("num_hash_layers", 3, minimum=0)
    expected = [HASH if i < hashed else SCORE for i in range(count)]
    if routing is not None:
        _check_list(fields, "mlp_layer_types", routing, count, (HASH, SCORE))
        if "num_hash_layers" in fields.raw and (i := _differing(routing, expected)) is not None:
            raise fields.error(
                f"num_hash_layers is {hashed}, mlp_layer_types[{i}] is {routing[i]!r}: the two say the same, give one"
            )
    rates = {SLIDING: 0, **rates}
    layers = (
        DeepseekV4Layer(kind, rates[kind], mlp == HASH) for kind, mlp in zip(kinds, routing or expected, strict=True)
    )
    return tuple(layers), tuple(DeepseekV4Layer(kind, rates[kind]) for kind in extra)


def _rates(fields: Fields) -> dict[str, int]:
    """Tokens to an entry, by kind of layer: `compress_rates`, or the older `compress_rate_csa`, `compress_rate_hca`."""
    stated = fields.get("compress_rates", None)
    stated = Fields({} if stated is None else stated, f"{fields.file}: compress_rates")
    rates = {kind: stated.integer(kind, rate) for kind, rate in RATES.items()}
    if stated.unknown():
        raise stated.error(f"{shown(next(iter(stated.unknown())))} is no kind of layer, use {CSA!r} and {HCA!r}")
    for key, kind in {"compress_rate_csa": CSA, "compress_rate_hca": HCA}.items():
        rate = fields.optional_integer(key)
        if rate is not None and kind in stated.raw and rate != rates[kind]:
            raise fields.error(
                f"{key} is {rate}, compress_rates[{kind!r}] is {rates[kind]}: the two say the same, give one"
            )
        rates[kind] = rate or rates[kind]
    return rates


def _kinds(fields: Fields, ratios: Any, rates: Mapping[str, int]) -> list[str]:
    """Kinds of layers from `compress_ratios`."""
    kinds = {0: SLIDING} | {ratio: kind for kind, ratio in RATES.items()}
    if not isinstance(ratios, list):
        raise fields.error(f"compress_ratios is {shown(ratios)}, expected a list of 0, 4 and 128")
    for i, ratio in enumerate(ratios):
        if isinstance(ratio, bool) or not isinstance(ratio, int) or ratio not in kinds:
            later = f": {V4_1}" if ratio in (1, 2) and not isinstance(ratio, bool) else ""
            raise fields.error(f"compress_ratios[{i}] is {shown(ratio)}, expected 0, 4 or 128{later}")
        if ratio and rates[kinds[ratio]] != ratio:
            raise fields.error(
                f"compress_ratios[{i}] is {ratio}, compress_rates[{kinds[ratio]!r}] is {rates[kinds[ratio]]}: the two"
                " say the same, give one"
            )
    return [kinds[ratio] for ratio in ratios]


def _check_list(fields: Fields, key: str, words: list[str], count: int, known: tuple[str, ...]) -> None:
    if (i := next((i for i, word in enumerate(words) if word not in known), None)) is not None:
        raise fields.error(f"{key}[{i}] is {shown(words[i])}, supported: {', '.join(map(repr, known))}")
    if len(words) != count:
        raise fields.error(f"{key} has {len(words)} entries, num_hidden_layers is {count}")


def _differing(one: list[str], other: list[str]) -> int | None:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=True)) if a != b), None)


def read_turning(fields: Fields, head_dim: int) -> tuple[int, float]:
    """(dimensions of a head that turn, their share), from `qk_rope_head_dim` or `partial_rotary_factor`."""
    turning = fields.optional_integer("qk_rope_head_dim")
    share = fields.optional_number("partial_rotary_factor", above=0.0)
    if turning is not None and share is not None and turning != int(head_dim * share + 1e-6):
        raise fields.error(
            f"qk_rope_head_dim is {turning}, partial_rotary_factor is {share} of head_dim {head_dim}: the two say the"
            " same, give one"
        )
    turning = turning or int(head_dim * (0.125 if share is None else share) + 1e-6)
    if turning % 2 or not 0 < turning <= head_dim:
        raise fields.error(
            f"{turning} of head_dim {head_dim} dimensions turn (qk_rope_head_dim or partial_rotary_factor), expected an"
            " even number of at least 2"
        )
    return turning, turning / head_dim


def read_ropes(
    fields: Fields, max_positions: int, head_dim: int, share: float
) -> tuple[dict[str, RopeParameters], dict[str, Any]]:
    """(how sliding layers turn and how all others do, keys of these objects that nobody reads).

    `rope_parameters` has an object for each, or one for all others, which older files call `rope_scaling`.
    """
    stated, scaling = fields.get("rope_parameters", None), fields.get("rope_scaling", None)
    if stated is not None and scaling is not None and stated != scaling:
        raise fields.error(f"rope_scaling is {shown(scaling)} beside rope_parameters: the two say the same, give one")
    key = "rope_scaling" if stated is None else "rope_parameters"
    found = Fields({} if (value := stated or scaling) is None else value, f"{fields.file}: {key}").raw
    is_nested = any(isinstance(value, Mapping) for value in found.values())
    if is_nested and set(found) != {"main", "compress"}:
        raise fields.error(f"{key} is {shown(found)}, expected an object main and one compress")
    ropes, unread = {}, {}
    for kind, of_all, usual in (("main", "rope_theta", 10000.0), ("compress", "compress_rope_theta", 160000.0)):
        where = f"{fields.file}: {key}.{kind}" if is_nested else f"{fields.file}: {key}"
        # A theta in the one object for all others is that of sliding layers, which transformers copies there.
        own = found[kind] if is_nested else {} if kind == "main" else {**found, "rope_theta": None}
        own = {name: value for name, value in Fields(own, where).raw.items() if value is not None}
        theta = fields.number(of_all, usual, above=0.0)
        if of_all in fields.raw and own.get("rope_theta", theta) != theta:
            raise fields.error(
                f"{of_all} is {theta}, {key}.{kind} says {shown(own['rope_theta'])}: the two say the same, give one"
            )
        own.setdefault("partial_rotary_factor", share)
        inner = Fields(own, where)
        rope = RopeParameters.parse(
            inner, theta=theta, max_positions=max_positions, head_dim=head_dim, shares=True, types=("default", "yarn")
        )
        if abs(rope.partial_rotary_factor - share) * head_dim > 1e-3:
            raise fields.error(
                f"{key}.{kind} turns {rope.partial_rotary_factor} of a head, qk_rope_head_dim or partial_rotary_factor"
                f" says {share}: give one"
            )
        if rope.rope_type == "yarn" and rope.attention_factor is None:
            rope = replace(rope, attention_factor=1.0)  # cosines and sines are never scaled
        ropes[kind] = replace(rope, partial_rotary_factor=share)
        unread |= {f"{key}.{kind}.{name}": value for name, value in inner.harmless("deepseek_v4").items()}
    return ropes, unread


def read_storage(fields: Fields) -> tuple[bool, str | None]:
    """(whether matrices are in FP8, what routed experts are stored in, where the file says so)."""
    said = fields.raw.get("quantization_config")
    quantised = Fields({} if said is None else said, f"{fields.file}: quantization_config")
    own, within = (f.choice("expert_dtype", (None, "fp4", "fp8", "bf16"), None) for f in (fields, quantised))
    if own is not None and within is not None and own != within:
        raise fields.error(f"expert_dtype is {own!r}, in quantization_config it is {within!r}: give one")
    if quantised.raw.get("quant_method") != "fp8":
        return False, own or within
    blocks = quantised.get("weight_block_size", None)
    if blocks not in (None, [128, 128]):
        later = f": {V4_1}" if blocks == [32, 32] else ""
        raise quantised.error(f"weight_block_size is {shown(blocks)}, expected [128, 128]{later}")
    quantised.choice("fmt", (None, "e4m3"), None)
    return True, own or within
