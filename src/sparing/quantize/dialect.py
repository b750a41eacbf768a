"""How packed weights are written: the tensors of a file, and what config.json says of them.

NVFP4 as ModelOpt writes it for weights alone (W4A16_NVFP4), everything else as compressed-tensors does. A stack of
experts has no `.weight`; its tensors are named as `checkpoint/packed.py` reads them.
Source: NVIDIA Model-Optimizer `convert_hf_config.py`; compressed-tensors `quant_scheme.py` and its compressors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from sparing.checkpoint.packed import part_names
from sparing.quantize.formats import FORMATS

if TYPE_CHECKING:
    from torch import Tensor

    from sparing.quantize.weight import PackedWeight

__all__ = ["file_layout", "file_tensors", "modelopt_table", "quantization_config"]

Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> (stored type, shape)

STORED = {"int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16", "float32": "F32"}
DYNAMIC = {"dynamic": True, "num_bits": 8, "strategy": "token", "symmetric": True}
CODES = {"int4": "weight_packed", "mxfp4": "weight_packed"}  # others keep their codes under the weight's own name


def file_layout(name: str, shape: Sequence[int], format: str) -> Layout:
    """The tensors that stand for a weight of this name and shape in a file."""
    parts = {part: (STORED[dtype], own) for part, (dtype, own) in FORMATS[format].layout(shape).items()}
    names = _names(name, format)
    layout: Layout = {names[part]: kind for part, kind in parts.items()}
    if format == "int4":  # eight codes in an integer
        layout[names["codes"]] = ("I32", (*shape[:-1], shape[-1] // 8))
    if format in ("int8", "fp8"):
        layout[names["scale"]] = ("F32", (*shape[:-1], 1))
    if "shape" in names:
        layout[names["shape"]] = ("I64", (2,))
    return layout


def file_tensors(name: str, weight: PackedWeight) -> dict[str, Tensor]:
    """The tensors of a weight, laid out as `file_layout` says."""
    import torch

    names = _names(name, weight.format)
    tensors = {names[part]: tensor for part, tensor in weight.named_buffers()}
    if weight.format == "int4":
        tensors[names["codes"]] = weight.codes.view(torch.int32)
    if weight.format in ("int8", "fp8"):
        tensors[names["scale"]] = weight.scale[..., None]
    if "shape" in names:
        tensors[names["shape"]] = torch.tensor(weight.shape)
    return tensors


def quantization_config(format: str, dense: Sequence[str]) -> dict[str, Any]:
    """`quantization_config` of config.json. dense: names of matrices in the file that are not packed."""
    modules = [name.removesuffix(".weight") for name in dense]
    if format == "nvfp4":
        group = {"weights": {"dynamic": False, "num_bits": 4, "type": "float", "group_size": 16}, "targets": ["Linear"]}
        return {
            "config_groups": {"group_0": group},
            "ignore": modules,
            "quant_algo": "W4A16_NVFP4",
            "producer": {"name": "sparing"},
            "quant_method": "modelopt",
        }
    bits, kind, block = {"int8": (8, "int", None), "int4": (4, "int", 32), "mxfp4": (4, "float", 32)}.get(
        format, (8, "float", None)
    )
    weights = {
        "dynamic": False,
        "num_bits": bits,
        "type": kind,
        "symmetric": True,
        "strategy": "channel" if block is None else "group",
        "group_size": block,
    }
    file_format = {"int8": "int-quantized", "int4": "pack-quantized", "fp8": "float-quantized"}.get(
        format, "mxfp4-pack-quantized"
    )
    activations = {**DYNAMIC, "type": kind} if block is None else None
    scheme = {"weights": weights, "input_activations": activations, "targets": ["Linear"], "format": file_format}
    return {
        "config_groups": {"group_0": scheme},
        "format": file_format,
        "ignore": modules,
        "quant_method": "compressed-tensors",
        "quantization_status": "compressed",
    }


def modelopt_table(dense: Sequence[str]) -> dict[str, Any]:
    """hf_quant_config.json, ModelOpt's own copy of what config.json says."""
    return {
        "producer": {"name": "sparing"},
        "quantization": {
            "quant_algo": "W4A16_NVFP4",
            "kv_cache_quant_algo": None,
            "group_size": 16,
            "exclude_modules": [name.removesuffix(".weight") for name in dense],
        },
    }


def _names(name: str, format: str) -> dict[str, str]:
    """Part -> name in the file."""
    beside = part_names(name)
    names = {"codes": name, "scale": beside["weight_scale"], "scale_2": beside["weight_scale_2"]}
    if name.endswith(".weight") and format in CODES:
        names["codes"] = name.removesuffix("weight") + CODES[format]
        if format == "int4":
            names["shape"] = beside["weight_shape"]
    return names
