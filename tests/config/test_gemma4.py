"""Gemma 4's config: sharing, defaults and the sizes of the released models."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sparing.config import parse_config
from sparing.config.gemma4 import kv_share_map
from sparing.config.released import RELEASED
from tests.tiny import CONFIGS

s, f = "sliding_attention", "full_attention"


def test_released_share_maps():
    e2b = kv_share_map(([s] * 4 + [f]) * 7, 20)
    assert e2b[:15] == list(range(15))
    assert e2b[15:] == [14 if (i + 1) % 5 == 0 else 13 for i in range(15, 35)]
    e4b = kv_share_map(([s] * 5 + [f]) * 7, 18)
    assert e4b[:24] == list(range(24))
    assert e4b[24:] == [23 if (i + 1) % 6 == 0 else 22 for i in range(24, 42)]


@given(st.lists(st.sampled_from([s, f]), min_size=1, max_size=12), st.integers(-1, 13))
def test_a_consumer_reads_the_last_producer_of_its_kind(kinds, shared):
    first = len(kinds) - shared
    missing = not 0 <= shared <= len(kinds) or not set(kinds[first:]) <= set(kinds[:first])
    if missing:
        with pytest.raises(ValueError):
            kv_share_map(kinds, shared)
        return
    for i, source in enumerate(kv_share_map(kinds, shared)):
        if i < first:
            assert source == i
        else:
            assert source == max(j for j in range(first) if kinds[j] == kinds[i])


def test_the_error_names_the_layer_without_a_producer():
    with pytest.raises(ValueError, match=r"layer 3 \(full_attention\)"):
        kv_share_map([s, s, s, f], 1)


def test_consumers_store_nothing():
    specs = parse_config(CONFIGS["shared"]).memory_specs()
    assert [spec.shared_with for spec in specs] == [None, None, None, 1, 2, 1]
    assert [spec.entries(9) for spec in specs] == [4, 9, 4, 0, 0, 0]


def test_double_width_belongs_to_consumers():
    config = parse_config(CONFIGS["shared"] | {"use_double_wide_mlp": True})
    assert [layer.intermediate_size for layer in config.layers] == [24, 24, 24, 48, 48, 48]


def test_defaults_of_absent_keys():
    config = parse_config({"model_type": "gemma4_text", "num_hidden_layers": 12})
    assert [layer.kind for layer in config.layers] == ([s] * 5 + [f]) * 2
    assert config.hidden_size_per_layer_input == 256
    assert {layer.head_dim for layer in config.layers if layer.kind == f} == {512}
    assert config.rope[f].rope_type == "proportional"
    unified = parse_config({"model_type": "gemma4_unified_text", "num_hidden_layers": 12})
    assert unified.hidden_size_per_layer_input == 0


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("gemma-4-e2b", 4_628_569_344),
        ("gemma-4-e4b", 7_463_013_376),
        ("gemma-4-12b", 11_907_350_272),
        ("gemma-4-26b-a4b", 25_233_141_760),
        ("gemma-4-31b", 30_697_345_280),
    ],
)
def test_parameters_of_the_releases(name, parameters):
    """Counted from the tensors a checkpoint must hold, without the layer scalars."""
    total = 0
    for tensor, (shape, _) in parse_config(RELEASED[name]).tensors().items():
        size = 1
        for n in shape:
            size *= n
        total += 0 if tensor.endswith("layer_scalar") else size
    assert total == parameters


def test_denoiser_tensors_of_the_release():
    config = parse_config(RELEASED["diffusiongemma-26b-a4b"])
    assert len(config.tensors()) == 691
    assert config.canvas_length == 256
    assert all(layer.value_is_key == (layer.kind == f) for layer in config.layers)
