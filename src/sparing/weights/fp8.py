"""FP8: float8_e4m3fn numbers and a float32 scale for the tensor, for each row, or for each 128 x 128 block.

    codes  float8_e4m3fn  [..., out, in]
    scale  float32        [...]  or  [..., out]  or  [..., ceil(out / 128), ceil(in / 128)]

    weight = code * scale

Source: NVIDIA Model-Optimizer (tensor), llm-compressor FP8-dynamic (rows), DeepSeek-V3 and V4 `kernel.py` (blocks).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sparing.config.formats import FORMATS
from sparing.kernels.microscaling import E4M3_LARGEST, to_e4m3
from sparing.weights.weight import PackedWeight

__all__ = ["FP8Weight", "fp8_block_dequant", "fp8_block_quant", "fp8_dequantize", "fp8_quantize"]

BLOCK = (128, 128)


def fp8_quantize(w: Tensor, scales: str = "row") -> tuple[Tensor, Tensor]:
    """(codes float8_e4m3fn [..., out, in], scale float32) of w [..., out, in].

    scales: "tensor" ([...], one for each matrix), "row" ([..., out]) or "block" (`fp8_block_quant`). Zeros have
    scale 1. Raises ValueError for another.
    """
    if scales == "block":
        return fp8_block_quant(w)
    if scales not in FORMATS["fp8"].scales:
        raise ValueError(f"scales={scales!r} is not known, use {', '.join(FORMATS['fp8'].scales)}")
    amax = w.abs().amax(-1) if scales == "row" else w.abs().amax((-2, -1))
    scale = _scale(amax)
    return to_e4m3(w / _to_rows(scale, w.ndim)), scale


def fp8_dequantize(codes: Tensor, scale: Tensor) -> Tensor:
    """float32 [..., out, in]; the number of the scale's dimensions says which of the three it is."""
    if scale.ndim == codes.ndim:
        return fp8_block_dequant(codes, scale)
    return codes.float() * _to_rows(scale, codes.ndim)


def fp8_block_quant(w: Tensor, block: tuple[int, int] = BLOCK) -> tuple[Tensor, Tensor]:
    """(codes float8_e4m3fn [..., out, in], scale float32 [..., ceil(out / 128), ceil(in / 128)]); last blocks may be
    partial."""
    pad = (0, -w.shape[-1] % block[1], 0, -w.shape[-2] % block[0])
    tiles = torch.nn.functional.pad(w.abs(), pad).unflatten(-2, (-1, block[0])).unflatten(-1, (-1, block[1]))
    scale = _scale(tiles.amax((-3, -1)))
    return to_e4m3(w / _spread(scale, w.shape, block)), scale


def fp8_block_dequant(codes: Tensor, scale: Tensor, block: tuple[int, int] = BLOCK) -> Tensor:
    """float32 [..., out, in] of codes and their scales by block."""
    return codes.float() * _spread(scale.float(), codes.shape, block)


def _scale(amax: Tensor) -> Tensor:
    scale = amax.float() / E4M3_LARGEST
    return torch.where(scale > 0, scale, 1.0)


def _to_rows(scale: Tensor, ndim: int) -> Tensor:
    """Scales of matrices or rows, so that they broadcast to [..., out, in]."""
    return scale.view(*scale.shape, *[1] * (ndim - scale.ndim))


def _spread(scale: Tensor, shape: torch.Size, block: tuple[int, int]) -> Tensor:
    """Scales by block -> a scale for every number."""
    wide = scale.repeat_interleave(block[0], -2).repeat_interleave(block[1], -1)
    return wide[..., : shape[-2], : shape[-1]]


class FP8Weight(PackedWeight):
    """A weight in FP8; the dimensions of its scale say what shares one."""

    format = "fp8"

    pack, unpack = staticmethod(fp8_quantize), staticmethod(fp8_dequantize)

    @classmethod
    def encode(cls, rows: Tensor, scales: str | None = None, **whole: Tensor) -> dict[str, Tensor]:
        if "scale" in whole:
            return {"codes": to_e4m3(rows / whole["scale"])}
        codes, scale = fp8_quantize(rows, scales or "row")
        return {"codes": codes, "scale": scale}

    @classmethod
    def whole(cls, amax: Callable[[], Tensor], scales: str | None = None) -> dict[str, Tensor]:
        return {"scale": _scale(amax())} if scales == "tensor" else {}

    def rows(self, start: int, stop: int) -> dict[str, Tensor]:
        scale = self.scale
        if scale.ndim == self.ndim:
            scale = scale[start // BLOCK[0] : -(-stop // BLOCK[0])]
        elif scale.ndim == self.ndim - 1:
            scale = scale[start:stop]
        return {"codes": self.codes[start:stop], "scale": scale}
