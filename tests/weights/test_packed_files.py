"""Quantised files of several makers, read by the tensors they hold; and files that are wrong."""

import math
from typing import cast

import pytest
import torch

from sparing.checkpoint import open_checkpoint, save_safetensors, save_weights, write_json
from sparing.errors import CheckpointError
from sparing.kernels.microscaling import mxfp4_pack, ue8m0_decode, ue8m0_encode
from sparing.weights.fp8 import fp8_dequantize, fp8_quantize
from sparing.weights.integer import int4_quantize, int8_quantize
from sparing.weights.nvfp4 import nvfp4_quantize
from sparing.weights.packed_files import PackedTensors
from sparing.weights.stored import stored_weights

torch.manual_seed(0)
W = torch.randn(256, 384)
STACK = torch.randn(3, 32, 64)
NV, MX, I8, I4 = nvfp4_quantize(W), mxfp4_pack(W), int8_quantize(W), int4_quantize(W)
FP8 = {scales: fp8_quantize(W, scales) for scales in ("tensor", "row", "block")}
POWERS = ue8m0_encode(FP8["block"][1])
NV_STACK = [nvfp4_quantize(w) for w in STACK]


def stacked(part):
    return torch.stack([packed[part] for packed in NV_STACK])


# maker -> (tensors of the file, format); all stand for X.weight
FILES = {
    "ModelOpt NVFP4": (
        {"weight": NV[0], "weight_scale": NV[1], "weight_scale_2": NV[2], "input_scale": torch.tensor(0.1)},
        "nvfp4",
    ),
    "compressed-tensors NVFP4": (
        {
            "weight_packed": NV[0],
            "weight_scale": NV[1],
            "weight_global_scale": (1 / NV[2]).reshape(1),
            "input_global_scale": torch.ones(1),
        },
        "nvfp4",
    ),
    "ModelOpt FP8": (
        {"weight": FP8["tensor"][0], "weight_scale": FP8["tensor"][1], "input_scale": torch.tensor(0.1)},
        "fp8",
    ),
    "compressed-tensors FP8": ({"weight": FP8["row"][0], "weight_scale": FP8["row"][1][:, None].bfloat16()}, "fp8"),
    "ModelOpt FP8 per channel": ({"weight": FP8["row"][0], "weight_scale": FP8["row"][1]}, "fp8"),
    "DeepSeek-V3 FP8": ({"weight": FP8["block"][0], "weight_scale_inv": FP8["block"][1]}, "fp8"),
    "DeepSeek-V4 FP8": ({"weight": FP8["block"][0], "scale": POWERS.view(torch.float8_e8m0fnu)}, "fp8"),
    "DeepSeek-V4 FP8, scales as bytes": ({"weight": FP8["block"][0], "scale": POWERS}, "fp8"),
    "DeepSeek-V4 FP4": ({"weight": MX[0].view(torch.int8), "scale": MX[1].view(torch.float8_e8m0fnu)}, "mxfp4"),
    "ModelOpt MXFP4": ({"weight": MX[0], "weight_scale": MX[1]}, "mxfp4"),
    "compressed-tensors MXFP4": ({"weight_packed": MX[0], "weight_scale": MX[1]}, "mxfp4"),
    "compressed-tensors int8": ({"weight": I8[0], "weight_scale": I8[1][:, None]}, "int8"),
    "compressed-tensors int4": (
        {
            "weight_packed": I4[0].view(torch.int32),
            "weight_scale": I4[1],
            "weight_shape": torch.tensor([256, 384]),
        },
        "int4",
    ),
}
# What a maker's file says where it rounds scales itself.
EXPECTED = {
    "compressed-tensors FP8": lambda: FP8["row"][0].float() * FP8["row"][1][:, None].bfloat16().float(),
    "DeepSeek-V4 FP8": lambda: (
        FP8["block"][0].float() * ue8m0_decode(POWERS).repeat_interleave(128, 0).repeat_interleave(128, 1)
    ),
}


def tensors_of(folder, tensors, prefix="model.layers.0.mlp.up_proj."):
    write_json(folder / "config.json", {"model_type": "x"})
    save_weights(folder, {prefix + name: tensor for name, tensor in tensors.items()})
    return cast(PackedTensors, stored_weights(open_checkpoint(folder)))


@pytest.mark.parametrize("maker", sorted(FILES))
def test_every_maker_is_read(tmp_path, maker):
    tensors, format = FILES[maker]
    other = {"k_scale": torch.tensor(1.0), "bias": torch.ones(256)}
    source = tensors_of(tmp_path, tensors | other)
    name = "model.layers.0.mlp.up_proj.weight"
    assert isinstance(source, PackedTensors)
    assert sorted(source.names()) == ["model.layers.0.mlp.up_proj.bias", name]
    assert (source.format(name), source.shape(name), source.dtype(name)) == (format, (256, 384), format.upper())
    weight = source.packed(name)
    assert weight.format == format and weight.shape == (256, 384)
    assert source.nbytes(name) == weight.nbytes
    exact = EXPECTED.get(maker.split(",")[0])
    original = {"nvfp4": 0.1, "fp8": 0.03, "int8": 0.01, "int4": 0.1, "mxfp4": 0.12}[format]
    if exact is not None:
        assert torch.equal(weight.dequantize(), exact())
    else:
        assert (weight.dequantize() - W).norm() < original * W.norm()
    assert torch.equal(torch.cat(list(source.pieces(name))).view(256, 384), weight.dequantize())
    assert torch.equal(source.read(name), weight.dequantize())
    assert source.format("model.layers.0.mlp.up_proj.bias") is None


def test_the_two_makers_of_nvfp4_agree(tmp_path):
    """One stores the scale of the tensor, the other its reciprocal."""
    weights = []
    for maker in ("ModelOpt NVFP4", "compressed-tensors NVFP4"):
        (tmp_path / maker).mkdir()
        weights.append(tensors_of(tmp_path / maker, FILES[maker][0]).packed("model.layers.0.mlp.up_proj.weight"))
    assert torch.allclose(weights[0].dequantize(), weights[1].dequantize(), rtol=1e-6, atol=0)
    assert torch.equal(weights[0].codes, weights[1].codes)


def test_scales_are_used_as_stored(tmp_path):
    """Not those that the format's own rule would choose."""
    codes, scale, scale_2 = nvfp4_quantize(W, "mse")
    tensors = {"weight": codes, "weight_scale": scale, "weight_scale_2": scale_2 * 3}
    weight = tensors_of(tmp_path, tensors).packed("model.layers.0.mlp.up_proj.weight")
    assert torch.equal(weight.scale.float(), scale.float()) and weight.scale_2 == scale_2 * 3


def test_blocks_may_be_as_many_as_rows(tmp_path):
    w = torch.randn(16, 2048) * torch.logspace(-3, 3, 2048)
    for name in ("weight_scale", "weight_scale_inv"):
        codes, scale = fp8_quantize(w, "block")
        (tmp_path / name).mkdir()
        source = tensors_of(tmp_path / name, {"weight": codes, name: scale})
        weight = source.packed("model.layers.0.mlp.up_proj.weight")
        assert weight.scale.shape == (1, 16) and torch.equal(weight.dequantize(), fp8_dequantize(codes, scale))


def test_stacks_of_experts(tmp_path):
    parts = {
        "up_proj": stacked(0),
        "up_proj_weight_scale": stacked(1),
        "up_proj_weight_scale_2": stacked(2),
        "up_proj_input_scale": torch.ones(3),
    }
    source = tensors_of(tmp_path, parts, "model.layers.0.mlp.experts.")
    name = "model.layers.0.mlp.experts.up_proj"
    assert source.names() == [name] and source.shape(name) == (3, 32, 64)
    weight = source.packed(name)
    for e in range(3):
        assert torch.equal(weight[e].codes, NV_STACK[e][0]) and weight[e].scale_2 == NV_STACK[e][2]
    assert torch.equal(torch.cat(list(source.pieces(name))).view(3, 32, 64), weight.dequantize())


@pytest.mark.parametrize("maker", sorted(FILES))
def test_gate_and_up_of_an_expert_are_one_matrix(tmp_path, maker):
    """Two halves of it in the file; a scale that all rows share is the same in both."""
    tensors, format = FILES[maker]
    halves: dict[str, torch.Tensor] = {}
    for i, half in enumerate(("gate_proj", "up_proj")):
        for name, tensor in tensors.items():
            half_of_it = tensor.chunk(2)[i] if tensor.ndim and len(tensor) > 1 else tensor  # 256 rows, 2 of blocks
            halves[f"{half}.{name}"] = half_of_it.clone()
        if "weight_shape" in tensors:
            halves[f"{half}.weight_shape"] = torch.tensor([128, 384])
    source = tensors_of(tmp_path, halves, "model.layers.0.experts.2.")
    name = "model.layers.0.experts.2.gate_up_proj.weight"
    assert source.names() == [name]
    (tmp_path / "whole").mkdir()
    whole = tensors_of(tmp_path / "whole", tensors, "model.layers.0.mlp.up_proj.")
    expected = whole.packed("model.layers.0.mlp.up_proj.weight")
    assert (source.format(name), source.shape(name)) == (format, (256, 384))
    weight = source.packed(name)
    assert source.nbytes(name) == weight.nbytes == expected.nbytes
    assert torch.equal(weight.dequantize(), expected.dequantize())
    assert torch.equal(torch.cat(list(source.pieces(name))).view(256, 384), weight.dequantize())


def test_gate_and_up_that_are_not_matrices(tmp_path):
    two = {"gate_proj.weight": NV[0], "gate_proj.weight_scale": NV[1], "gate_proj.weight_scale_2": torch.tensor(0.5)}
    two |= {"up_proj.weight": NV[0], "up_proj.weight_scale": NV[1], "up_proj.weight_scale_2": torch.tensor(0.25)}
    name = "model.layers.0.experts.2.gate_up_proj.weight"
    with pytest.raises(CheckpointError, match=r"gate_up_proj.weight: the scales of gate and up are 0.5 and 0.25; only"):
        tensors_of(tmp_path, two, "model.layers.0.experts.2.").packed(name)
    codes, scale = fp8_quantize(W[:200], "block")
    blocks = {f"{half}.{n}": t for half in ("gate_proj", "up_proj") for n, t in FILES["DeepSeek-V3 FP8"][0].items()}
    blocks = {n: scale if n.endswith("inv") else codes for n in blocks}
    with pytest.raises(CheckpointError, match="gate has 200 rows, so that blocks of 128 would lie across"):
        tensors_of(tmp_path, blocks, "model.layers.0.experts.2.").packed(name)
    narrow = blocks | {"up_proj.weight_scale_inv": scale[:, :1]}
    with pytest.raises(CheckpointError, match=r"is \[2, 1\] and not \[2, 3\]"):
        tensors_of(tmp_path, narrow, "model.layers.0.experts.2.")


NO_SCALES = [
    ("ModelOpt NVFP4", "weight_scale_2", math.nan, "nan"),
    ("ModelOpt NVFP4", "weight_scale_2", -math.inf, "-inf"),
    ("compressed-tensors NVFP4", "weight_global_scale", math.nan, "nan"),
    ("compressed-tensors NVFP4", "weight_global_scale", 0.0, "inf"),  # it is a reciprocal
    ("ModelOpt FP8", "weight_scale", math.inf, "inf"),
    ("compressed-tensors FP8", "weight_scale", math.nan, "nan"),
    ("DeepSeek-V3 FP8", "weight_scale_inv", math.nan, "nan"),
    ("DeepSeek-V4 FP8, scales as bytes", "scale", 255, "nan"),
    ("compressed-tensors int8", "weight_scale", math.inf, "inf"),
]


@pytest.mark.parametrize(("maker", "part", "value", "said"), NO_SCALES)
def test_scales_that_are_not_finite_are_refused_when_they_are_read(tmp_path, maker, part, value, said):
    scale = FILES[maker][0][part].clone()
    scale.view(-1)[-1] = value
    tensors = tensors_of(tmp_path, FILES[maker][0] | {part: scale})
    with pytest.raises(CheckpointError, match=rf"^model.safetensors: .*up_proj\.{part} stands for a scale of {said};"):
        tensors.packed("model.layers.0.mlp.up_proj.weight")


def test_plain_files_stay_as_they_are(tmp_path):
    source = tensors_of(tmp_path, {"weight": W.bfloat16(), "scale": torch.ones(1)}, "model.layers.0.router.")
    assert not isinstance(source, PackedTensors)


NV_PARTS = {"weight": NV[0], "weight_scale": NV[1], "weight_scale_2": NV[2]}
WRONG = {
    "no tensor scale": ({k: v for k, v in NV_PARTS.items() if k != "weight_scale_2"}, "has no weight_scale_2"),
    "scales of another width": (
        NV_PARTS | {"weight_scale": NV[1][:, :12]},
        r"looks like nvfp4, but .*weight_scale is \[256, 12\] and not \[256, 24\]",
    ),
    "too many tensor scales": (NV_PARTS | {"weight_scale_2": torch.ones(2)}, r"weight_scale_2 is F32 \[2\], not one"),
    "tensor scale of another type": (NV_PARTS | {"weight_scale_2": NV[2].half()}, r"is F16 \[\], not one F32 number"),
    "half of the codes": (NV_PARTS | {"weight": NV[0][:, ::2].contiguous()}, r"is \[256, 24\] and not \[256, 12\]"),
    "rows of FP8 scales": (
        {"weight": FP8["row"][0], "weight_scale": torch.ones(255)},
        r"is \[255\] and not \[256, 1\] or \[256\]",
    ),
    "blocks of FP8 scales": (
        {"weight": FP8["block"][0], "weight_scale_inv": torch.ones(3, 3)},
        r"is \[3, 3\] and not \[2, 3\]",
    ),
    "eight bits in groups": (
        {"weight": I8[0], "weight_scale": torch.ones(256, 12)},
        r"is \[256, 12\] and not \[256, 1\] or \[256\]",
    ),
    "integers with integer scales": (
        {"weight_packed": I4[0].view(torch.int32), "weight_scale": torch.ones(256, 12, dtype=torch.int32)},
        "I32 with .* of I32; this quantised variant is not supported",
    ),
    "groups that do not divide": (
        {"weight_packed": I4[0].view(torch.int32), "weight_scale": torch.ones(256, 7)},
        "makes no groups of 384 inputs",
    ),
    **{
        f"{bits} bits": (
            {
                "weight_packed": torch.zeros(256, -(-384 // (32 // bits)), dtype=torch.int32),
                "weight_scale": I4[1],
                "weight_shape": torch.tensor([256, 384]),
            },
            f"packs 384 inputs in {bits} bits each",
        )
        for bits in (2, 3, 8)
    },
    "a shape of another weight": (
        {"weight_packed": I4[0].view(torch.int32), "weight_scale": I4[1], "weight_shape": torch.tensor([256, -5])},
        "packs -5 inputs in 48 integers",
    ),
    "asymmetric codes": (
        {"weight_packed": I4[0].view(torch.int32), "weight_scale": I4[1], "weight_zero_point": torch.ones(256, 12)},
        "has a weight_zero_point beside it; only symmetric",
    ),
}


@pytest.mark.parametrize("what", sorted(WRONG))
def test_what_does_not_fit_is_named(tmp_path, what):
    tensors, message = WRONG[what]
    with pytest.raises(CheckpointError, match=message) as error:
        tensors_of(tmp_path, tensors)
    assert str(error.value).startswith("model.safetensors: model.layers.0.mlp.up_proj.weight")


def test_shards_may_separate_codes_and_scales(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "x"})
    save_safetensors(tmp_path / "a.safetensors", {"x.weight": NV[0]})
    save_safetensors(tmp_path / "b.safetensors", {"x.weight_scale": NV[1], "x.weight_scale_2": NV[2]})
    where = {"x.weight": "a.safetensors", "x.weight_scale": "b.safetensors", "x.weight_scale_2": "b.safetensors"}
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": where})
    tensors = stored_weights(open_checkpoint(tmp_path))
    assert isinstance(tensors, PackedTensors) and tensors.packed("x.weight").shape == (256, 384)
