"""Every model under every policy with every decoder: equal to its oracle, or refused with a reason.

The oracle recomputes each pass over all keys and values ever made, hiding those that were forgotten (`oracle.py`).
"""

import re
import warnings
from functools import cache

import pytest

import sparing
from sparing.config import ARCHITECTURES
from sparing.decoding import generate as decoding
from sparing.memory.policy import SYNTAX
from tests.properties.models import CONFIGS, model, tokens
from tests.properties.oracle import as_they_are, record, replay, through_codes

BUDGET, INTERVAL, PROMPTS, NEW = 9, 3, (5, 7), 14

# Name -> policy and its options. Statistics are added where they are needed.
POLICIES: dict[str, tuple[str, dict]] = {
    "dense": ("dense", {}),
    "window": ("window:6", {}),
    "global": (f"triattention:{BUDGET}", {"interval": INTERVAL}),
    "per head": (f"triattention:{BUDGET}", {"interval": INTERVAL, "mode": "per_head", "protect_prompt": False}),
    "per layer and head": (
        f"triattention:{BUDGET}",
        {"interval": 4, "mode": "per_layer_per_head", "trigger": "interval", "protect_prompt": False,
         "protect_recent": 2, "protect_sinks": 1},
    ),
    "on top of the prompt": (f"triattention:{BUDGET - 4}", {"interval": INTERVAL, "count_prompt": False}),
    "codes": ("turboquant:4", {"block": 1, "scale_dtype": "float32"}),
    "codes of blocks": ("turboquant:k3v2", {"block": 16, "scale_dtype": "float32", "scale": "norm"}),
    "codes behind a window": (
        "turboquant:3",
        {"block": 1, "window": 4, "sink_tokens": 2, "rotation": "haar", "scale_dtype": "float32", "scale": "lsq"},
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
    return sparing.calibrate(model(name), tokens(200, seed=9))


def refusal(name: str, policy: str, decoder: str) -> str | None:
    """Why a cell is refused; None where it must work."""
    kv, _ = POLICIES[policy]
    if decoder == "block_diffusion" and model(name).config.canvas_length is None:
        return "has no canvas"
    if "triattention" in kv and name in ("sliding", "recurrent"):
        return "no layer of this model grows without bound"
    if "triattention" in kv and name.startswith("hybrid"):
        return "layer [02] has no RoPE; pass allow_nope=True"
    return None


def run(name: str, policy: str, decoder: str, **more) -> list:
    kv, options = POLICIES[policy]
    if "triattention" in kv and name not in ("sliding", "recurrent"):
        options = options | {"statistics": statistics(name)}
    prompts = [tokens(length, seed=i).tolist() for i, length in enumerate(PROMPTS)]
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


def test_nothing_is_left_out():
    """A new model, policy or decoder must be entered above."""
    architectures = {entry[2] for entry in ARCHITECTURES.values()} - READ_ANOTHER
    assert {ARCHITECTURES[config["model_type"]][2] for config in CONFIGS.values()} == architectures
    stated = {kv.split(":")[0] for policy, _ in POLICIES.values() for kv in policy.split("+")}
    assert set(re.findall(r"([a-z]+)(?::|,| or)", SYNTAX)) <= stated
    assert set(decoding.DECODERS) == set(DECODERS)
