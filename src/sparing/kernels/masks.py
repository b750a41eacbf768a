"""Which keys a query sees, as boolean masks (True = visible): encoding, denoising, and training several blocks at once.

Decoding builds none of these: its memories only hold what may be seen. Training and tests do.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["block_diffusion_training_mask", "canvas_mask", "encoder_mask"]


def encoder_mask(
    P: int,
    window: int | None = None,
    valid: Tensor | None = None,
    image_blocks: Iterable[tuple[int, int]] = (),
) -> Tensor:
    """bool [P, P] (or [B, P, P]): query i sees valid keys j <= i, and only i - j < window.

    window: keys a query sees, its own included; None in full layers. valid: bool [P] or [B, P], False on padding.
    image_blocks: (start, end) of runs whose tokens all see each other, whatever the window.
    Raises ValueError for a window below 1 or a block outside 0..P. Source: DiffusionGemma encoder masks.
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, found {window}")
    position = torch.arange(P)
    mask = position <= position[:, None]
    if window is not None:
        mask &= position > position[:, None] - window
    for start, end in image_blocks:
        if not 0 <= start < end <= P:
            raise ValueError(f"image block ({start}, {end}) is not inside 0..{P}")
        mask[start:end, start:end] = True
    return mask if valid is None else mask.to(valid.device) & valid[..., None, :]


def canvas_mask(P: int, L: int, window: int | None = None, valid: Tensor | None = None) -> Tensor:
    """bool [L, P + L] (or [B, L, P + L]): every canvas query sees the whole canvas and the same part of the prefix.

    That part is all valid prefix positions, or in sliding layers the last `window - 1` valid ones: exactly what the
    next token would see. valid: bool [P] or [B, P]. Raises ValueError for a window below 1.
    Source: DiffusionGemma decoder masks (transformers with a dynamic cache).
    """
    if window is not None and window < 1:
        raise ValueError(f"window must be at least 1, found {window}")
    valid = torch.ones(P, dtype=torch.bool) if valid is None else valid.bool()
    if window is not None:
        from_here = valid.flip(-1).cumsum(-1).flip(-1)  # valid positions at or after each
        valid = valid & (from_here < window)
    keys = torch.cat([valid, valid.new_ones(*valid.shape[:-1], L)], -1)
    return keys[..., None, :].expand(*keys.shape[:-1], L, P + L)


def block_diffusion_training_mask(prefix: int, response: int, block: int, window: int | None = None) -> Tensor:
    """bool [response, prefix + 2 * response]: all blocks of a response denoised at once against one clean encoding.

    Columns: the clean prefix, the clean response, the noisy response. A noisy query of block i sees the prefix and the
    clean blocks strictly before i (in sliding layers the last `window - 1` of these), and the noisy block i.
    Raises ValueError if the response is not whole blocks. Source: NeMo Automodel block-diffusion mask.
    """
    if block < 1 or response % block:
        raise ValueError(f"a response of {response} tokens is not a whole number of blocks of {block}")
    rows = []
    for start in range(0, response, block):
        seen = canvas_mask(prefix + start, block, window)  # [block, prefix + start + block]
        row = torch.zeros(block, prefix + 2 * response, dtype=torch.bool)
        row[:, : prefix + start] = seen[:, : prefix + start]
        row[:, prefix + response + start :][:, :block] = True
        rows.append(row)
    return torch.cat(rows) if rows else torch.zeros(0, prefix, dtype=torch.bool)
