"""Packed weights for tests of products: of every kind of scale, with every code in them."""

import torch

from sparing.config.formats import FORMATS
from sparing.weights.fp8 import FP8Weight, fp8_quantize
from sparing.weights.weight import PackedWeight, empty_packed

KINDS = [*(f for f in FORMATS if f != "fp8"), "fp8 tensor", "fp8 row", "fp8 block"]


def weight_of(kind: str, out: int, size: int) -> PackedWeight:
    """A weight [out, size] of random scales, each row's another, that holds every code it has room for."""
    w = torch.randn(out, size) * torch.logspace(-3, 1, out)[:, None]
    if kind.startswith("fp8"):
        codes, scale = fp8_quantize(w, kind.split()[1])
        weight = FP8Weight(codes=codes, scale=scale)
    else:
        weight = empty_packed(kind, w.shape)
        weight.fill(lambda: iter([w]))
    codes = weight.codes.view(torch.uint8)
    codes.copy_(torch.arange(codes.numel()).view(codes.shape) * 37 % 256)
    if kind.startswith("fp8"):
        codes[(codes & 0x7F) == 0x7F] = 1  # no NaN; 1 is subnormal
    if kind == "nvfp4":
        scales = weight.scale.view(torch.uint8)
        scales.copy_(torch.arange(scales.numel()).view(scales.shape) % 126 + 1)
    return weight


def stacked(weights: list[PackedWeight]) -> PackedWeight:
    """A stack of these matrices."""
    parts = [dict(weight.named_buffers()) for weight in weights]
    return type(weights[0])(**{name: torch.stack([own[name] for own in parts]) for name in parts[0]})
