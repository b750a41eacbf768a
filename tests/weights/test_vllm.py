"""What vLLM's loaders ask of a folder, stated here from its source: vLLM is not installed where tests run.

Sources: vllm 0.32 `quantization/modelopt.py` (ModelOptQuantConfigBase.from_config, is_layer_excluded,
ModelOptNvFp4Config), `quantization/compressed_tensors/schemes/` (w8a8_fp8,
w8a8_int8 and wNa16) and `compressed_tensors_moe/` (w8a8_fp8), `models/nemotron_h.py` and `models/gemma4.py`.
"""

import json
from fnmatch import fnmatch

import pytest
import torch
from safetensors.torch import load_file

from sparing import load
from sparing.weights.convert import quantize
from tests.tiny import PACKABLE, saved

LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
FUSED = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
LLAMA, HYBRID = PACKABLE["llama"] | {"dtype": "bfloat16"}, PACKABLE["hybrid"]
H, F = LLAMA["hidden_size"], LLAMA["intermediate_size"]
INPUTS = {"o_proj": LLAMA["num_attention_heads"] * LLAMA["head_dim"], "down_proj": F}

# Per linear module: tensor -> (type, shape) of [out, in]
ASKED = {
    "fp8 tensor": {
        "weight": (torch.float8_e4m3fn, lambda o, i: (o, i)),
        "weight_scale": (torch.float32, lambda o, i: (1,)),
    },
    "fp8 block": {
        "weight": (torch.float8_e4m3fn, lambda o, i: (o, i)),
        "weight_scale": (torch.float32, lambda o, i: (-(-o // 128), -(-i // 128))),
    },
    "nvfp4": {
        "weight": (torch.uint8, lambda o, i: (o, i // 2)),
        "weight_scale": (torch.float8_e4m3fn, lambda o, i: (o, i // 16)),
        "weight_scale_2": (torch.float32, lambda o, i: ()),
    },
    "fp8": {
        "weight": (torch.float8_e4m3fn, lambda o, i: (o, i)),
        "weight_scale": (torch.float32, lambda o, i: (o, 1)),
    },
    "int8": {
        "weight": (torch.int8, lambda o, i: (o, i)),
        "weight_scale": (torch.float32, lambda o, i: (o, 1)),
    },
    "int4": {
        "weight_packed": (torch.int32, lambda o, i: (o, i // 8)),
        "weight_scale": (torch.bfloat16, lambda o, i: (o, i // 32)),
        "weight_shape": (torch.int64, lambda o, i: (2,)),
    },
}
ASKED["nvfp4 2d"] = ASKED["nvfp4"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return saved(LLAMA, tmp_path_factory.mktemp("vllm") / "m")


def is_excluded(module: str, patterns: list[str]) -> bool:
    """A pattern that excludes one expert of a layer excludes all."""
    layer, is_expert, _ = module.partition(".experts.")
    if is_expert and any(p.startswith(f"{layer}.experts") for p in patterns):
        return True
    return any(p == module or p in module or fnmatch(module, p) for p in patterns)


@pytest.mark.parametrize("format", sorted(ASKED))
def test_every_linear_module_has_the_tensors_that_are_asked_for(source, tmp_path, format):
    weights, _, scales = format.partition(" ")
    quantize(source, tmp_path / "out", weights, scales=scales or None)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    original = load_file(source / "model.safetensors")
    modules = {n.removesuffix(".weight") for n in original if n.split(".")[-2] in LINEAR}
    assert len(modules) == 14
    for module in modules:
        shape = original[f"{module}.weight"].shape
        assert shape[1] == INPUTS.get(module.split(".")[-1], H)
        found = {n.removeprefix(f"{module}."): (t.dtype, tuple(t.shape)) for n, t in stored.items() if module in n}
        assert found == {n: (kind, of(*shape)) for n, (kind, of) in ASKED[format].items()}
    others = {n for n in stored if not any(m in n for m in modules)}
    assert others == {n for n in original if not any(m in n for m in modules)}
    for name in others:
        assert torch.equal(stored[name], original[name])


def test_modelopt_tables(source, tmp_path):
    """Both tables, of which vLLM reads config.json's: what they must say, and which modules they leave dense."""
    quantize(source, tmp_path / "out", "nvfp4")
    inner = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert inner["quant_method"].startswith("modelopt") and "quantization" not in inner
    assert inner["quant_algo"] == "W4A16_NVFP4"  # "NVFP4" would ask for input_scale
    legacy = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert {"group_size", "kv_cache_quant_algo", "exclude_modules"} <= legacy.keys()
    assert (legacy["quant_algo"], legacy["group_size"], legacy["kv_cache_quant_algo"]) == ("W4A16_NVFP4", 16, None)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    for excluded in (inner["ignore"], legacy["exclude_modules"]):
        for name in stored:
            module, _, leaf = name.rpartition(".")
            if leaf == "weight" and stored[name].ndim > 1:
                assert is_excluded(module, excluded) == (f"{module}.weight_scale" not in stored)
        for layer in range(LLAMA["num_hidden_layers"]):
            for fused, parts in FUSED.items():
                prefix = f"model.layers.{layer}." + ("self_attn." if fused == "qkv_proj" else "mlp.")
                assert not is_excluded(prefix + fused, excluded)
                assert len({is_excluded(prefix + part, excluded) for part in parts}) == 1


@pytest.mark.parametrize(("format", "part"), [("nvfp4", "weight_scale_2"), ("fp8", "weight_scale")])
def test_joined_matrices_share_their_global_scale(source, tmp_path, format, part):
    """The loader takes the largest of the parts for all of them; block scales it leaves as they are, FP8 codes it makes
    anew."""
    quantize(source, tmp_path / "out", format, scales="tensor" if format == "fp8" else None)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    groups: dict[str, set[float]] = {}
    for name, scale in stored.items():
        if name.endswith(f".{part}"):
            prefix, projection, _ = name.rsplit(".", 2)
            fused = next((f for f, parts in FUSED.items() if projection in parts), projection)
            groups.setdefault(f"{prefix}.{fused}", set()).add(scale.item())
    assert len(groups) == 8 and all(len(scales) == 1 for scales in groups.values())


@pytest.mark.parametrize("format", sorted(ASKED.keys() - {"nvfp4 2d"}))  # not all of their rows are multiples of 16
@pytest.mark.parametrize("name", ["nemotron", "gemma"])
def test_experts_have_the_names_that_are_mapped(tmp_path, format, name):
    """`experts.3.up_proj.` before whatever stands for a linear layer; Gemma's gates apart, with the scale of up."""
    weights, _, scales = format.partition(" ")
    wide = {"moe_intermediate_size": 128} if scales == "block" else {}  # gate and up are whole blocks
    config = HYBRID | wide if name == "nemotron" else PACKABLE["gemma"] | wide
    folder = saved(config | {"dtype": "bfloat16"}, tmp_path / "m")
    quantize(folder, tmp_path / "out", weights, scales=scales or None)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    stacks = {n: t for n, t in load_file(folder / "model.safetensors").items() if ".experts." in n}
    for stack, original in stacks.items():
        prefix, _, projection = stack.rpartition(".")
        halves = ("gate_proj", "up_proj") if projection == "gate_up_proj" else (projection,)
        out, size = original.shape[1] // len(halves), original.shape[2]
        for e in range(len(original)):
            modules = [f"{prefix}.{e}.{half}." for half in halves]
            for module in modules:
                found = {n.removeprefix(module): (t.dtype, tuple(t.shape)) for n, t in stored.items() if module in n}
                assert found == {n: (kind, of(out, size)) for n, (kind, of) in ASKED[format].items()}
            for part in {"nvfp4": ("weight_scale_2",), "fp8 tensor": ("weight_scale",)}.get(format, ()):
                assert len({stored[module + part].item() for module in modules}) == 1
    assert not stacks.keys() & stored.keys() and len(stacks) >= 2


@pytest.mark.parametrize("format", ["nvfp4", "int4"])
def test_experts_of_a_layer_are_packed_all_or_none(tmp_path, format):
    """With 40 units up has inputs in whole blocks, down has not."""
    quantize(saved(HYBRID | {"moe_intermediate_size": 40}, tmp_path / "m"), tmp_path / "out", format)
    stored = load_file(tmp_path / "out" / "model.safetensors")
    experts = {n.rpartition(".")[2] for n in stored if ".experts." in n}
    assert experts == {"weight"} and any(n.endswith("weight_scale") for n in stored)
    load(tmp_path / "out", device="cpu")


def test_no_pattern_of_a_hybrid_hides_a_packed_module(tmp_path):
    """Patterns also match parts of names: `mixer.gate`, the router, is part of no packed module's."""
    quantize(saved(HYBRID, tmp_path / "m"), tmp_path / "out", "nvfp4")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    excluded = config["quantization_config"]["ignore"]
    stored = load_file(tmp_path / "out" / "model.safetensors")
    packed = {n.removesuffix(".weight_scale") for n in stored if n.endswith(".weight_scale")}
    assert packed and "backbone.layers.1.mixer.gate" in excluded
    assert not any(is_excluded(module, excluded) for module in packed)


@pytest.mark.parametrize(
    ("format", "named", "weight", "activation"),
    [
        ("fp8", "float-quantized", {"strategy": "channel"}, {"strategy": "token"}),
        ("fp8 tensor", "float-quantized", {"strategy": "tensor"}, {"strategy": "tensor"}),  # else no experts
        (
            "fp8 block",
            "float-quantized",
            {"strategy": "block", "block_structure": [128, 128]},
            {"strategy": "group", "group_size": 128},
        ),
        ("int8", "int-quantized", {"strategy": "channel"}, {"strategy": "token"}),
        ("int4", "pack-quantized", {"strategy": "group", "group_size": 32}, None),
    ],
)
def test_compressed_tensors_schemes(source, tmp_path, format, named, weight, activation):
    """What decides the scheme: W8A8Fp8 and W8A8Int8 with activations quantised as they come, WNA16 by groups that
    Marlin has."""
    weights, _, scales = format.partition(" ")
    quantize(source, tmp_path / "out", weights, scales=scales or None)
    config = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    assert (config["quant_method"], config["format"]) == ("compressed-tensors", named)
    (scheme,) = config["config_groups"].values()
    assert scheme["targets"] == ["Linear"] and scheme["format"] == named
    both = {"num_bits": 4 if format == "int4" else 8, "type": "float" if weights == "fp8" else "int", "symmetric": True}
    assert scheme["weights"] == {"dynamic": False, **both, **weight}
    assert scheme["input_activations"] == (activation and {"dynamic": True, **both, **activation})
