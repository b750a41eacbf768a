"""The list of practice problems: complete, found by name, and the page that is made from it."""

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparing.learn.problems import PROBLEMS, markdown

ROOT = Path(__file__).parents[2]
DATA = Path(os.environ.get("SPARING_DATA", ROOT.parent / "shared"))
BUILT = [(number, name) for number, problem in PROBLEMS.items() for name in problem.functions]

# What the problems call each argument, in order, with its default (...: none). More may follow, with defaults.
SIGNATURES: dict[str, dict[str, object]] = {
    "lightning_index": {**dict.fromkeys(("q", "K", "w"), ...), "visible": None},
    "select_topk": {"scores": ..., "k": ..., "visible": None},
    "sparse_attention": dict.fromkeys(("q", "kv", "idx", "sink", "scale"), ...),
    "compress_windows": dict.fromkeys(("kv", "gate", "ape"), ...),
    "csa_compress": {**dict.fromkeys(("kv", "gate", "ape"), ...), "state": None},
    "hca_attention": dict.fromkeys(("q", "kv", "entries", "sink", "window", "m", "scale"), ...),
    "csa_attention": dict.fromkeys(("q", "kv", "entries", "idx", "sink", "window", "m", "scale"), ...),
    "qk_norm_attention": {
        **dict.fromkeys(("q", "k0", "v0", "q_weight", "k_weight", "positions", "inv_freq"), ...),
        "window": None,
        "scale": 1.0,
    },
    "rms_norm": {"x": ..., "weight": None, "eps": 1e-6},
    "proportional_inv_freq": {"head_dim": ..., "theta": ..., "fraction": ..., "factor": 1.0},
    "apply_rope": {"x": ..., "positions": ..., "inv_freq": ...},
    "per_layer_inputs": dict.fromkeys(("ids", "scaled_embeds", "table", "proj", "norm_weight", "num_layers"), ...),
    "per_layer_gate": dict.fromkeys(("x", "ple_i", "w_gate", "w_proj", "norm_weight"), ...),
    "kv_share_map": {"layer_types": ..., "num_shared": ...},
    "mean_resultant_length": {"q": ..., "dim": 0, "pairing": "half"},
    "q_statistics": {"q": ...},
    "rope_logit_series": {
        **dict.fromkeys(("q", "k", "delta", "inv_freq"), ...),
        "pairing": "half",
        "attention_scaling": 1.0,
    },
    "trig_score": dict.fromkeys(("k_rot", "q_center", "inv_freq", "t0", "offsets"), ...),
    "norm_score": dict.fromkeys(("k", "q_center", "q_abs_mean"), ...),
    "geometric_offsets": {"max_offset": 65536},
    "aggregate_gqa": {"scores": ...},
    "triattention_keep": {
        **dict.fromkeys(("k_rot", "q_mean", "q_abs_mean", "inv_freq", "t0", "keep"), ...),
        "mode": "per_head",
        "max_offset": 65536,
        "pairing": "half",
    },
    "random_rotation": {"d": ..., "seed": None, "A": None, "dtype": torch.float64},
    "lloyd_max_codebook": {"d": ..., "bits": ...},
    "tq_quantize": {"x": ..., "Π": ..., "bits": ..., "codebook": None, "scale": "norm"},
    "tq_dequantize": dict.fromkeys(("codes", "scale", "Π", "codebook"), ...),
    "qjl_sketch": {"r": ..., "S": ...},
    "qjl_inner_product": {**dict.fromkeys(("y", "signs", "norm", "S"), ...), "orthogonal": False},
    "tq_prod_quantize": dict.fromkeys(("x", "Π", "S", "bits"), ...),
    "tq_prod_inner_product": dict.fromkeys(("y", "codes", "signs", "norm", "residual", "Π", "S", "bits"), ...),
    "tq_attention": dict.fromkeys(
        ("q", "codes_k", "scale_k", "codes_v", "scale_v", "Π_k", "Π_v", "codebooks", "scaling"), ...
    ),
    "nvfp4_quantize": {"w": ...},
    "nvfp4_dequantize": dict.fromkeys(("packed", "scale", "scale_2"), ...),
    "sinkhorn": {"logits": ..., "iters": 20, "eps": 1e-6},
    "hyper_connection": {
        **dict.fromkeys(("X", "F", "fn", "base", "scale"), ...),
        "iters": 20,
        "eps": 1e-6,
        "norm_eps": 1e-6,
    },
    "hc_pre": {**dict.fromkeys(("X", "fn", "base", "scale"), ...), "iters": 20, "eps": 1e-6, "norm_eps": 1e-6},
    "hc_post": dict.fromkeys(("X", "y", "post", "comb"), ...),
    "hc_head": {**dict.fromkeys(("X", "fn", "base", "scale"), ...), "eps": 1e-6, "norm_eps": 1e-6},
    "hc_static": dict.fromkeys(("X", "F", "a_m", "A_r", "b"), ...),
    "hybrid_cache_bytes": {
        **dict.fromkeys(("pattern", "tokens", "kv_heads", "head_dim", "mamba_heads", "mamba_head_dim"), ...),
        **dict.fromkeys(("state", "groups", "kernel"), ...),
        "kv_bytes": 2,
        "ssm_bytes": 4,
        "conv_bytes": 2,
    },
    "moe_layer_cost": {
        **dict.fromkeys(("H", "F", "E", "k"), ...),
        "latent": None,
        "shared": 0,
        "tokens": 1,
        "bytes_per_weight": 2,
    },
    "latent_moe": {**dict.fromkeys(("x", "fc1", "fc2", "up", "down", "idx", "w"), ...), "shared": None},
    "route": {
        **dict.fromkeys(("x", "gate", "bias", "k"), ...),
        "n_group": 1,
        "topk_group": 1,
        "normalize": True,
        "scale": 1.0,
    },
    "LatentMoELayer": {"config": ...},
    "ssd_scan": {**dict.fromkeys(("x", "dt", "A", "B", "C"), ...), "D": None, "state": None, "chunk": None},
    "uniform_corrupt": {"x0": ..., "t": ..., "vocab_size": ..., "generator": None},
    "entropy_bound_accept": {"logits": ..., "bound": ...},
    "StableAndConfident": {"stability_threshold": ..., "confidence_threshold": ...},
    "linear_temperature": {"steps_remaining": ..., "max_steps": ..., "t_min": ..., "t_max": ...},
    "encoder_mask": {"P": ..., "window": None, "valid": None, "image_blocks": ()},
    "canvas_mask": {"P": ..., "L": ..., "window": None, "valid": None},
    "block_diffusion_training_mask": {"prefix": ..., "response": ..., "block": ..., "window": None},
    "newton_schulz": {"G": ..., "schedule": "deepseek_v4", "dtype": None},
    "muon_update": {
        **dict.fromkeys(("W", "G", "M", "lr"), ...),
        "momentum": 0.95,
        "weight_decay": 0.1,
        "rms": 0.18,
        "schedule": "deepseek_v4",
        "dtype": None,
    },
    "mtp_draft": dict.fromkeys(("head", "token", "hidden", "kv", "depth"), ...),
    "verify_greedy": dict.fromkeys(("drafts", "logits"), ...),
    "verify_sample": dict.fromkeys(("drafts", "q", "p", "u"), ...),
    "generate_block_diffusion": {
        "model": ...,
        "input_ids": ...,
        "generation_config": ...,
        "attention_mask": None,
        "streamer": None,
        "generator": None,
    },
}


def test_all_43_problems_in_order():
    assert len(PROBLEMS) == 43
    assert list(PROBLEMS) == sorted(PROBLEMS)
    assert all(number == problem.number for number, problem in PROBLEMS.items())
    assert {problem.difficulty for problem in PROBLEMS.values()} == {"Easy", "Medium", "Hard"}
    assert len({problem.system for problem in PROBLEMS.values()}) == 7
    names = [name for problem in PROBLEMS.values() for name in problem.names]
    assert len(names) == len(set(names))


def test_facts_are_those_of_the_list():
    path = DATA / "problems.json"
    if not path.exists():
        pytest.skip(f"the list of problems is not at {path}: set SPARING_DATA to its folder")
    for fact in json.loads(path.read_text()):
        problem = PROBLEMS[fact["number"]]
        for key in ("system", "difficulty", "tags", "what"):
            assert getattr(problem, key) == fact[key]
        assert list(problem.names) == fact["functions"]


@pytest.mark.parametrize(("number", "name"), BUILT)
def test_every_named_function_exists_with_its_signature(number, name):
    function = PROBLEMS[number].functions[name]
    assert function.__name__ == name
    assert inspect.getdoc(function)
    assert name in sys.modules[function.__module__].__all__
    parameters = list(inspect.signature(function).parameters.values())
    expected = SIGNATURES[name]
    assert [parameter.name for parameter in parameters[: len(expected)]] == list(expected)
    for parameter, default in zip(parameters, expected.values(), strict=False):
        assert parameter.default == (inspect.Parameter.empty if default is ... else default)
    assert all(parameter.default is not inspect.Parameter.empty for parameter in parameters[len(expected) :])


def test_the_systems_that_are_built_are_built_whole():
    for problem in PROBLEMS.values():
        if problem.system in ("Gemma 4", "DiffusionGemma", "TriAttention", "TurboQuant"):
            assert len(problem.functions) == len(problem.names)


def test_stopping_rule_is_called_and_reset():
    rule = PROBLEMS[415].functions["StableAndConfident"]
    assert list(inspect.signature(rule.__call__).parameters) == ["self", "argmax", "logits"]
    assert list(inspect.signature(rule.reset).parameters) == ["self"]


def test_what_is_missing_says_so():
    missing = next((p, name) for p in PROBLEMS.values() for name in p.names if p.home(name) is None)
    problem, name = missing
    assert name not in list(problem.functions)
    assert problem.functions.get(name) is None
    with pytest.raises(LookupError, match=f"{name} .*{problem.number}.* is not built yet"):
        problem.functions[name]
    with pytest.raises(LookupError, match=r"problem 182 has no function 'layer_norm', it has rms_norm"):
        PROBLEMS[182].functions["layer_norm"]


def test_the_page_is_current():
    assert (ROOT / "docs" / "problems.md").read_text() == markdown(), "run `make docs`"


def test_the_module_prints_the_page_and_imports_no_torch():
    code = "import sys, sparing.learn.problems as p; print(p.markdown(), end=''); assert 'torch' not in sys.modules"
    for command in (["-c", code], ["-m", "sparing.learn.problems"]):
        run = subprocess.run([sys.executable, *command], capture_output=True, text=True, check=True)
        assert run.stdout == markdown()


def test_every_row_of_the_page():
    rows = [line for line in markdown().splitlines() if line[2:5].isdigit()]
    assert [int(row[2:5]) for row in rows] == list(PROBLEMS)
    for row, problem in zip(rows, PROBLEMS.values(), strict=True):
        for name in problem.names:
            home = problem.home(name)
            assert (f"`{name}`: not yet" if home is None else f"`{home}.{name}`") in row
