"""Quantised checkpoints of other programs: named by their method and refused, never taken for a damaged download.

A method shows itself in config.json, or by what its tensors are called. What can be read is decided by the tensors
alone (`packed.py`), so here stands only what cannot, and where config.json and the tensors contradict each other.
Source: the quantizers of transformers 5.23, `compressed_tensors` 0.20, mlx-lm, ExLlamaV2 and V3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from sparing.checkpoint.safetensors import BITS
from sparing.checkpoint.tensors import TensorSource
from sparing.errors import CheckpointError, shown
from sparing.weights.packed_files import PackedTensors

__all__ = ["check_agreement", "quantization", "refuse_foreign", "refuse_method"]

WAY_OUT = (
    "use the original weights, which load(weights=...) and `sparing quantize` pack, or a folder that ModelOpt, "
    "compressed-tensors or DeepSeek's FP8 wrote"
)

# quant_method -> what it is called
METHODS = {
    "gptq": "GPTQ", "gptq_marlin": "GPTQ", "gptqmodel": "GPTQ", "awq": "AWQ", "awq_marlin": "AWQ",
    "bitsandbytes": "bitsandbytes", "bitsandbytes_4bit": "bitsandbytes", "bitsandbytes_8bit": "bitsandbytes",
    "aqlm": "AQLM", "vptq": "VPTQ", "quanto": "quanto", "eetq": "EETQ", "higgs": "HIGGS", "hqq": "HQQ",
    "torchao": "torchao", "bitnet": "BitNet", "spqr": "SpQR", "fp_quant": "FP-Quant", "auto-round": "AutoRound",
    "intel/auto-round": "AutoRound", "mxfp8": "MXFP8", "metal": "Metal", "fouroversix": "Four Over Six",
    "sinq": "SINQ", "exl2": "ExLlamaV2", "exl3": "ExLlamaV3", "quip": "QuIP#", "quip_sharp": "QuIP#",
    "squeezellm": "SqueezeLLM", "marlin": "Marlin", "mlx": "mlx", "gguf": "GGUF inside safetensors",
}  # fmt: skip

# what ends a tensor's name -> method
TENSORS = tuple(
    (re.compile(pattern), method)
    for pattern, method in (
        (r"\.(nested_)?(absmax|quant_map)$|\.quant_state\.bitsandbytes__\w+$", "bitsandbytes, 4 bits"),
        (r"\.(SCB|weight_format)$", "bitsandbytes, 8 bits"),
        (r"\.g_idx$", "GPTQ"),
        (r"\.codebooks$", "AQLM"),
        (r"\.W_q$", "HQQ"),
        (r"\.weight\._(data|scale|shift)$", "quanto"),
        (r"\.weight_scales$", "EETQ"),
        (r"(?<!masked_embedding)\.(res_|outlier_)?centroids(\.weight)?$", "VPTQ"),
        (r"\.(dense_weights|col_vals)$", "SpQR"),
        (r"\.tables2?$", "HIGGS"),
        (r"[._:]qdata$", "torchao"),
        (r"\.(q_weight|q_scale_max|q_invperm)$", "ExLlamaV2"),
        (r"\.(trellis|suh|svh)$", "ExLlamaV3"),
        (r"\.(Qidxs|SU|SV)$", "QuIP#"),
        (r"\.pre_quant_scale$", "ModelOpt with inputs that AWQ scales"),
        (r"\.(bitmask|compressed)$", "compressed-tensors with sparse weights"),
    )
)
# compressed-tensors: what a group of its config may say of weights
READABLE = {("int", 4), ("int", 8), ("float", 4), ("float", 8)}
FORMATS = (
    None, "dense", "pack-quantized", "int-quantized", "float-quantized", "naive-quantized", "mixed-precision",
    "nvfp4-pack-quantized", "mxfp4-pack-quantized",
)  # fmt: skip
PLAIN = ("F64", "F32", "F16", "BF16")


def quantization(config: Mapping[str, Any], where: str = "config.json") -> Mapping[str, Any] | None:
    """What a config.json says of quantised weights; None where it says nothing.

    Raises CheckpointError where that is no JSON object.
    """
    for part in (config, config.get("text_config"), config.get("llm_config")):
        for key in ("quantization_config", "compression_config", "quantization"):
            if isinstance(part, Mapping) and (value := part.get(key)):
                if not isinstance(value, Mapping):
                    raise CheckpointError(f"{where}: {key} is {shown(value)}, expected a JSON object")
                return value if key != "quantization" else {"quant_method": "mlx", **value}
    return None


def refuse_method(config: Mapping[str, Any], where: str = "config.json") -> None:
    """Raises CheckpointError for a config.json of a method that is not read, naming it."""
    said = quantization(config, where)
    if said is None:
        return
    method = said.get("quant_method", "mlx" if said.keys() <= {"group_size", "bits", "mode"} else "")
    if not isinstance(method, str):
        raise CheckpointError(f"{where}: quant_method is {shown(method)}, expected a name")
    if known := METHODS.get(method.lower()):
        raise CheckpointError(f"{where}: weights quantised by {known}, which is not supported; {WAY_OUT}")
    algorithm = said.get("quant_algo")
    if isinstance(algorithm, str) and re.search("AWQ|SVDQUANT|SQ_", algorithm):
        raise CheckpointError(f"{where}: weights quantised as {algorithm}, which is not supported; {WAY_OUT}")
    _refuse_groups(said, where)


def refuse_foreign(source: TensorSource) -> None:
    """Raises CheckpointError naming the method where the names of tensors are those of one that is not read."""
    names = source.names()
    present = set(names)
    for name in names:
        method = next((method for pattern, method in TENSORS if pattern.search(name)), None)
        base, _, leaf = name.rpartition(".")
        if method is None and leaf in ("qweight", "qzeros"):
            method = _gptq_or_awq(source, base, present)
        if method is None and leaf == "scales" and f"{base}.weight" in present:
            method = "mlx" if source.dtype(f"{base}.weight") == "U32" else None
        if method is not None:
            raise CheckpointError(
                f"{source.file(name).name}: weights quantised by {method} ({name}), which is not supported; {WAY_OUT}"
            )


def check_agreement(config: Mapping[str, Any], tensors: TensorSource, where: str) -> None:
    """Raises CheckpointError where config.json and the tensors cannot both be right about quantised weights."""
    said = quantization(config, where) is not None
    packed = isinstance(tensors, PackedTensors)
    if said and not packed:
        kinds = ", ".join(sorted({tensors.dtype(name) for name in tensors.names()}))
        raise CheckpointError(
            f"{where}: quantization_config says that weights are quantised, the files hold plain tensors ({kinds}); "
            "remove quantization_config if they are the original weights, else download them again"
        )
    for name in tensors.names():
        if isinstance(tensors, PackedTensors) and tensors.format(name):
            continue
        kind = tensors.dtype(name)
        is_codes = kind not in PLAIN and kind in BITS and (said or not kind.startswith("F8"))
        if name.endswith("weight") and is_codes and len(tensors.shape(name)) > 1:
            raise CheckpointError(
                f"{tensors.file(name).name}: {name} is stored as {kind} without the scales that say what its "
                "codes stand for; this quantised variant is not supported"
            )


def _refuse_groups(said: Mapping[str, Any], where: str) -> None:
    """What compressed-tensors says of groups of layers."""
    if (sparse := _object(said, "sparsity_config", where).get("format", "dense")) != "dense":
        raise CheckpointError(f"{where}: weights stored sparse ({shown(sparse)}), which is not supported; {WAY_OUT}")
    if _object(said, "transform_config", where).get("config_groups"):
        raise CheckpointError(f"{where}: transform_config rotates what layers are given, which is not supported")
    groups = _object(said, "config_groups", where)
    for name, group in groups.items():
        if not isinstance(group, Mapping):
            raise CheckpointError(f"{where}: {shown(name)} of config_groups is {shown(group)}, expected a JSON object")
        weights = group.get("weights")
        if weights is None:
            continue
        format = group.get("format") or said.get("format")
        kind = (weights.get("type", "int"), weights.get("num_bits")) if isinstance(weights, Mapping) else None
        if kind is None or not _hashable(kind) or kind not in READABLE or format not in FORMATS:
            raise CheckpointError(
                f"{where}: {shown(name)} of config_groups holds weights as {shown(kind)} in format {shown(format)}, "
                f"which is not supported; {WAY_OUT}"
            )
        if format == "pack-quantized" and kind != ("int", 4):
            raise CheckpointError(
                f"{where}: {shown(name)} of config_groups packs weights in {kind[1]} bits; 4 are supported; {WAY_OUT}"
            )
        if weights.get("symmetric", True) is not True:
            raise CheckpointError(
                f"{where}: {shown(name)} of config_groups is asymmetric, only symmetric formats are supported; "
                f"{WAY_OUT}"
            )


def _object(said: Mapping[str, Any], key: str, where: str) -> Mapping[str, Any]:
    value = said.get(key) or {}
    if not isinstance(value, Mapping):
        raise CheckpointError(f"{where}: {key} is {shown(value)}, expected a JSON object")
    return value


def _hashable(kind: Iterable[Any]) -> bool:
    return all(isinstance(part, str | int) for part in kind)


def _gptq_or_awq(source: TensorSource, base: str, present: set[str]) -> str:
    """Both have the same names: GPTQ packs eight inputs in an integer, AWQ eight outputs."""
    if f"{base}.g_idx" in present:
        return "GPTQ"
    codes, zeros = f"{base}.qweight", f"{base}.qzeros"
    if not {codes, zeros} <= present or len(source.shape(codes)) != 2 or len(source.shape(zeros)) != 2:
        return "GPTQ or AWQ"
    return "AWQ" if source.shape(codes)[1] == source.shape(zeros)[1] else "GPTQ"
