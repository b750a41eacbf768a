"""Quantised folders of other programs are refused by the name of their method, everywhere; so are contradictions."""

import pytest
import torch

import sparing
from sparing.checkpoint import save_weights, write_json
from sparing.config import parse_config
from sparing.errors import CheckpointError
from sparing.inspection.report import inspect
from sparing.weights.convert import quantize
from sparing.weights.fp8 import fp8_quantize

CONFIG = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 2, "vocab_size": 32,
}  # fmt: skip
PLAIN = {name: torch.ones(shape) for name, (shape, _) in parse_config(CONFIG).tensors().items()}
MATRICES = [name.removesuffix(".weight") for name in PLAIN if "_proj." in name]
INT, BYTE = torch.int32, torch.uint8
# what stands in a file in place of each matrix of 64 x 64
PARTS = {
    "GPTQ": {"qweight": (8, 64, INT), "qzeros": (2, 8, INT), "scales": (2, 64), "g_idx": (64, INT)},
    "GPTQ without order": {"qweight": (8, 64, INT), "qzeros": (2, 8, INT), "scales": (2, 64)},
    "AWQ": {"qweight": (64, 8, INT), "qzeros": (2, 8, INT), "scales": (2, 64)},
    "bitsandbytes, 4 bits": {
        "weight": (2048, 1, BYTE), "weight.absmax": (64,), "weight.quant_map": (16,),
        "weight.quant_state.bitsandbytes__nf4": (80, BYTE),
    },
    "bitsandbytes, 8 bits": {"weight": (64, 64, torch.int8), "SCB": (64,)},
    "mlx": {"weight": (64, 8, torch.uint32), "scales": (64, 1), "biases": (64, 1)},
    "AQLM": {"codes": (64, 8, 1, torch.int8), "codebooks": (1, 256, 1, 8), "scales": (64, 1, 1, 1)},
    "HQQ": {"W_q": (32, 64, BYTE), "scale": (64, 1), "zero": (64, 1)},
    "EETQ": {"weight": (64, 64, torch.int8), "weight_scales": (64,)},
    "quanto": {"weight._data": (64, 64, torch.int8), "weight._scale": (64, 1)},
    "ExLlamaV3": {"trellis": (4, 4, 64, torch.int16), "suh": (64,), "svh": (64,)},
    "ModelOpt with inputs that AWQ scales": {"weight": (64, 32, BYTE), "pre_quant_scale": (64,)},
}  # fmt: skip


def folder(path, parts, **said):
    tensors = {name: tensor for name, tensor in PLAIN.items() if name.removesuffix(".weight") not in MATRICES}
    for matrix in MATRICES:
        for part, (*shape, last) in parts.items():
            dtype = last if isinstance(last, torch.dtype) else torch.float32
            sizes = shape if isinstance(last, torch.dtype) else (*shape, last)
            tensors[f"{matrix}.{part}"] = torch.zeros(sizes, dtype=dtype)
    save_weights(path, tensors)
    write_json(path / "config.json", CONFIG | said)
    return path


def refused_everywhere(path, reason):
    for attempt in (
        lambda: sparing.load(path),
        lambda: sparing.plan(path, context=8),
        lambda: quantize(path, path / "out", "int8"),
    ):
        with pytest.raises(CheckpointError, match=reason):
            attempt()
    assert any(reason in problem for problem in inspect(path).problems)


@pytest.mark.parametrize("method", sorted(PARTS))
def test_a_method_is_known_by_its_tensors(tmp_path, method):
    refused_everywhere(folder(tmp_path, PARTS[method]), f"quantised by {method.removesuffix(' without order')} ")


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "quantised by GPTQ,"),
        ({"quantization_config": {"quant_method": "bitsandbytes", "load_in_8bit": True}}, "quantised by bitsandbytes,"),
        ({"quantization_config": {"quant_method": "torchao"}}, "quantised by torchao,"),
        ({"quantization": {"group_size": 64, "bits": 4}}, "quantised by mlx,"),
        ({"quantization_config": {"group_size": 64, "bits": 4}}, "quantised by mlx,"),
        ({"quantization_config": {"quant_method": "modelopt", "quant_algo": "W4A16_AWQ"}}, "as W4A16_AWQ,"),
        ({"quantization_config": {"quant_method": "fp8"}}, "the files hold plain tensors (F32)"),
        ({"quantization_config": "fp8"}, "quantization_config is 'fp8', expected a JSON object"),
        ({"compression_config": {"sparsity_config": {"format": "sparse-24-bitmask"}}}, "stored sparse"),
    ],
)
def test_a_method_is_known_by_its_config(tmp_path, said, reason):
    save_weights(tmp_path, PLAIN)
    write_json(tmp_path / "config.json", CONFIG | said)
    with pytest.raises(CheckpointError) as error:
        sparing.load(tmp_path)
    assert reason in str(error.value)
    with pytest.raises(CheckpointError) as error:
        sparing.plan(tmp_path, context=8)
    assert reason in str(error.value)


GROUP = {"type": "int", "num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 32}


@pytest.mark.parametrize(
    ("changes", "format", "reason"),
    [
        ({"num_bits": 8}, "pack-quantized", "packs weights in 8 bits"),
        ({"num_bits": 3}, "pack-quantized", r"\('int', 3\)"),
        ({"num_bits": 2}, "pack-quantized", r"\('int', 2\)"),
        ({"symmetric": False}, "pack-quantized", "is asymmetric"),
        ({}, "marlin-24", "'marlin-24'"),
        ({"type": ["int"]}, "pack-quantized", r"\(\['int'\], 4\)"),
    ],
)
def test_what_compressed_tensors_writes_and_is_not_read(tmp_path, changes, format, reason):
    group = {"weights": GROUP | changes, "targets": ["Linear"]}
    said = {"quant_method": "compressed-tensors", "format": format, "config_groups": {"group_0": group}}
    config = CONFIG | {"quantization_config": said}
    parts = {"weight_packed": (64, 16, INT), "weight_scale": (64, 2)}
    path = folder(tmp_path, parts, quantization_config=said)
    with pytest.raises(CheckpointError, match=reason):
        sparing.load(path)
    with pytest.raises(CheckpointError, match=reason):
        sparing.plan(config, context=8)


def test_a_plan_without_files_says_that_it_counts_dense_weights():
    plan = sparing.plan(CONFIG | {"quantization_config": {"quant_method": "fp8"}}, context=8)
    assert plan.notes == ("counted as if no weight were quantised: there are no files to see",)


def test_an_incomplete_source_is_not_quantised(tmp_path):
    save_weights(tmp_path, {name: tensor for name, tensor in PLAIN.items() if name != "model.norm.weight"})
    write_json(tmp_path / "config.json", CONFIG)
    with pytest.raises(CheckpointError, match=r"1 of 12 tensors are missing .*model\.norm\.weight"):
        quantize(tmp_path, tmp_path / "out", "int8")
    assert not (tmp_path / "out").exists()


def test_names_that_mean_nothing_do_so_as_a_whole(tmp_path):
    save_weights(tmp_path, PLAIN | {"old.lm_head.weight": torch.ones(2)})
    write_json(tmp_path / "config.json", CONFIG | {"tie_word_embeddings": True})
    with pytest.raises(CheckpointError, match=r"unexpected tensors: old\.lm_head\.weight"):
        sparing.load(tmp_path)


def test_a_plan_says_what_does_not_load(tmp_path):
    save_weights(tmp_path, {name: tensor for name, tensor in PLAIN.items() if name != "model.norm.weight"})
    write_json(tmp_path / "config.json", CONFIG)
    plan = sparing.plan(tmp_path, context=8)
    assert any("does not load as it is" in note and "model.norm.weight" in note for note in plan.notes)
    (tmp_path / "model.safetensors").write_bytes(b"12345678901234567890")
    assert any("does not load as it is" in note for note in sparing.plan(tmp_path, context=8).notes)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(
    "name", ["model.norm.weight", "model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"]
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_weight_that_is_not_finite_is_named(tmp_path, name, value, dtype):
    tensors = {each: tensor.to(dtype, copy=True) for each, tensor in PLAIN.items()}
    tensors[name].view(-1)[-1] = value
    save_weights(tmp_path, tensors)
    write_json(tmp_path / "config.json", CONFIG)
    for weights in ("stored", "int8"):
        with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} holds numbers .*\({value}\)"):
            sparing.load(tmp_path, weights=weights)
    with pytest.raises(CheckpointError, match=rf"model\.safetensors: {name} holds numbers"):
        quantize(tmp_path, tmp_path / "out", "int8")


def test_a_weight_that_float16_cannot_hold_is_named(tmp_path):
    large = PLAIN | {"model.norm.weight": torch.full((64,), 1e5)}
    save_weights(tmp_path, large)
    write_json(tmp_path / "config.json", CONFIG)
    assert sparing.load(tmp_path, dtype="float32").state_dict()["model.norm.weight"][0] == 1e5
    with pytest.raises(CheckpointError, match=r"model\.norm\.weight holds 100000, which float16 cannot hold"):
        sparing.load(tmp_path, dtype="float16")


def test_finite_numbers_whose_sum_is_not_are_read(tmp_path):
    save_weights(tmp_path, PLAIN | {"model.norm.weight": torch.full((64,), 3e38)})
    write_json(tmp_path / "config.json", CONFIG)
    assert sparing.load(tmp_path).state_dict()["model.norm.weight"][0] == 3e38


@pytest.mark.parametrize("code", [0x7F, 0xFF])
def test_codes_that_are_not_numbers_are_named(tmp_path, code):
    codes, scale = fp8_quantize(torch.ones(64, 64), "row")
    name = "model.layers.0.mlp.up_proj.weight"
    codes.view(torch.uint8)[5, 5] = code
    save_weights(tmp_path, PLAIN | {name: codes, f"{name}_scale": scale})
    write_json(tmp_path / "config.json", CONFIG)
    with pytest.raises(CheckpointError, match=rf"{name} has NaN among its codes"):
        sparing.load(tmp_path)


@pytest.mark.parametrize(("format", "value"), [("nvfp4", 0x7F), ("nvfp4", 0xFF), ("mxfp4", 0xFF)])
def test_scales_of_blocks_that_are_not_numbers_are_named(tmp_path, format, value):
    from safetensors.torch import load_file

    torch.manual_seed(0)
    (tmp_path / "in").mkdir()
    save_weights(tmp_path / "in", {name: torch.randn(tensor.shape) for name, tensor in PLAIN.items()})
    write_json(tmp_path / "in" / "config.json", CONFIG)
    quantize(tmp_path / "in", tmp_path / "out", format)
    sparing.load(tmp_path / "out")
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight_scale"
    tensors[name].view(torch.uint8)[3, 1] = value
    save_weights(tmp_path / "out", tensors)
    with pytest.raises(CheckpointError, match=r"up_proj\.weight has NaN among its scales"):
        sparing.load(tmp_path / "out")


def test_a_folder_without_biases_of_the_output_has_zeros_there(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**CONFIG | {"attention_bias": True, "head_dim": 32}))
    for name, parameter in model.named_parameters():
        parameter.data.normal_(std=0.0 if name.endswith("o_proj.bias") else 0.1)
    tensors = {name: tensor for name, tensor in model.state_dict().items() if not name.endswith("o_proj.bias")}
    save_weights(tmp_path, tensors)
    write_json(tmp_path / "config.json", CONFIG | {"attention_bias": True})
    with torch.no_grad():
        theirs = model(torch.arange(9)[None]).logits[0]
    torch.testing.assert_close(sparing.load(tmp_path).logits(torch.arange(9)), theirs, atol=2e-4, rtol=1e-4)
    del tensors["model.layers.0.self_attn.k_proj.bias"]  # that is an incomplete download
    save_weights(tmp_path, tensors)
    with pytest.raises(CheckpointError, match="2 of 16 tensors are missing"):
        sparing.load(tmp_path)
