"""Bytes and operations of single passes against closed forms and published figures."""

from dataclasses import replace

import pytest

from sparing.config import parse_config
from sparing.config.released import RELEASED
from sparing.config.roles import KINDS
from sparing.planning.hardware import find_hardware
from sparing.planning.memory import bytes_read
from sparing.planning.parameters import bits_per_parameter, count_parameters, held_bytes
from sparing.planning.roofline import (
    attention_flops,
    decode_pass,
    denoise_pass,
    prefill_pass,
    weights_read,
)

DIFFUSION = parse_config(RELEASED["diffusiongemma-26b-a4b"])


def every(bits: float, **others: float) -> dict[str, float]:
    return {**dict.fromkeys(KINDS, bits), **others}


@pytest.mark.parametrize(
    ("bits", "gigabytes", "h100", "h200"),
    [
        (every(16), 51.98, 15.5, 10.8),
        (every(8, embedding=16), 27.47, 8.2, 5.7),
        (every(8), 25.99, 7.8, 5.4),
        (every(16, experts=4.5), 19.15, 5.7, 4.0),
        (every(4.5, embedding=16), 16.74, 5.0, 3.5),
        (every(4.5), 14.62, 4.4, 3.0),
    ],
)
def test_bytes_and_time_of_a_denoising_step(bits, gigabytes, h100, h200):
    step = denoise_pass(DIFFUSION, [], context=1, batch=1, bits=bits)
    assert step.nbytes / 1e9 == pytest.approx(gigabytes, abs=0.006)
    for name, milliseconds in (("H100", h100), ("H200", h200)):
        assert step.nbytes / find_hardware(name).bandwidth * 1e3 == pytest.approx(milliseconds, abs=0.051)


def test_operations_of_a_denoising_step():
    specs, bits = DIFFUSION.memory_specs(), every(16)
    weights = denoise_pass(DIFFUSION, [], context=1, batch=1, bits=bits).flops
    assert weights / 1e12 == pytest.approx(2.34, abs=0.006)
    for context, tera in {1024: 0.19, 8192: 0.49, 32768: 1.5, 262144: 11.1}.items():
        attention = attention_flops(DIFFUSION, specs, context, new=256)
        assert attention == 4 * 256 * (25 * 4096 * (min(context, 1023) + 256) + 5 * 8192 * (context + 256))
        assert attention / 1e12 == pytest.approx(tera, abs=0.06)
    step = denoise_pass(DIFFUSION, specs, context=8192, batch=1, bits=bits)
    assert step.flops / find_hardware("H100").bf16 * 1e3 == pytest.approx(2.9, abs=0.06)
    assert step.seconds(find_hardware("H100")) == step.nbytes / 3.35e12  # one canvas is bound by reading


def test_memory_read_by_a_denoising_step():
    """The published figures read keys and values; full layers store values alone."""
    both = [replace(spec, value_only=False) for spec in DIFFUSION.memory_specs()]
    for context, gigabytes in {1024: 0.23, 8192: 0.38, 32768: 0.88, 262144: 5.58}.items():
        assert bytes_read(both, context, 2) / 1e9 == pytest.approx(gigabytes, abs=0.006)
        saved = bytes_read(both, context, 2) - bytes_read(DIFFUSION.memory_specs(), context, 2)
        assert saved == 5 * context * 2048


def test_one_canvas_touches_every_expert_and_one_token_few():
    counts = count_parameters(DIFFUSION.tensors())
    only_experts = every(0, experts=8)
    assert weights_read(DIFFUSION, 256, only_experts) == pytest.approx(counts["experts"], rel=1e-6)
    assert weights_read(DIFFUSION, 1, only_experts) == pytest.approx(counts["experts"] * 8 / 128)


def test_several_canvases_are_nearly_free_and_then_bound_by_computing():
    machine, specs, bits = find_hardware("H100"), DIFFUSION.memory_specs(), every(16)
    one, five, ten = (denoise_pass(DIFFUSION, specs, context=1024, batch=b, bits=bits) for b in (1, 5, 10))
    assert five.seconds(machine) < 1.1 * one.seconds(machine)
    assert ten.seconds(machine) == ten.flops / machine.bf16


@pytest.mark.parametrize(("name", "row"), [("gemma-4-e2b", 17920), ("gemma-4-e4b", 21504)])
def test_per_layer_table_costs_one_row_a_token(name, row):
    config = parse_config(RELEASED[name])
    counts = count_parameters(config.tensors())
    assert weights_read(config, 1, every(0, lookup=16)) == row
    assert 2 * counts["lookup"] / 1e9 == pytest.approx({17920: 4.70, 21504: 5.64}[row], abs=0.006)


@pytest.mark.parametrize(("name", "share"), [("gemma-4-e2b", 0.6973), ("gemma-4-e4b", 0.4206)])
def test_prompt_positions_stop_at_the_last_producer(name, share):
    """Share of the layers' weights that come after the last layer storing keys and values."""
    config = parse_config(RELEASED[name])
    layers = {k: v for k, v in config.tensors().items() if ".layers." in k}
    matrices = count_parameters(layers)["matrices"]
    outside = count_parameters({k: v for k, v in config.tensors().items() if k not in layers})["matrices"]
    specs, bits, tokens = config.memory_specs(), every(16), 4096
    prompt, one_more = (prefill_pass(config, specs, tokens=n, batch=1, bits=bits).flops for n in (tokens, tokens + 1))
    full = sum(s.window is None for s in specs if s.shared_with is None)
    sliding = sum(s.window is not None for s in specs if s.shared_with is None)
    seen = 4 * 8 * (full * 512 * (tokens + 1) + sliding * 256 * 512)
    per_token = (one_more - prompt - seen) / 2
    assert 1 - (per_token - outside) / matrices == pytest.approx(share, abs=2e-4)


def test_prefill_counts_pairs_as_a_loop_does():
    config = parse_config(RELEASED["mistral-7b"])
    specs, bits = config.memory_specs(), every(16)
    for tokens in (1, 100, 4096, 5000):
        pairs = sum(min(position + 1, 4096) for position in range(tokens))
        multiplied = 2 * 32 * (4096 * 4096 * 2 + 4096 * 1024 * 2 + 3 * 4096 * 14336)
        expected = tokens * multiplied + 2 * 32000 * 4096 + 32 * 4 * 32 * 128 * pairs
        assert prefill_pass(config, specs, tokens=tokens, batch=1, bits=bits).flops == expected


def test_a_layer_that_shares_reads_but_does_not_hold():
    config = parse_config(RELEASED["gemma-4-e2b"])
    specs = config.memory_specs()
    held = sum(spec.nbytes(10000, 2) for spec in specs)
    assert bytes_read(specs, 10000, 2) == 2 * 2 * 10000 * 7 * 512 + 2 * 2 * 511 * 28 * 256
    assert held == 2 * 2 * 10000 * 3 * 512 + 2 * 2 * 511 * 12 * 256


def test_long_decoding_of_llama():
    """Weights 16.06 GB and cache 17.18 GB at 128 K tokens: attention alone doubles the time of a token."""
    config = parse_config(RELEASED["llama-3.1-8b"])
    bits = bits_per_parameter(count_parameters(config.tensors()), held_bytes(config))
    step = decode_pass(config, config.memory_specs(), context=131072, batch=1, bits=bits)
    embedding = 2 * 128256 * 4096  # looked up, not read
    assert step.nbytes == pytest.approx(16.06e9 - embedding + 17.18e9, rel=1e-3)
