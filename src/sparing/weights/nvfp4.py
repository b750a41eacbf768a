"""NVFP4: E2M1 codes, a float8 scale for 16 of them, a float32 scale for the whole tensor. 4.5 bits a weight.

    codes    uint8          [..., out, in / 2]   two E2M1 codes a byte, the earlier in the low nibble
    scale    float8_e4m3fn  [..., out, in / 16]  of 16 consecutive inputs; positive
    scale_2  float32        [...]                of the matrix: amax / (6 * 448)

    weight = e2m1(code) * scale * scale_2

All arithmetic is float32. The scale of a block is the largest magnitude over 6 by default; two other choices find
one with less error. Scales of a file are used as stored.
Source: NVIDIA Model-Optimizer `nvfp4_tensor.py`; four over six: arXiv 2512.02010.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from sparing.config.formats import FORMATS
from sparing.kernels import e2m1
from sparing.kernels.microscaling import E4M3_LARGEST
from sparing.weights.weight import PackedWeight

__all__ = [
    "BLOCK",
    "SCALES",
    "NVFP4Weight",
    "block_scales",
    "nvfp4_dequantize",
    "nvfp4_quantize",
    "nvfp4_round",
    "tensor_scale",
]

BLOCK = 16
PIECE = 1 << 16  # numbers rounded at a time: what is made on the way stays in cache
SMALLEST = 2.0**-9  # positive float8_e4m3fn number
SCALES = tuple(FORMATS["nvfp4"].scales)


def nvfp4_quantize(w: Tensor, scales: str = "max", scale_2: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """(packed uint8 [..., n / 2], scale float8_e4m3fn [..., n / 16], scale_2 float32 []) of w [..., n].

    scales: how a block's scale is chosen: "max" (largest magnitude to 6), "four_over_six" (to 6 or to 4, whichever
    errs less), "mse" (the best of all 126), "2d" (one scale for 16 x 16, so that the transposed matrix has the same
    values; w must be [..., 16 i, n]). scale_2: given instead of computed, one that broadcasts to [..., n / 16];
    blocks beyond 6 * 448 of it saturate. A tensor of zeros has scale_2 0.
    Raises ValueError where n is not a multiple of 16, and for an unknown `scales`.
    """
    _check(w.shape, scales)
    blocks = w.float().unflatten(-1, (-1, BLOCK))  # [..., n / 16, 16]
    g = tensor_scale(w) if scale_2 is None else scale_2.float()
    scale = block_scales(blocks, g, scales)
    codes = e2m1.encode(blocks / _divisor(scale, g)[..., None])
    return e2m1.pack(codes.flatten(-2)), scale, g


def nvfp4_dequantize(packed: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """float32 [..., n] of what `nvfp4_quantize` returned, or of a file's tensors; scale_2 broadcasts to scale's."""
    values = e2m1.unpack(packed).unflatten(-1, (-1, BLOCK))
    return (values * (scale.float() * scale_2)[..., None]).flatten(-2)


def nvfp4_round(x: Tensor, scales: str = "max", generator: torch.Generator | None = None) -> Tensor:
    """x [..., n] rounded to what NVFP4 can hold, float32: quantised and dequantised.

    generator: round each number up or down at random instead, with the mean at x (except the few beyond 6 scales).
    """
    _check(x.shape, scales)
    rows, g = x.reshape(-1, x.shape[-1]), tensor_scale(x)
    result = torch.empty_like(rows, dtype=torch.float32)
    count = max(1, PIECE // rows.shape[1] // BLOCK) * BLOCK
    for start in range(0, len(rows), count):
        blocks = rows[start : start + count].float().unflatten(-1, (-1, BLOCK))
        step = _divisor(block_scales(blocks, g, scales), g)[..., None]
        out = result[start : start + count].unflatten(-1, (-1, BLOCK))
        torch.mul(e2m1.rounded(blocks / step, generator), step, out=out)
    return result.view(x.shape)


def tensor_scale(w: Tensor) -> Tensor:
    """scale_2 of a tensor: float32 []."""
    least, most = torch.aminmax(w) if w.numel() else (torch.zeros((), device=w.device),) * 2
    return torch.maximum(-least, most).abs().float() / (e2m1.LARGEST * E4M3_LARGEST)  # abs: zeros give -0


def block_scales(blocks: Tensor, scale_2: Tensor, scales: str = "max") -> Tensor:
    """float8_e4m3fn [..., n / 16] for float32 blocks [..., n / 16, 16]; `scales` as in `nvfp4_quantize`."""
    if scales == "2d":  # 16 rows together
        amax = blocks.abs().amax(-1).unflatten(-2, (-1, BLOCK)).amax(-2, keepdim=True)
        amax = amax.expand(*amax.shape[:-2], BLOCK, -1).flatten(-3, -2)
    else:
        amax = blocks.abs().amax(-1)
    scale = _to_e4m3(amax / (e2m1.LARGEST * scale_2))
    if scales == "four_over_six":
        return _better(blocks, scale_2, scale, _to_e4m3(amax / (4.0 * scale_2)))
    if scales == "mse":
        return _best(blocks, scale_2, scale)
    return scale


def _to_e4m3(scale: Tensor) -> Tensor:
    """Rounded to nearest even; a block of zeros (0, or 0/0 where all blocks are) gets 1."""
    scale = torch.where(scale > 0, scale, 1.0)
    return scale.clamp(SMALLEST, E4M3_LARGEST).to(torch.float8_e4m3fn)


def _divisor(scale: Tensor, scale_2: Tensor) -> Tensor:
    """scale * scale_2, or 1 where that is 0: then all numbers of the block are 0 too."""
    product = scale.float() * scale_2
    return torch.where(product > 0, product, 1.0)


def _error(blocks: Tensor, scale: Tensor, scale_2: Tensor) -> Tensor:
    """Sum of squared errors of each block: [...] for blocks [..., 16]."""
    step = _divisor(scale, scale_2)[..., None]
    return (e2m1.decode(e2m1.encode(blocks / step)) * step - blocks).square_().sum(-1)


def _better(blocks: Tensor, scale_2: Tensor, first: Tensor, second: Tensor) -> Tensor:
    better = _error(blocks, second, scale_2) < _error(blocks, first, scale_2)
    return torch.where(better, second.float(), first.float()).to(torch.float8_e4m3fn)


def _best(blocks: Tensor, scale_2: Tensor, start: Tensor) -> Tensor:
    """The scale with the least squared error of all 126; of equals `start`, then the larger.

    A block tries a scale only if it could win: below `start` the largest number is cut off, above 4 times its size
    everything becomes 0.
    """
    shape = start.shape
    blocks, scale_2 = blocks.reshape(-1, BLOCK), scale_2.expand(shape).reshape(-1)
    best = start.reshape(-1).float()
    amax, least = blocks.abs().amax(-1), _error(blocks, best, scale_2)
    for candidate in _candidates(blocks.device):
        step = candidate * scale_2
        # Cutting off the largest number alone costs `cut`: a lower bound of the error. Candidates fall, so once it is
        # above the best error so far no smaller scale can win.
        cut = (amax - e2m1.LARGEST * step).clamp_min_(0.0).square_()
        trying = ((cut < least) & (step < 4.0 * amax)).nonzero().squeeze(-1)
        if len(trying):
            error = _error(blocks[trying], candidate.expand(len(trying)), scale_2[trying])
            won = error < least[trying]
            best[trying[won]], least[trying[won]] = candidate, error[won]
    return best.view(shape).to(torch.float8_e4m3fn)


def _candidates(device: torch.device) -> Tensor:
    """The positive finite float8_e4m3fn numbers, as float32 [126], the largest first."""
    return torch.arange(126, 0, -1, dtype=torch.uint8, device=device).view(torch.float8_e4m3fn).float()


def _check(shape: torch.Size, scales: str) -> None:
    if scales not in SCALES:
        raise ValueError(f"scales={scales!r} is not known, use {', '.join(SCALES)}")
    if not shape or shape[-1] % BLOCK:
        raise ValueError(f"NVFP4 needs a last dimension that is a multiple of {BLOCK}, found shape {list(shape)}")
    if scales == "2d" and (len(shape) < 2 or shape[-2] % BLOCK):
        raise ValueError(f"scales='2d' needs rows in multiples of {BLOCK}, found shape {list(shape)}")


class NVFP4Weight(PackedWeight):
    """A weight in NVFP4."""

    format = "nvfp4"
    per_byte = 2
    native_rows = 16
    whole_parts = ("scale_2",)

    @classmethod
    def encode(cls, rows: Tensor, scales: str | None = None, **whole: Tensor) -> dict[str, Tensor]:
        codes, scale, _ = nvfp4_quantize(rows, scales or "max", whole["scale_2"])
        return {"codes": codes, "scale": scale}

    @classmethod
    def decode(cls, parts: Mapping[str, Tensor]) -> Tensor:
        return nvfp4_dequantize(parts["codes"], parts["scale"], parts["scale_2"])

    @classmethod
    def whole(cls, amax: Callable[[], Tensor], scales: str | None = None) -> dict[str, Tensor]:
        return {"scale_2": amax() / (e2m1.LARGEST * E4M3_LARGEST)}
