"""How packed weights are written: the tensors of a file, and what config.json says of them.

NVFP4 as ModelOpt writes it for weights alone (W4A16_NVFP4), everything else as compressed-tensors does. Both know
linear layers: experts are written one by one, and the gate of a gated one apart from its up.
Source: NVIDIA Model-Optimizer `convert_hf_config.py`; compressed-tensors `quant_scheme.py` and its compressors; vLLM
`gemma4.py` for gates.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from sparing.config.formats import FORMATS
from sparing.weights.packed_files import part_names

if TYPE_CHECKING:
    from torch import Tensor

    from sparing.weights.weight import PackedWeight

__all__ = ["file_layout", "file_tensors", "matrices", "modelopt_table", "quantization_config", "unread"]

Layout = dict[str, tuple[str, tuple[int, ...]]]  # name -> (stored type, shape)

STORED = {"int8": "I8", "uint8": "U8", "float8_e4m3fn": "F8_E4M3", "bfloat16": "BF16", "float32": "F32"}
# compressed-tensors' name of a format, bits and type of its codes, what shares a scale, and how engines that multiply
# codes with codes quantise the other side.
CHANNEL, TOKEN, IN_32 = {"strategy": "channel"}, {"strategy": "token"}, {"strategy": "group", "group_size": 32}
TENSOR, BLOCK = {"strategy": "tensor"}, {"strategy": "block", "block_structure": [128, 128]}
IN_128 = {"strategy": "group", "group_size": 128}
SCHEMES: dict[str, tuple[str, int, str, dict[str, Any], dict[str, Any] | None]] = {
    "int8": ("int-quantized", 8, "int", CHANNEL, TOKEN),
    "int4": ("pack-quantized", 4, "int", IN_32, None),
    "mxfp4": ("mxfp4-pack-quantized", 4, "float", IN_32, None),
    "fp8 row": ("float-quantized", 8, "float", CHANNEL, TOKEN),
    "fp8 tensor": ("float-quantized", 8, "float", TENSOR, TENSOR),
    "fp8 block": ("float-quantized", 8, "float", BLOCK, IN_128),
}
CODES = {"int4": "weight_packed", "mxfp4": "weight_packed"}  # others keep their codes under the weight's own name
STACK = re.compile(r"(.*\.experts)\.(\w+)")
GATE_UP = re.compile(r"(.*\.experts\.\d+)\.gate_up_proj\.weight")


def matrices(name: str, shape: Sequence[int]) -> list[str]:
    """The names under which a weight's matrices are written: of each expert of a stack, of any other its own."""
    match = STACK.fullmatch(name)
    if match is None or len(shape) < 3:
        return [name]
    return [f"{match[1]}.{e}.{match[2]}.weight" for e in range(shape[0])]


def file_layout(name: str, shape: Sequence[int], format: str, scales: str | None) -> Layout:
    """The tensors that stand for a matrix [out, in] of this name in a file."""
    layout: Layout = {}
    for each, start, stop in _apart(name, shape[0], scales):
        names, rows = _names(each, format), (stop - start, shape[1])
        parts = FORMATS[format].layout(rows, scales)
        layout |= {names[part]: (STORED[dtype], own) for part, (dtype, own) in parts.items()}
        if format == "int4":  # eight codes in an integer
            layout[names["codes"]] = ("I32", (rows[0], rows[1] // 8))
        if format in ("int8", "fp8"):
            layout[names["scale"]] = ("F32", _scale_shape(parts["scale"][1]))
        if "shape" in names:
            layout[names["shape"]] = ("I64", (2,))
    return layout


def file_tensors(name: str, weight: PackedWeight, scales: str | None) -> dict[str, Tensor]:
    """The tensors of a matrix, laid out as `file_layout` says."""
    import torch

    tensors: dict[str, Tensor] = {}
    for each, start, stop in _apart(name, len(weight), scales):
        names, parts = _names(each, weight.format), weight.rows(start, stop)
        tensors |= {names[part]: tensor for part, tensor in parts.items()}
        if weight.format == "int4":
            tensors[names["codes"]] = parts["codes"].view(torch.int32)
        if weight.format in ("int8", "fp8"):
            tensors[names["scale"]] = parts["scale"].view(_scale_shape(parts["scale"].shape))
        if "shape" in names:
            tensors[names["shape"]] = torch.tensor([stop - start, weight.shape[1]])
    return tensors


def _apart(name: str, out: int, scales: str | None) -> list[tuple[str, int, int]]:
    """(name, start, stop) of the rows that are written under one name: gate and up of an expert are two.

    Where blocks of scales lie across both they stay one, which is nobody's layout but ours.
    """
    match = GATE_UP.fullmatch(name)
    if match is None or (scales == "block" and out // 2 % 128):
        return [(name, 0, out)]
    return [(f"{match[1]}.gate_proj.weight", 0, out // 2), (f"{match[1]}.up_proj.weight", out // 2, out)]


def _scale_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """[1] for the scale of a matrix, [out, 1] for those of rows; those of blocks stay as they are."""
    return tuple(shape) if len(shape) == 2 else (*shape, 1)


def quantization_config(format: str, scales: str | None, dense: Sequence[str]) -> dict[str, Any]:
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
    file_format, bits, kind, layout, inputs = SCHEMES[format if format != "fp8" else f"fp8 {scales}"]
    weights = {"dynamic": False, "num_bits": bits, "type": kind, "symmetric": True, **layout}
    activations = {"dynamic": True, "num_bits": bits, "type": kind, "symmetric": True, **inputs} if inputs else None
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


def unread(shapes: Mapping[str, Sequence[int]], format: str, scales: str | None) -> str | None:
    """What of these packed weights (name -> shape) transformers 5.23 does not read of a format that it knows, or None.

    It says that they are missing and puts random numbers in their place, or raises.
    """
    experts = {name: shape for name, shape in shapes.items() if ".experts." in name}
    if any(GATE_UP.fullmatch(name) for name in experts):
        return "packed experts with gates"
    if format == "int8" and experts:
        return "experts in int8"
    if scales == "block" and any(max(shape) > 128 for shape in experts.values()):
        return "experts in FP8 with scales of blocks"
    return None


def _names(name: str, format: str) -> dict[str, str]:
    """Part -> name in the file."""
    beside = part_names(name)
    names = {"codes": name, "scale": beside["weight_scale"], "scale_2": beside["weight_scale_2"]}
    if format in CODES:
        names["codes"] = name.removesuffix("weight") + CODES[format]
    if format == "int4":
        names["shape"] = beside["weight_shape"]
    return names
