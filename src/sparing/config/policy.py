"""The policy language of `kv=`: what a user may change about memories that grow. Never imports torch.

A policy has two independent parts: what is kept of a growing memory (everything, a window, or the entries that matter
most), and how that is stored. They are joined with "+"; either may be left out. Each may state its options:

    turboquant:4,window=128,sink_tokens=4
    triattention:2048,mode=global+turboquant:k8v4,skip_layers=0:-1
    dense,ssm_dtype=bfloat16

An option may also be given apart, as a keyword, which is the only way for one that text cannot hold (tensors).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from typing import Any

from sparing.config.codes import EXACT, TurboQuant, is_among
from sparing.config.memory import ELEMENT_SIZES, AttentionSpec, CompressedSpec, MemorySpec, RecurrentSpec, Rounds

__all__ = ["SYNTAX", "Budget", "Policy", "apply_policy", "parse_policy", "policy_options", "same_policy", "settled"]

SYNTAX = (
    "dense, window:N, triattention:N, turboquant:BITS, turboquant:kBITSvBITS, int8 (the same as turboquant:8),"
    " released (as the model's own release keeps it), or two joined as in triattention:2048+turboquant:4; options"
    " follow commas, as in turboquant:4,window=128"
)
WHOLE = ("dense", "released")  # of policies that have no parts

BUDGET_CHOICES = {
    "mode": (None, "global", "per_head", "per_layer_per_head"),
    "trigger": ("slack", "interval"),
    "aggregation": ("mean", "max"),
    "group": ("max", "mean"),
}
STATED = {"size", "k_bits", "v_bits"}  # before the options
BITS = r"(\d+(?:\.\d+)?)"


@dataclass(frozen=True)
class Window:
    """Keep the last entries: a query sees `size` keys, its own included."""

    size: int


@dataclass(frozen=True)
class Budget:
    """Keep the `size` entries that the queries to come are expected to look at most (TriAttention).

    statistics: of the model's queries, from `sparing.calibrate`, or a file of them. mode: one set of entries for the
    whole model ("global"), for each key head across layers ("per_head") or for each key head of each layer
    ("per_layer_per_head"); None: "per_head" where every key head of every layer can take part, else "global".
    interval, trigger: of `Rounds`. protect_prompt: entries of the first prompt are neither scored nor forgotten;
    count_prompt=False keeps them on top of the budget. protect_recent, protect_sinks: how many of the last and of the
    first entries stay in any case. max_offset: how far ahead future queries are assumed; aggregation: an entry's
    expected logit is the "mean" over them or the "max". group: the "max" or "mean" of the query heads that read a key
    head. trig=False scores by norms alone, norm_weighting=False by norms as if queries had no common direction.
    allow_nope: also layers without RoPE.
    Raises ValueError for values out of range or that contradict each other.
    """

    size: int
    statistics: Any = None
    mode: str | None = None
    interval: int = 128
    trigger: str = "slack"
    protect_prompt: bool = True
    count_prompt: bool = True
    protect_recent: int = 0
    protect_sinks: int = 0
    max_offset: int = 65536
    aggregation: str = "mean"
    group: str = "max"
    trig: bool = True
    norm_weighting: bool = True
    allow_nope: bool = False

    def __post_init__(self) -> None:
        for name, least in (
            ("size", 1),
            ("interval", 1),
            ("max_offset", 1),
            ("protect_recent", 0),
            ("protect_sinks", 0),
        ):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"triattention: {name} is {value!r}, expected a whole number of at least {least}")
        for name in ("protect_prompt", "count_prompt", "trig", "norm_weighting", "allow_nope"):
            if not isinstance(getattr(self, name), bool):
                raise ValueError(f"triattention: {name} is {getattr(self, name)!r}, expected True or False")
        for name, known in BUDGET_CHOICES.items():
            if not is_among(getattr(self, name), known):
                listed = ", ".join(filter(None, known))
                raise ValueError(f"triattention: {name}={getattr(self, name)!r} is not known, use {listed}")
        if not self.count_prompt and not self.protect_prompt:
            raise ValueError(
                "triattention: count_prompt=False keeps the prompt on top of the budget, which needs"
                " protect_prompt=True"
            )
        if self.protect_recent + self.protect_sinks >= self.size:
            raise ValueError(
                f"triattention: {self.protect_recent} recent and {self.protect_sinks} first entries are protected,"
                f" which leaves nothing of a budget of {self.size} to choose: raise the budget"
            )

    @property
    def rounds(self) -> Rounds:
        return Rounds(self.size, self.interval, self.trigger)


@dataclass(frozen=True)
class States:
    """How recurrent states are kept, beside any policy for what grows.

    ssm_dtype: "float32", "bfloat16" or "float16" (None: what the model's config says). ssm_rounding: of a 16-bit state,
    "stochastic" or "nearest", which loses changes smaller than half a step for good. ssm_seed: of stochastic rounding.
    Raises ValueError for values that are not known.
    """

    ssm_dtype: str | None = None
    ssm_rounding: str = "stochastic"
    ssm_seed: int = 0

    def __post_init__(self) -> None:
        for name, known in (("ssm_dtype", (None, *ELEMENT_SIZES)), ("ssm_rounding", ("stochastic", "nearest"))):
            if not is_among(getattr(self, name), known):
                names = ", ".join(value for value in known if value)
                raise ValueError(f"{name}={getattr(self, name)!r} is not known, use {names}")
        if isinstance(self.ssm_seed, bool) or not isinstance(self.ssm_seed, int) or self.ssm_seed < 0:
            raise ValueError(f"ssm_seed is {self.ssm_seed!r}, expected a whole number of at least 0")

    def change(self, spec: RecurrentSpec) -> RecurrentSpec:
        return replace(
            spec,
            state_dtype=self.ssm_dtype or spec.state_dtype,
            state_rounding=self.ssm_rounding,
            state_seed=self.ssm_seed,
        )


@dataclass(frozen=True)
class Policy:
    """A policy taken apart.

    kv: as it was written; keep: what is kept of what grows (None: everything); store: how (None: as it is); states: how
    recurrent layers keep theirs; is_released: compressed entries are kept as the model's own release keeps them.
    """

    kv: str
    keep: Window | Budget | None = None
    store: TurboQuant | None = None
    states: States = States()
    is_released: bool = False

    def __str__(self) -> str:
        """The policy as text that `parse_policy` reads, with every option that text can hold and that is not usual."""
        parts = []
        if isinstance(self.keep, Window):
            parts.append(f"window:{self.keep.size}")
        elif self.keep is not None:
            parts.append(f"triattention:{self.keep.size}{_options_text(self.keep)}")
        if self.store is not None:
            k, v = self.store.k_bits, self.store.v_bits
            parts.append(f"turboquant:{k if k == v else f'k{k}v{v}'}{_options_text(self.store)}")
        return "+".join(parts or [WHOLE[self.is_released]]) + _options_text(self.states)

    @property
    def without_options(self) -> str:
        return "+".join(part.partition(",")[0] for part in str(self).split("+"))


def parse_policy(kv: str, options: Mapping[str, Any] | None = None) -> Policy:
    """The policy that `kv` and its options state.

    options: those given as keywords, beside the ones in the text.
    Raises ValueError for a policy that is not known, naming the ones that are, for an option it does not take, and for
    one that is given twice.
    """
    if not isinstance(kv, str):
        raise ValueError(f"kv={kv!r} is not a memory policy, use {SYNTAX}")
    policy, given = Policy(kv), dict(options or {})
    for part in kv.split("+"):
        name, *pairs = part.split(",")
        if not (name in WHOLE and part == kv):
            axis, value = _part(kv, name)
            if getattr(policy, axis) is not None:
                raise ValueError(f"kv={kv!r}: {name!r} clashes with what comes before it: use one of them")
            policy = replace(policy, **{axis: value})
            own = replace(Policy(kv), **{axis: value})
        else:
            policy = own = replace(policy, is_released=name == "released")
        for pair in pairs:
            option, equals, text = pair.partition("=")
            if not equals or option not in _options(own):
                known = ", ".join(_options(own))
                raise ValueError(f"kv={kv!r}: {name} takes no option {pair!r}, write name=value with one of: {known}")
            value = _read(kv, option, text, own)
            if not (given.setdefault(option, value) is value or _same(given[option], value)):
                raise ValueError(f"kv={kv!r} states {option}={text}, and {option}={given[option]!r} is given too")
    known = _options(policy)
    if unknown := sorted(set(given) - set(known)):
        raise ValueError(f"kv={kv!r} takes no option {unknown[0]!r}, it knows: {', '.join(known)}")
    for axis, part in _parts(policy).items():
        if of_part := {field.name: given[field.name] for field in fields(part) if field.name in given}:
            policy = replace(policy, **{axis: replace(part, **of_part)})
    _check_together(policy)
    return replace(policy, kv=str(policy)) if options else policy


def _part(kv: str, name: str) -> tuple[str, Window | Budget | TurboQuant | None]:
    """(the axis of `Policy` that a part is of, what it states there)."""
    if match := re.fullmatch(r"window:(\d+)", name):
        if int(match[1]) < 1:
            raise ValueError(f"kv={kv!r}: the window must hold at least one token")
        return "keep", Window(int(match[1]))
    if match := re.fullmatch(r"triattention:(\d+)", name):
        return "keep", Budget(int(match[1]))
    if name == "int8":
        return "store", TurboQuant(8, 8)
    if match := re.fullmatch(rf"turboquant:(?:{BITS}|k{BITS}v{BITS})", name):
        return "store", _turboquant(kv, match[1] or match[2], match[1] or match[3])
    raise ValueError(f"kv={kv!r} is not a memory policy, use {SYNTAX}")


def _read(kv: str, option: str, text: str, policy: Policy) -> Any:
    """The value of an option from its text, by the type that the option is declared with."""
    kind = next(f.type for part in _parts(policy).values() for f in fields(part) if f.name == option)
    readers: dict[Any, tuple[Callable[[str], Any], str]] = {
        "int": (int, "a whole number"),
        "bool": ({"true": True, "false": False}.__getitem__, "true or false"),
        "Sequence[int]": (lambda text: tuple(int(n) for n in text.split(":")), "whole numbers, as in 0:1:-1"),
    }
    read, expected = readers.get(kind, (str, ""))
    try:
        return read(text)
    except (ValueError, KeyError):
        raise ValueError(f"kv={kv!r}: {option} is {text!r}, expected {expected}") from None


def _same(given: Any, value: Any) -> bool:
    return type(given) is type(value) and given == value


def _options_text(part: Any) -> str:
    """`,name=value` for each option of a part that is not what it is when left out. Objects have no text: left out."""
    changed = {f.name: getattr(part, f.name) for f in fields(part) if getattr(part, f.name) is not f.default}
    found = ""
    for name, value in changed.items():
        if name in STATED or value == type(part).__dataclass_fields__[name].default:
            continue
        if isinstance(value, bool):
            value = str(value).lower()
        elif isinstance(value, tuple | list) and all(isinstance(n, int) for n in value):
            value = ":".join(map(str, value))
        if isinstance(value, str | int):
            found += f",{name}={value}"
    return found


def _turboquant(kv: str, k_bits: str, v_bits: str) -> TurboQuant | None:
    """Bits as numbers; 16 for both is no quantisation at all."""
    k, v = (float(bits) if "." in bits else int(bits) for bits in (k_bits, v_bits))
    if (k == EXACT) != (v == EXACT):
        raise ValueError(f"kv={kv!r}: keys and values are both quantised or neither, use 8 bits instead of {EXACT}")
    return None if k == EXACT else TurboQuant(k, v)


def _check_together(policy: Policy) -> None:
    """Raises ValueError where what is kept and how it is stored do not go together."""
    keep, store = policy.keep, policy.store
    if store is None or keep is None:
        return
    if isinstance(keep, Window):
        raise ValueError(
            f"kv={policy.kv!r}: a window leaves nothing that grows, and windows stay exact: use one of the two"
        )
    for mine, of_codes, theirs, of_budget in (
        ("window", store.window, "protect_recent", keep.protect_recent),
        ("sink_tokens", store.sink_tokens, "protect_sinks", keep.protect_sinks),
    ):
        if of_codes > of_budget:
            raise ValueError(
                f"kv={policy.kv!r}: {mine}={of_codes} keeps entries exact that {theirs}={of_budget} lets go:"
                f" set {theirs}={of_codes}"
            )


def policy_options(kv: str) -> list[str]:
    """Names of the options a policy takes. Raises ValueError for a policy that is not known."""
    return _options(parse_policy(kv))


def same_policy(one: Policy, other: Policy) -> bool:
    """Whether two policies keep the same, however they were written. Statistics and rotations are the same where they
    are the same objects, or one path."""
    try:
        return replace(one, kv="") == replace(other, kv="")
    except RuntimeError:  # of tensors that are not the same, which have no truth value
        return False


def settled(policy: Policy, specs: Sequence[MemorySpec | None]) -> Policy:
    """The policy as memories of these specs know it: "released" is dense where no release keeps them otherwise."""
    return replace(policy, is_released=policy.is_released and any(isinstance(s, CompressedSpec) for s in specs))


def _options(policy: Policy) -> list[str]:
    return [field.name for part in _parts(policy).values() for field in fields(part) if field.name not in STATED]


def _parts(policy: Policy) -> dict[str, Any]:
    """What a policy states on each axis."""
    return {field.name: part for field in fields(policy) if is_dataclass(part := getattr(policy, field.name))}


def apply_policy(specs: Sequence[MemorySpec | None], policy: Policy) -> list[MemorySpec | None]:
    """The specs as a policy changes them: it bounds or stores anew what grows, and leaves alone what does not.

    `plan` computes bytes from the result, `plan_memory` builds it. Raises ValueError where nothing grows that a budget
    could bound, where a policy of single tokens meets entries that stand for several, and where those have sizes that
    "released" has no bytes for.
    """
    if (policy.keep or policy.store) and any(isinstance(spec, CompressedSpec) for spec in specs):
        raise ValueError(
            f"kv={policy.kv!r}: this model compresses its memory itself, to entries that stand for several tokens and"
            f" are key and value in one; {policy.without_options} is defined for keys and values of single tokens: use"
            " kv='dense' or kv='released'"
        )
    changes: dict[str, Any] = {}
    if isinstance(policy.keep, Window):
        changes["window"] = policy.keep.size
    elif isinstance(policy.keep, Budget):
        changes["rounds"] = policy.keep.rounds
        if not any(isinstance(spec, AttentionSpec) and spec.window is None for spec in specs):
            raise ValueError(f"kv={policy.kv!r}: no layer of this model grows without bound, use kv='dense'")
    codes, skipped = None, set()
    if policy.store is not None:
        codes, skipped = policy.store.for_layer(), _layers(policy.store.skip_layers, len(specs))
    if policy.states.ssm_dtype is not None and not any(isinstance(spec, RecurrentSpec) for spec in specs):
        raise ValueError(f"ssm_dtype={policy.states.ssm_dtype!r}: no layer of this model keeps a recurrent state")

    @cache
    def change(spec: MemorySpec | None, is_coded: bool) -> MemorySpec | None:
        if isinstance(spec, AttentionSpec) and spec.window is None:
            return replace(spec, **changes, codes=codes if is_coded else None)
        if isinstance(spec, RecurrentSpec):
            return policy.states.change(spec)
        if isinstance(spec, CompressedSpec):
            return _as_released(spec, policy) if policy.is_released else replace(spec, codes=None)
        return spec

    owners = (getattr(spec, "shared_with", None) for spec in specs)
    coded = [(i if owner is None else owner) not in skipped for i, owner in enumerate(owners)]
    return [change(spec, is_coded) for spec, is_coded in zip(specs, coded, strict=True)]


def _as_released(spec: CompressedSpec, policy: Policy) -> CompressedSpec:
    """Raises ValueError for sizes that the release's formats do not take."""
    released = replace(spec, codes=spec.released)
    try:
        released.nbytes(spec.ratio, element_size=2)
    except ValueError as error:
        raise ValueError(f"kv={policy.kv!r}: {error}, or kv='dense'") from None
    return released


def _layers(indices: Sequence[int], count: int) -> set[int]:
    """Layer indices counted from either end. Raises ValueError for one that is not there, or is not an index."""
    if bad := [i for i in indices if not -count <= i < count]:
        raise ValueError(f"turboquant: skip_layers names layer {bad[0]}, the model has {count} layers")
    return {i % count for i in indices}
