"""Every branch of Gemma 4 against transformers, on tiny random models loaded from saved checkpoints."""

import copy
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    Gemma4UnifiedForCausalLM,
    Gemma4UnifiedTextConfig,
)

from sparing.kernels import dispatch, experts
from sparing.models.batch import Row
from tests.conformance.reference import assert_same, load, run_chunked, run_reference, save_random
from tests.kernel_sets import using
from tests.tiny import FULL, GEMMA, KEYS_ARE_VALUES, SLIDING, random_ids

s, f = SLIDING, FULL
COMMON = GEMMA | {
    "vocab_size": 97,
    "vocab_size_per_layer_input": 97,
    "hidden_size": 48,
    "intermediate_size": 40,
    "global_head_dim": 16,
}
E_SERIES = COMMON | {
    "num_hidden_layers": 7,
    "layer_types": [s, s, f, s, s, s, f],
    "hidden_size_per_layer_input": 6,
    "num_kv_shared_layers": 3,
    "use_double_wide_mlp": True,
    "num_key_value_heads": 1,
}
K_IS_V = COMMON | KEYS_ARE_VALUES
DENSE = K_IS_V | {"num_hidden_layers": 6, "layer_types": [s, s, f, s, s, f]}
MOE = K_IS_V | {
    "num_hidden_layers": 3,
    "layer_types": [s, s, f],
    "global_head_dim": 24,
    "enable_moe_block": True,
    "num_experts": 6,
    "top_k_experts": 3,
    "moe_intermediate_size": 20,
}
SLOW_ROPE = {
    s: {"rope_type": "default", "rope_theta": 500.0},
    f: {"rope_type": "proportional", "partial_rotary_factor": 0.5, "rope_theta": 2e4, "factor": 4.0},
}

CASES = {
    "E-series": E_SERIES,
    "dense K=V": DENSE,
    "mixture of experts": MOE,
    "unified": DENSE,
    "biased E-series": E_SERIES | {"attention_bias": True},
    "biased K=V": DENSE | {"attention_bias": True},
    "untied head": DENSE | {"tie_word_embeddings": False},
    "first layer full": DENSE | {"layer_types": [f, s, f, s, s, f]},
    "last layer forced to full": DENSE | {"layer_types": [s, s, f, s, s, s]},
    "layer types by default": DENSE | {"layer_types": None},
    "global kv heads ignored": DENSE | {"attention_k_eq_v": False},
    "equal head sizes": DENSE | {"global_head_dim": 8, "attention_k_eq_v": False, "num_global_key_value_heads": None},
    "window of 1": DENSE | {"sliding_window": 1},
    "window of 2": E_SERIES | {"sliding_window": 2},
    "window beyond everything": E_SERIES | {"sliding_window": 200},
    "odd half heads": E_SERIES | {"head_dim": 10, "global_head_dim": 14},
    "per-layer inputs of 5": E_SERIES | {"hidden_size_per_layer_input": 5},
    "per-layer inputs of 7": E_SERIES | {"hidden_size_per_layer_input": 7, "num_kv_shared_layers": 0},
    "sharing without per-layer inputs": E_SERIES | {"hidden_size_per_layer_input": 0},
    "4 of 7 experts": MOE | {"num_experts": 7, "top_k_experts": 4},
    "all experts": MOE | {"top_k_experts": 6},
    "two full layers in a row": DENSE | {"layer_types": [s, f, f, s, f, f]},
    "scaled rotation": DENSE | {"rope_parameters": SLOW_ROPE},
    "no soft cap": DENSE | {"final_logit_softcapping": None},
    "shared K=V": E_SERIES | {"attention_k_eq_v": True, "num_global_key_value_heads": 2, "num_key_value_heads": 2},
    "eleven layers of everything": MOE
    | {
        "num_hidden_layers": 11,
        "layer_types": [s, s, f, s, f, f, s, s, f, s, f],
        "hidden_size_per_layer_input": 6,
        "num_kv_shared_layers": 4,
        "use_double_wide_mlp": True,
    },
}
DEEP = {"eleven layers of everything"}  # rounding alone grows with depth


def ids(length: int, seed: int = 1) -> Tensor:
    """Random ids [length]: the tolerances below were measured with these."""
    return random_ids(length, seed, COMMON["vocab_size"])


@cache
def pair(case: str):
    """(the reference, our model loaded from its checkpoint)"""
    settings = dict(CASES[case])
    config_class, model_class = Gemma4TextConfig, Gemma4ForCausalLM
    if case == "unified":
        config_class, model_class = Gemma4UnifiedTextConfig, Gemma4UnifiedForCausalLM
        del settings["vocab_size_per_layer_input"], settings["hidden_size_per_layer_input"]
    with TemporaryDirectory() as folder:
        theirs = save_random(model_class, config_class(**settings), Path(folder), seed=1)
        return theirs, load(Path(folder))


def tolerance(case: str, value: float) -> float:
    return max(value, 2e-4) if case in DEEP else value


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("kernels", dispatch.available())
def test_hidden_states_and_logits(case, kernels):
    """Plain PyTorch within the rounding of one order of sums; native kernels, which fuse and reorder, within four.

    Or within three times what the reference itself is off by, against float64: on some CPUs sums of few tokens are made
    in another order for shapes that differ in nothing but a dimension of 1.
    """
    with using(kernels):
        compare_hidden_states_and_logits(case, *((2e-5, 5e-5) if kernels == dispatch.REFERENCE else (8e-5, 1e-4)))


def compare_hidden_states_and_logits(case, of_hidden, of_logits):
    _, ours = pair(case)
    window = min(CASES[case]["sliding_window"], 17)
    for length in sorted({1, max(window - 1, 1), window, window + 1, 17}):
        tokens = ids(length)
        reference, exact = both_references(case, length)
        hidden = ours.hidden_states(tokens)
        assert len(hidden) == len(reference.hidden_states) == CASES[case]["num_hidden_layers"] + 1
        with torch.no_grad():  # the reference's last entry has the final norm applied
            hidden[-1] = ours.model.norm(hidden[-1])
        off = max(largest(a - b) for a, b in zip(reference.hidden_states, exact.hidden_states, strict=True))
        for mine, other in zip(hidden, reference.hidden_states, strict=True):
            assert_same(mine, other[0], max(tolerance(case, of_hidden), 3 * off))
        off = largest(reference.logits - exact.logits)
        assert_same(ours.logits(tokens), reference.logits[0], max(tolerance(case, of_logits), 3 * off))


@cache
def in_float64(case):
    return copy.deepcopy(pair(case)[0]).double()


@cache
def both_references(case, length):
    """What the reference computes of `ids(length)` in float32 and in float64: once for all sets of kernels."""
    return run_reference(pair(case)[0], ids(length)), run_reference(in_float64(case), ids(length))


def largest(x):
    return x.abs().max().item()


@pytest.mark.parametrize("case", CASES)
def test_chunked_logits(case):
    theirs, ours = pair(case)
    tokens = ids(19)
    reference = run_reference(theirs, tokens).logits[0]
    for chunks in ([3, 6, *[1] * 10], [1] * 19, [12, 1, 1, 5], [4, 1, 14]):
        assert_same(run_chunked(ours, tokens, chunks), reference, tolerance(case, 1e-4))


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case]["sliding_window"] > 1])
def test_cached_logits_and_what_is_held(case):
    """The reference's own cache, step by step. With a window of 1 its cached run is wrong."""
    theirs, ours = pair(case)
    cache, memory = DynamicCache(config=theirs.config), ours.memory()
    for chunk in ids(13).split([3, 6, 1, 1, 1, 1]):
        with torch.no_grad():
            reference = theirs(input_ids=chunk[None], past_key_values=cache, output_hidden_states=True).logits[0]
        assert_same(ours.logits(chunk, memory), reference, tolerance(case, 1e-4))
        producers = [i for i, spec in enumerate(ours.config.memory_specs()) if spec.shared_with is None]
        for i in producers:
            _, kv_heads, held, _ = cache.layers[i].keys.shape
            assert memory.entries(i).shape == (kv_heads, held)


@pytest.mark.parametrize("case", CASES)
def test_only_wanted_positions(case):
    """The same last logits although other positions stop at the last layer that produces keys and values."""
    theirs, ours = pair(case)
    tokens = ids(17)
    reference = run_reference(theirs, tokens).logits[0]
    for wanted in (1, 4):
        hidden = ours.run([Row(tokens, ours.memory(), wanted=wanted)])
        assert_same(ours.head(hidden), reference[-wanted:], tolerance(case, 5e-5))


@pytest.mark.parametrize("case", CASES)
def test_left_padded_reference_rows(case):
    """Rows that the reference pads on the left are, for us, rows of different lengths."""
    theirs, ours = pair(case)
    rows = [ids(length, seed=length) for length in (11, 4, 7)]
    padded = torch.zeros(3, 11, dtype=torch.long)
    mask = torch.zeros(3, 11, dtype=torch.long)
    for i, row in enumerate(rows):
        padded[i, 11 - len(row) :], mask[i, 11 - len(row) :] = row, 1
    with torch.no_grad():
        reference = theirs(input_ids=padded, attention_mask=mask, use_cache=False, output_hidden_states=True).logits
    hidden = ours.run([Row(row, ours.memory()) for row in rows])
    logits = ours.head(hidden).split([len(row) for row in rows])
    for mine, other, row in zip(logits, reference, rows, strict=True):
        assert_same(mine, other[-len(row) :], tolerance(case, 1e-4))


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].get("enable_moe_block")])
def test_router_choices(case, monkeypatch):
    theirs, ours = pair(case)
    expected, chosen = [], []
    route = experts.route_topk

    def recording(*arguments):
        chosen.append(route(*arguments))
        return chosen[-1]

    monkeypatch.setattr(experts, "route_topk", recording)
    hooks = [
        layer.router.register_forward_hook(lambda module, inputs, output: expected.append(output))
        for layer in theirs.model.layers
    ]
    tokens = ids(17)
    run_reference(theirs, tokens)
    with using(dispatch.REFERENCE):
        ours.hidden_states(tokens)
    for hook in hooks:
        hook.remove()
    assert len(chosen) == len(expected) == CASES[case]["num_hidden_layers"]
    for (weights, choice), (_, expected_weights, expected_choice) in zip(chosen, expected, strict=True):
        assert torch.equal(choice, expected_choice)
        assert_same(weights, expected_weights, tolerance(case, 2e-5))


def test_loss_of_softcapped_logits():
    theirs, ours = pair("E-series")
    tokens = ids(17)
    labels = tokens.clone()
    labels[:5] = -100
    reference = run_reference(theirs, tokens, labels=labels[None]).loss
    loss = torch.nn.functional.cross_entropy(ours.logits(tokens)[:-1], labels[1:], ignore_index=-100)
    assert abs(loss - reference) < 1e-5
