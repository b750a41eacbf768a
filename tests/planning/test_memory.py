"""Planned bytes against the bytes that real memories hold."""

import random
from typing import Any

import pytest
import torch

from sparing import calibrate
from sparing.config import parse_config
from sparing.memory.recurrent import RecurrentGroup
from sparing.models.diffusion_gemma import CanvasRow
from sparing.models.loading import build
from sparing.planning import plan
from tests.tiny import CONFIGS, EXPERTS, FULL, GEMMA, HYBRID, LLAMA, SLIDING, VOCAB

MODELS = {
    "shared": {
        **GEMMA,
        "num_hidden_layers": 7,
        "layer_types": [SLIDING, SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL],
        "num_key_value_heads": 1,
        "num_kv_shared_layers": 3,
        "use_double_wide_mlp": True,
        "hidden_size_per_layer_input": 6,
    },
    "value_only": {
        **GEMMA,
        "num_hidden_layers": 3,
        "layer_types": [SLIDING, SLIDING, FULL],
        "attention_k_eq_v": True,
        "num_global_key_value_heads": 1,
    },
    "value_only_and_shared": {
        **GEMMA,
        "num_hidden_layers": 4,
        "layer_types": [SLIDING, FULL, SLIDING, FULL],
        "attention_k_eq_v": True,
        "num_kv_shared_layers": 2,
    },
    "experts": {
        **GEMMA,
        **EXPERTS,
        "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL],
        "enable_moe_block": True,
        "per_layer_config": {"1": {"head_dim": 24, "num_key_value_heads": 1}},
    },
    "unified": {
        **GEMMA,
        "model_type": "gemma4_unified_text",
        "num_hidden_layers": 2,
        "layer_types": [SLIDING, FULL],
        "sliding_window": 1,
    },
    "diffusion": CONFIGS["denoiser"],
    "hybrid": CONFIGS["hybrid"],
    "half a state": {**HYBRID, "hybrid_override_pattern": "M*-", "mamba_ssm_cache_dtype": "float16"},
    "llama": LLAMA,
    "mistral": {**LLAMA, "model_type": "mistral", "sliding_window": 7},
    "qwen2": {
        **LLAMA,
        "model_type": "qwen2",
        "use_sliding_window": True,
        "sliding_window": 6,
        "max_window_layers": 1,
    },
    "qwen3": {**LLAMA, "model_type": "qwen3"},
}


def random_model(raw):
    """A model of a config, with small random weights in the config's type."""
    config = parse_config(raw)
    model: Any = build(config).to_empty(device="cpu").to(getattr(torch, config.stored_dtype)).eval()
    model.requires_grad_(False)
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.normal_(1.0, 0.1) if tensor.ndim == 1 else tensor.normal_(0.0, 0.1)
    return model


@pytest.mark.parametrize("kv", ["dense", "window:9", "turboquant:3", "turboquant:k3.5v2"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_planned_bytes_are_the_bytes_held(name, dtype, kv):
    raw = {**MODELS[name], "dtype": dtype}
    model = random_model(raw)
    memories = [model.memory(kv), model.memory(kv)]
    for tokens in ([1, 2, 3], [4], list(range(9)), [5] * 30, [7], [6] * 21, [8] * 99):
        for memory in memories:
            model.logits(tokens, memory)
        planned = plan(raw, context=memories[0].length, batch=2, kv=kv)
        assert planned.memory_bytes == sum(memory.nbytes for memory in memories)
        assert planned.memory_bytes == sum(planned.memory_by_kind.values())


def random_policy(draw: random.Random, layers: int) -> tuple[str, dict[str, Any]]:
    """A policy, some of its options in the text and some as keywords."""
    texts, keywords = [], {}
    exact = draw.choice((0, 0, 3, 20))
    if draw.random() < 0.5:
        options = {
            "mode": draw.choice(("global", "per_layer_per_head")),
            "interval": draw.choice((1, 4, 9)),
            "trigger": draw.choice(("slack", "interval")),
            "protect_prompt": False,
            "protect_recent": exact,
            "protect_sinks": draw.choice((exact, exact + 1)),
        }
        texts.append((f"triattention:{draw.choice((45, 60))}", options))
    if not texts or draw.random() < 0.6:
        bits = [draw.choice((1, 2, 3, 4, 8, 2.5, 3.5)) for _ in range(2)]
        options = {
            "window": exact,
            "sink_tokens": draw.randint(0, exact),
            "block": draw.choice((1, 16, 64)),
            "scale_dtype": draw.choice(("float16", "float32")),
            "skip_layers": draw.choice(((), (0,), (-1,), (0, layers - 1))),
            "variant": draw.choice(("mse", "prod")),
            "prefill": draw.choice(("stream", "exact")),
        }
        texts.append((f"turboquant:k{bits[0]}v{bits[1]}", options))
    parts = []
    for name, options in texts:
        apart = {option for option in options if draw.random() < 0.3}
        keywords |= {option: value for option, value in options.items() if option in apart}
        stated = {option: value for option, value in options.items() if option not in apart}
        if not stated.get("skip_layers", (0,)):
            stated.pop("skip_layers")
        parts.append(name + "".join(f",{option}={as_text(value)}" for option, value in stated.items()))
    return "+".join(parts), keywords


def as_text(value: Any) -> str:
    return ":".join(map(str, value)) if isinstance(value, tuple) else str(value).lower()


@pytest.mark.filterwarnings("ignore:kv=:RuntimeWarning")
@pytest.mark.parametrize("name", ["llama", "shared", "value_only"])
def test_random_policies_are_planned_as_they_are_held(name):
    raw = {**MODELS[name], "dtype": "bfloat16"}
    model = random_model(raw)
    statistics = calibrate(model, list(range(1, 60)))
    draw = random.Random(7)
    for _ in range(12):
        kv, keywords = random_policy(draw, raw["num_hidden_layers"])
        given = {"statistics": statistics} if "triattention" in kv else {}
        memory = model.memory(kv, **keywords, **given)
        for ids in ([3], *[[i % VOCAB] for i in range(draw.randint(2, 130))]):
            model.logits(ids, memory, prompt=False)
        planned = plan(raw, context=memory.length, kv=kv, **keywords)
        assert planned.memory_bytes == memory.nbytes, (kv, keywords)
        again = plan(raw, context=memory.length, kv=planned.kv)
        assert again.memory_bytes == planned.memory_bytes and again.kv == planned.kv


@pytest.mark.parametrize("kv", ["dense", "window:9"])
@pytest.mark.parametrize("ssm_dtype", ["float32", "bfloat16", "float16", None])
@pytest.mark.parametrize("name", ["hybrid", "half a state"])
def test_planned_states_are_the_states_held(name, ssm_dtype, kv):
    raw = {**MODELS[name], "dtype": "bfloat16"}
    model = random_model(raw)
    memory = model.memory(kv, **({} if ssm_dtype is None else {"ssm_dtype": ssm_dtype}))
    model.logits([7] * 20, memory)
    planned = plan(raw, context=20, batch=3, kv=kv, **({} if ssm_dtype is None else {"ssm_dtype": ssm_dtype}))
    assert planned.memory_bytes == 3 * memory.nbytes
    recurrent = sum(group.nbytes for group in memory.groups if isinstance(group, RecurrentGroup))
    assert planned.memory_by_kind["recurrent"] == 3 * recurrent
    assert planned.kv == (kv if ssm_dtype is None else f"{kv},ssm_dtype={ssm_dtype}")
    assert planned.kv in planned.table()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", MODELS)
def test_planned_weights_are_the_parameters_held(name, dtype):
    raw = {**MODELS[name], "dtype": dtype}
    parameters = list(random_model(raw).parameters())
    planned = plan(raw, context=1)
    assert planned.parameters == sum(p.numel() for p in parameters)
    assert planned.weight_bytes == sum(p.numel() * p.element_size() for p in parameters)


def test_a_denoised_canvas_is_not_remembered():
    raw = {**MODELS["diffusion"], "dtype": "float32"}
    model = random_model(raw)
    memory = model.memory()
    model.logits([1, 2, 3], memory)
    model.denoise([4] * 8, memory)
    assert plan(raw, context=3).memory_bytes == memory.nbytes


@pytest.mark.filterwarnings("ignore:kv='turboquant:RuntimeWarning")
@pytest.mark.parametrize("kv", ["turboquant:4", "turboquant:k3v2", "dense"])
@pytest.mark.parametrize("length", [3, 64, 150])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_passes_over_a_canvas_hold_is_planned(kv, length, dtype):
    raw = {**MODELS["diffusion"], "dtype": dtype}
    model = random_model(raw)
    memory = model.memory(kv)
    model.logits([1] * length, memory)
    reading = memory.reading()
    for _ in range(2):
        model.run([CanvasRow(torch.full((8,), 4), memory, reading=reading)])
        memory.rollback()
    planned = plan(raw, context=length, kv=kv)
    assert planned.memory_bytes + planned.canvas_bytes == memory.nbytes + reading.nbytes
    assert (planned.canvas_bytes > 0) == (kv != "dense" and length >= 64)
    assert plan(raw, context=length, kv=kv, batch=3).canvas_bytes == 3 * planned.canvas_bytes
    assert planned.memory_bytes == memory.nbytes
