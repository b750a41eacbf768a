"""Every model under every policy with every decoder: equal to its oracle, or refused with a reason.

The oracle recomputes each pass over all keys and values ever made, hiding those that were forgotten (`oracle.py`).
"""

import re
import warnings
from functools import cache
from typing import get_args, get_type_hints

import pytest

import sparing
from sparing.config import ARCHITECTURES
from sparing.config.codes import CHOICES
from sparing.config.memory import MemorySpec
from sparing.config.policy import BUDGET_CHOICES, SYNTAX, Budget, Policy, parse_policy
from sparing.decoding import generate as decoding
from sparing.memory.turboquant.rotation import ROTATIONS
from sparing.planning.memory import memory_kind
from tests.properties.oracle import as_they_are, record, replay, through_codes
from tests.tiny import CONFIGS, model, random_ids, takes

BUDGET, INTERVAL, PROMPTS, NEW = 9, 3, (5, 7), 14

# Name -> policy and its options. Statistics are added where they are needed.
POLICIES: dict[str, tuple[str, dict]] = {
    "dense": ("dense", {}),
    "released": ("released", {}),
    "window": ("window:6", {}),
    "global": (f"triattention:{BUDGET}", {"interval": INTERVAL, "mode": "global"}),
    "per head": (f"triattention:{BUDGET}",
                 {"interval": INTERVAL, "mode": "per_head", "protect_prompt": False, "aggregation": "max",
                  "group": "mean"}),
    "per layer and head": (
        f"triattention:{BUDGET}",
        {"interval": 4, "mode": "per_layer_per_head", "trigger": "interval", "protect_prompt": False,
         "protect_recent": 2, "protect_sinks": 1},
    ),
    "on top of the prompt": (f"triattention:{BUDGET - 4}", {"interval": INTERVAL, "count_prompt": False}),
    "codes": ("turboquant:4", {"block": 1, "scale_dtype": "float32"}),
    "codes of blocks": ("turboquant:k3v2", {"block": 16, "scale_dtype": "float32", "scale": "norm"}),
    "codes before a window": (
        "turboquant:3",
        {"block": 1, "window": 4, "sink_tokens": 2, "rotation": "haar", "scale_dtype": "float32", "scale": "lsq"},
    ),
    "codes, each pass exact within itself": (
        "turboquant:4",
        {"block": 1, "prefill": "exact", "scale": "renorm", "rotation": "identity", "scale_dtype": "float32"},
    ),
    "both": (
        f"triattention:{BUDGET}+turboquant:4",
        {"interval": INTERVAL, "block": 1, "protect_prompt": False, "scale_dtype": "float32"},
    ),
    "both, per layer and head": (
        f"turboquant:5+triattention:{BUDGET}",
        {"interval": INTERVAL, "mode": "per_layer_per_head", "protect_recent": 3, "protect_sinks": 2, "block": 16,
         "window": 3, "sink_tokens": 1, "protect_prompt": False, "scale_dtype": "float32"},
    ),
}  # fmt: skip
READ_ANOTHER = {"Gemma4Drafter"}  # architectures without a memory of their own
DECODERS = {
    "autoregressive": {},
    "speculative": {"draft": "ngram", "draft_tokens": 3, "adaptive": False},
    "block_diffusion": {"max_denoising_steps": 3, "stability_threshold": 1},
}


@cache
def statistics(name: str) -> sparing.Statistics:
    return sparing.calibrate(model(name), random_ids(200, seed=9))


def refusal(name: str, policy: str, decoder: str) -> str | None:
    """Why a cell is refused; None where it must work."""
    kv, _ = POLICIES[policy]
    if name == "compressed" and "triattention" in kv:  # which calibration refuses
        return "stand for several tokens"
    if decoder == "block_diffusion" and model(name).config.canvas_length is None:
        return "has no canvas"
    if not takes(name, kv):
        return "stand for several tokens"
    if "triattention" in kv and name in ("sliding", "recurrent"):
        return "no layer of this model grows without bound"
    if "triattention" in kv and name.startswith("hybrid"):
        return "layer [02] has no RoPE: .* use triattention:[0-9]+,allow_nope=true"
    return None


def run(name: str, policy: str, decoder: str, **more) -> list:
    kv, options = POLICIES[policy]
    if "triattention" in kv and name not in ("sliding", "recurrent"):
        options = options | {"statistics": statistics(name)}
    prompts = [random_ids(length, seed=i).tolist() for i, length in enumerate(PROMPTS)]
    options = options | DECODERS[decoder] | more
    return list(sparing.generate(model(name), prompts, decoder=decoder, kv=kv, max_new_tokens=NEW, seed=1, **options))


@pytest.mark.parametrize("decoder", DECODERS)
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_equal_to_the_oracle_or_refused(name, policy, decoder, monkeypatch):
    more = {}
    if reason := refusal(name, policy, decoder):
        with pytest.raises(ValueError, match=reason):
            run(name, policy, decoder)
        if "allow_nope" not in reason:
            return
        more["allow_nope"] = True  # said so, it must work as everywhere
    recording = record(model(name), monkeypatch)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "this model attends in few layers")
        events = run(name, policy, decoder, **more)
    kv = POLICIES[policy][0]
    if (name, kv) == ("compressed", "released"):  # entries in few bits, which the oracle does not read
        return
    hidden = replay(model(name), recording, seen=through_codes if "turboquant" in kv else as_they_are)
    done = [event for event in events if isinstance(event, sparing.Done)]
    assert len(done) == len(PROMPTS)
    if "triattention" in kv:
        rounds = [event.stats["evictions"] for event in done]
        assert all(one for one, event in zip(rounds, done, strict=True) if event.reason == "length")
        assert any(rounds) and hidden
        for one in rounds:
            assert all(r["held"] - r["evicted"] == r["kept"] and r["evicted"] > 0 for r in one)
    else:
        assert not any("evictions" in event.stats for event in done)


OF_ITS_OWN = {
    # Codes that the oracle does not decode; `tests/memory/turboquant/test_storage.py` reads them literally.
    "variant": {"prod"},
    "rotation": {"hadamard"},
    # Float16 scales turn codes over by rounding: compared by distance in `tests/conformance/test_turboquant.py`.
    "scale_dtype": {"float16"},
}


def test_nothing_is_left_out():
    """A new model, kind of memory, policy, choice of an option, or decoder must be entered above."""
    architectures = {entry[2] for entry in ARCHITECTURES.values()} - READ_ANOTHER
    assert {ARCHITECTURES[config["model_type"]][2] for config in CONFIGS.values()} == architectures
    stated = {kv.split(":")[0] for policy, _ in POLICIES.values() for kv in policy.split("+")}
    named, _, _ = SYNTAX.partition(", or two")
    names = {re.split(r"[: ]", part)[0] for part in named.split(", ")}
    assert names - {"int8"} <= stated  # which is turboquant:8
    assert set(decoding.DECODERS) == set(DECODERS)
    specs = [spec for name in CONFIGS for spec in model(name).config.memory_specs()]
    assert {type(spec) for spec in specs if spec is not None} == set(get_args(MemorySpec))
    kinds = {"none", "recurrent", "shared", "sliding", "value_only", "full", "compressed_sparse", "heavily_compressed"}
    assert {memory_kind(spec) for spec in specs} == kinds
    policies = [parse_policy(kv, options) for kv, options in POLICIES.values()]
    axes = get_type_hints(Policy)
    for axis in ("keep", "store"):
        assert {type(getattr(policy, axis)) for policy in policies} == set(get_args(axes[axis]))
    budgets = [policy.keep for policy in policies if isinstance(policy.keep, Budget)]
    stores = [policy.store for policy in policies if policy.store is not None]
    for name, choices in {**BUDGET_CHOICES, **CHOICES, "rotation": ROTATIONS}.items():
        used = {getattr(part, name) for part in (budgets if name in BUDGET_CHOICES else stores)}
        assert used | OF_ITS_OWN.get(name, set()) == set(choices), name


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("name", CONFIGS)
def test_what_is_resident_holds_what_is_counted(name, policy):
    """Head-room is all that may be there beside what `nbytes` counts, and forks add nothing."""
    kv, options = POLICIES[policy]
    if not takes(name, kv):
        return
    if "triattention" in kv:
        if name in ("sliding", "recurrent"):
            return
        options = options | {"statistics": statistics(name), "allow_nope": "hybrid" in name}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        memory = model(name).memory(kv, **options)
        for ids in random_ids(150).split([20, 1, 60, *[1] * 5, 64]):
            model(name).logits(ids, memory, prompt=False)
            assert sparing.resident_bytes([memory]) >= memory.nbytes
    twins = [memory.fork() for _ in range(3)]
    assert sparing.resident_bytes(one for one in (memory, *twins)) == sparing.resident_bytes([memory])
