"""Query statistics in the files of others: the method authors' `.pt`, and the TRIA format of domvox/triattention-ggml.

Neither says which frequencies the model rotates with (TRIA's theta is known to be wrong in shipped files): those come
from the model, as they must.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import torch

from sparing.errors import CheckpointError
from sparing.memory.triattention.layer_statistics import MOST, PARTS, LayerStatistics, expect_parts

__all__ = ["read_foreign"]

TRIA_MAGIC = struct.pack("<I", 0x54524941)
TRIA_HEADER = 64
SPARSE = 16  # times as many heads as a file holds: their number is that of the highest


def read_foreign(path: Path, *, allow_pickle: bool) -> tuple[dict[int, LayerStatistics], int] | None:
    """(statistics by layer, tokens they are over: 0 where the file does not say), or None for a safetensors file.

    Raises CheckpointError for a pickle that was not asked for, a damaged file, or another pairing than by halves.
    """
    try:
        with open(path, "rb") as file:
            start = file.read(4)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from error
    if start == TRIA_MAGIC:
        return _read_tria(path), 0
    if start[:2] in (b"PK", b"\x80\x02"):
        if not allow_pickle:
            raise CheckpointError(
                f"{path}: a pickled file; Statistics.load(path, allow_pickle=True) reads tensors and nothing else"
            )
        return _read_official(path), 0
    return None


def _read_official(path: Path) -> dict[int, LayerStatistics]:
    """{"metadata": ..., "stats": {"layer00_head00": {"q_mean_real", "q_mean_imag", "q_abs_mean"}}}, all float32 [F]."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
        metadata, stats = content["metadata"], content["stats"]
        style = metadata.get("rope_style", "half")
        heads: dict[int, dict[int, Any]] = {}
        for name, value in stats.items():
            layer, head = (int(number) for number in name.removeprefix("layer").split("_head"))
            if not (0 <= layer < MOST and 0 <= head < MOST):
                raise ValueError(f"{name} is beyond {MOST} layers or heads")
            parts = [value[part] for part in PARTS]
            expect_parts(f"of {name}", parts)
            real, imaginary, norm = (part.float() for part in parts)
            heads.setdefault(layer, {})[head] = torch.complex(real, imaginary), norm
        count = 1 + max(max(layer) for layer in heads.values())
        if count * len(heads) > SPARSE * len(stats):
            raise ValueError(f"{len(stats)} heads of {len(heads)} layers with {count} heads each")
        bands = {norm.shape for layer in heads.values() for _, norm in layer.values()}
        (shape,) = bands
    except CheckpointError:
        raise
    except Exception as error:  # whatever torch finds in the bytes
        raise CheckpointError(f"{path}: not query statistics as the authors write them: {error}") from error
    if style != "half":
        raise CheckpointError(f"{path}: rope_style is {style!r}, supported: 'half'")
    found = {}
    for layer, present in heads.items():  # a head that was not sampled stays zero, which means: no vote
        center, norm = torch.zeros(count, *shape, dtype=torch.complex64), torch.zeros(count, *shape)
        for head, (c, n) in present.items():
            center[head], norm[head] = c, n
        found[layer] = LayerStatistics(center, norm)
    return found


def _read_tria(path: Path) -> dict[int, LayerStatistics]:
    """64 bytes: magic, version, layers, query heads, key heads, rotary size, bands. Then four vectors a layer and head.

    They are the two parts of the centre, the mean norm, and R, which is not read: converters write other things there.
    """
    with open(path, "rb") as file:
        content = file.read(TRIA_HEADER)
    if len(content) < TRIA_HEADER:
        raise CheckpointError(f"{path}: {len(content)} bytes, a TRIA header has {TRIA_HEADER}")
    version, layers, heads, _, rotary, bands = struct.unpack_from("<6I", content, 4)
    if version not in (1, 2) or not all(0 < n <= MOST for n in (layers, heads, bands)) or rotary != 2 * bands:
        raise CheckpointError(
            f"{path}: TRIA version {version} with {layers} layers, {heads} heads, {bands} bands of {rotary} dimensions"
        )
    start = TRIA_HEADER + (4 * layers if version == 2 else 0)  # version 2 has a budget scale a layer: not ours
    expected = start + 16 * layers * heads * bands
    if (size := path.stat().st_size) != expected:
        raise CheckpointError(f"{path}: {size} bytes, its header promises {expected}")
    values = torch.frombuffer(bytearray(path.read_bytes()[start:]), dtype=torch.float32).view(layers, heads, 4, bands)
    real, imaginary, norm, _ = values.unbind(2)
    try:
        expect_parts("of all layers", (real, imaginary, norm), layers)
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged query statistics: {error}") from None
    center = torch.complex(real.contiguous(), imaginary.contiguous())
    return {i: LayerStatistics(center[i], norm[i].clone()) for i in range(layers)}
