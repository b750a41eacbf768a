"""`plan`: counts, bytes and times of released models, and its errors."""

import json

import pytest

from sparing.config import parse_config, planned_config
from sparing.config.released import RELEASED
from sparing.planning import Hardware, plan

GIB = 2**30


def released_bytes(name: str, context: int) -> dict:
    return dict(plan(name, context=context).memory_by_kind)


@pytest.mark.parametrize(
    ("name", "parameters", "active"),
    [
        ("gemma-3-270m", 268_098_176, 268_098_176),
        ("gemma-3-1b", 999_885_952, 999_885_952),
        ("gemma-3-4b", 3_880_263_168, 3_880_263_168),
        ("gemma-4-e2b", 4_628_569_344, 2_279_759_104),
        ("gemma-4-e4b", 7_463_013_376, 4_644_441_088),
        ("gemma-4-12b", 11_907_350_272, 11_907_350_272),
        ("gemma-4-26b-a4b", 25_233_141_760, 3_822_530_560),
        ("gemma-4-31b", 30_697_345_280, 30_697_345_280),
        # The Gemma 4 stack and a gated MLP of 3 x 2816 x 2112 with its norm, which encoding text does not use.
        ("diffusiongemma-26b-a4b", 25_233_141_760 + 3 * 2816 * 2112 + 2816, 3_822_530_560),
        ("llama-3.1-8b", 8_030_261_248, 8_030_261_248),
        ("qwen3-8b", 8_190_735_360, 8_190_735_360),
        ("mistral-7b", 7_241_732_096, 7_241_732_096),
    ],
)
def test_parameter_counts_are_the_published_ones(name, parameters, active):
    result = plan(name, context=1)
    assert (result.parameters, result.active_parameters) == (parameters, active)
    assert result.weight_bytes == 2 * parameters  # all are released in bfloat16


def test_the_name_in_turboquants_tables_means_the_published_model():
    assert plan("ministral-7b", context=32768).to_dict() == plan("mistral-7b", context=32768).to_dict() | {
        "model": "ministral-7b"
    }


def test_every_released_config_is_understood_completely():
    for raw in RELEASED.values():
        assert not planned_config(raw).unknown


@pytest.mark.parametrize(
    ("context", "gib"),
    [
        (32768, {"e2b": 0.193, "e4b": 0.519, "12b": 0.812, "26b-a4b": 0.820, "31b": 3.280}),
        (131072, {"e2b": 0.756, "e4b": 2.019, "12b": 2.312, "26b-a4b": 2.695, "31b": 10.780}),
        (262144, {"e2b": 1.506, "e4b": 4.019, "12b": 4.312, "26b-a4b": 5.195, "31b": 20.780}),
    ],
)
def test_memory_of_gemma4_matches_the_closed_form(context, gib):
    """The figures store keys and values everywhere; layers with K = V really store half."""
    for size, expected in gib.items():
        held = released_bytes(f"gemma-4-{size}", context)
        both = held["sliding"] + held.get("full", 0) + 2 * held.get("value_only", 0)
        assert both / GIB == pytest.approx(expected, abs=6e-4)


def test_memory_of_gemma4_with_keys_rebuilt_from_values():
    for size, expected in {"12b": 2.312, "26b-a4b": 2.695, "31b": 10.780}.items():
        assert plan(f"gemma-4-{size}", context=262144).memory_bytes / GIB == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize(
    ("name", "marginal"),
    [("gemma-4-e2b", 6144), ("gemma-4-e4b", 16384), ("gemma-4-12b", 16384 // 2), ("gemma-4-31b", 81920 // 2)],
)
def test_memory_grows_by_the_growing_layers_alone_beyond_the_window(name, marginal):
    assert plan(name, context=5001).memory_bytes - plan(name, context=5000).memory_bytes == marginal


def test_memory_of_plain_models():
    assert plan("llama-3.1-8b", context=131072).memory_bytes == 16 * GIB
    assert plan("llama-3.1-8b", context=1000, batch=3).memory_bytes == 3 * 1000 * 131072
    assert plan("mistral-7b", context=32768).memory_by_kind == {"sliding": 4095 * 131072}
    assert plan("llama-3.1-8b", context=32768, kv="window:4096").memory_bytes == 4095 * 131072


def test_decode_ceiling_of_gemma4():
    """Tokens per second of one H100 at 3.35 TB/s, bfloat16, short context: limited by reading the active weights."""
    for size, expected in {"31b": 54.6, "26b-a4b": 438, "e2b": 734, "e4b": 361}.items():
        result = plan(f"gemma-4-{size}", context=16, hardware="H100")
        assert result.seconds_per_token is not None
        assert 1 / result.seconds_per_token == pytest.approx(expected, rel=2e-3)


@pytest.mark.parametrize(
    ("hardware", "weights", "per_second"),
    [
        ("H100", "fp8", {2: 10400, 8: 3470, 12: 2400, 16: 1835, 24: 1250, 48: 637}),
        ("H200", "fp8", {2: 15000, 8: 4990, 12: 3455, 16: 2640, 24: 1800, 48: 917}),
        ("H100", "nvfp4", {2: 17100, 8: 5690, 12: 3940, 16: 3010, 24: 2050, 48: 1045}),
        ("H100", "stored", {2: 5505, 8: 1835, 12: 1270, 16: 970, 24: 660, 48: 337}),
    ],
)
def test_block_diffusion_throughput(hardware, weights, per_second):
    for steps, expected in per_second.items():
        result = plan("diffusiongemma-26b-a4b", context=1, hardware=hardware, weights=weights, steps=steps)
        assert result.seconds_per_token is not None
        assert 1 / result.seconds_per_token == pytest.approx(expected, rel=1e-2)


def test_break_even_of_block_diffusion_with_one_token_a_pass():
    one = plan("gemma-4-26b-a4b", context=1).bytes_per_token
    step = plan("diffusiongemma-26b-a4b", context=1, steps=47).bytes_per_token * 256 / 48
    assert one == pytest.approx(7.64e9, rel=2e-3)
    assert step / one == pytest.approx(6.8, rel=5e-3)


def test_quantised_weights_have_the_vocabulary_in_eight_bits():
    counted = plan("gemma-4-31b", context=1)
    embedding = 262144 * 5376
    for weights, bits in {"fp8": 8, "int8": 8, "int4": 4.5, "nvfp4": 4.5, "mxfp4": 4.25}.items():
        expected = (counted.parameters - embedding) * bits / 8 + embedding
        assert plan("gemma-4-31b", context=1, weights=weights).weight_bytes == pytest.approx(expected, rel=1e-3)


def test_a_batch_shares_the_weights():
    one, many = (plan("llama-3.1-8b", context=1, batch=batch, hardware="H100") for batch in (1, 16))
    assert many.bytes_per_token == pytest.approx(one.bytes_per_token / 16, rel=1e-3)
    assert many.flops_per_token == one.flops_per_token


def test_generation_takes_prompt_and_new_tokens():
    machine = Hardware("slow", memory=64e9, bandwidth=1e12, bf16=1e13, fp8=1e13)
    result = plan("llama-3.1-8b", context=1100, new_tokens=100, hardware=machine)
    assert result.seconds_per_token is not None
    assert result.generation_seconds is not None
    layers = 32 * (2 * 4096 * 4096 + 2 * 4096 * 1024 + 3 * 4096 * 14336)
    prompt = 2 * layers * 1000 / 1e13
    assert result.generation_seconds == pytest.approx(100 * result.seconds_per_token + prompt, rel=0.02)
    assert result.hardware == "slow"
    assert result.fits


def test_fits():
    assert plan("gemma-4-31b", context=131072, hardware="H100").fits is True
    assert plan("gemma-4-31b", context=131072, hardware="rtx-4090").fits is False
    assert plan("gemma-4-31b", context=131072).fits is None


def test_accepts_config_dict_parsed_config_and_folder(tmp_path):
    raw = RELEASED["gemma-4-e2b"]
    (tmp_path / "config.json").write_text(json.dumps(raw))
    figures = [
        {**plan(source, context=4096, hardware="L4").to_dict(), "model": ""}
        for source in ("gemma-4-e2b", raw, parse_config(raw), tmp_path, str(tmp_path))
    ]
    assert all(other == figures[0] for other in figures)
    json.dumps(figures[0])


def test_table_shows_the_figures():
    text = plan("diffusiongemma-26b-a4b", context=4096, hardware="H200", new_tokens=256).table()
    for part in ("25.25 G", "3.823 G", "48 a canvas", "H200: fits", "value_only layers", "256 new tokens"):
        assert part in text
    assert "262144 tokens" in plan("gemma-4-31b", context=300000).table()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"source_or_config": "gemma-4-e3b"}, "gemma-4-e2b, gemma-4-e4b"),
        ({"source_or_config": 7}, "int"),
        ({"context": 0}, "context is 0"),
        ({"context": 1.5}, "context is 1.5"),
        ({"batch": -1}, "batch is -1"),
        ({"kv": "dens"}, "dense"),
        ({"weights": "int5"}, "stored, int8, int4, nvfp4, mxfp4, fp8"),
        ({"hardware": "H101"}, "A100, H100, H200"),
        ({"steps": 8}, "no denoising steps"),
        ({"new_tokens": 101}, "context counts prompt and new tokens"),
    ],
)
def test_mistakes_are_explained(arguments, message):
    arguments = {"source_or_config": "qwen3-8b", "context": 100, **arguments}
    with pytest.raises(ValueError, match=message):
        plan(arguments.pop("source_or_config"), **arguments)


def test_a_budget_bounds_memory_and_says_by_how_much_it_swings():
    """Qwen3-8B: 147,456 bytes a token; of 32,768 tokens a budget of 3,072 holds a tenth, and its positions."""
    dense = plan("qwen3-8b", context=32768)
    pruned = plan("qwen3-8b", context=32768, kv="triattention:3072")
    assert dense.memory_bytes == 32768 * 147456
    held = 3072 + (32768 - 3072) % 128
    assert pruned.memory_bytes == held * (147456 + 36 * 8 * 4)
    assert dense.memory_bytes / pruned.memory_bytes == pytest.approx(10.58, abs=0.01)
    assert "up to 3199 entries" in pruned.notes[0] and pruned.bytes_per_token < dense.bytes_per_token
    with pytest.raises(ValueError, match="no layer of this model grows"):
        plan("mistral-7b", context=1000, kv="triattention:64")
