"""Small GGUF files, written as llama.cpp's converter writes them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter


def write_gguf(
    path: Path,
    architecture: str,
    metadata: Mapping[str, Any],
    tensors: Mapping[str, torch.Tensor | tuple[np.ndarray, GGMLQuantizationType]],
) -> Path:
    """metadata: keys that begin with `general.`, `tokenizer.` or `split.` stand alone, others belong to the model.

    tensors: float32 tensors, or raw blocks [rows, bytes] with their type.
    """
    writer = GGUFWriter(path, architecture)
    for key, value in metadata.items():
        name = key if key.startswith(("general.", "tokenizer.", "split.")) else f"{architecture}.{key}"
        if isinstance(value, bool):
            writer.add_bool(name, value)
        elif isinstance(value, int):
            writer.add_uint32(name, value)
        elif isinstance(value, float):
            writer.add_float32(name, value)
        elif isinstance(value, str):
            writer.add_string(name, value)
        elif value and isinstance(value[0], float):
            writer.add_key_value(name, value, GGUFValueType.ARRAY, GGUFValueType.FLOAT32)
        else:
            writer.add_array(name, list(value))
    for name, tensor in tensors.items():
        if isinstance(tensor, torch.Tensor):
            writer.add_tensor(name, tensor.detach().float().numpy())
        else:
            blocks, kind = tensor
            writer.add_tensor(name, blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def interleaved(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a llama projection as the converter orders them: pair m becomes rows 2m and 2m + 1."""
    rows = []
    for head in weight.reshape(heads, -1, *weight.shape[1:]):
        half = len(head) // 2
        for m in range(half):
            rows += [head[m], head[m + half]]
    return torch.stack(rows)


def gguf_name(architecture: gguf.MODEL_ARCH, layers: int, name: str) -> str:
    """The name that the gguf package itself gives a Hugging Face tensor."""
    found = gguf.get_tensor_name_map(architecture, layers).get_name(name, (".weight", ".bias"))
    assert found is not None, name
    return found


def random_blocks(rows: int, columns: int, kind: GGMLQuantizationType, seed: int = 0) -> np.ndarray:
    """Bytes of quantised rows; every two bytes are also a harmless float16, wherever a scale may lie."""
    block, size = gguf.GGML_QUANT_SIZES[kind]
    raw = np.random.default_rng(seed).integers(0, 256, (rows, columns // block * size), dtype=np.uint8)
    raw[:, 1::2] = raw[:, 1::2] % 0x38  # exponents below 1: no infinities, no NaN
    raw[:, 0::2] = raw[:, 0::2] % 0x38
    return raw
