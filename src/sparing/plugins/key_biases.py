"""The biases in the key projections of transformers' models, where they turn as `memory.turboquant.key_bias` says."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel

from sparing.config.fields import Fields
from sparing.config.memory import AttentionSpec
from sparing.config.rope import RopeParameters
from sparing.errors import CheckpointError
from sparing.memory.turboquant.key_bias import KeyBias

__all__ = ["key_biases"]

PROBED = 64  # first positions at which a model's rotation is compared with ours


def key_biases(
    model: PreTrainedModel, config: PreTrainedConfig, specs: Sequence[AttentionSpec | None]
) -> list[KeyBias | None]:
    """Per layer, what its key projection adds before the rotation; None where it cannot be told apart, or none does."""
    found: list[KeyBias | None] = [None] * len(specs)
    try:
        positions = config.max_position_embeddings
        head_dim = next((spec.head_dim for spec in specs if spec is not None), 0)
        turning = Fields(config.rope_parameters, "config")
        rope = RopeParameters.parse(turning, theta=1e4, max_positions=positions, head_dim=head_dim, shares=True)
    except (AttributeError, CheckpointError):  # no rotation, one for each kind of layer, or one we do not know
        return found
    module: Any
    decoder = model.get_decoder()
    for module in decoder.modules():
        bias, layer = getattr(getattr(module, "k_proj", None), "bias", None), getattr(module, "layer_idx", None)
        # A norm after the projection mixes the bias with the rest, and "dynamic" angles differ between sequences.
        has_norm = any("norm" in name for name, _ in module.named_children())
        if bias is None or layer is None or has_norm or rope.rope_type == "dynamic":
            continue
        if (spec := specs[layer]) is not None:
            ours = KeyBias(bias.view(-1, spec.head_dim), rope)
            found[layer] = ours if _rotates_alike(decoder, module, ours) else None
    return found


def _rotates_alike(decoder: Any, attention: Any, ours: KeyBias) -> bool:
    """Whether a model turns keys as `KeyBias` does. Some turn other pairs: GLM and Ernie 4.5 those of neighbours."""
    bias, positions = ours.bias, torch.arange(PROBED, device=ours.bias.device)
    try:
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        keys = bias[None, :, None].expand(-1, -1, PROBED, -1)  # [1, kv_heads, n, head_dim]
        with torch.no_grad():
            _, theirs = rotate(keys, keys, *decoder.rotary_emb(keys, positions[None]))
    except Exception:  # of a model that is built otherwise
        return False
    expected = ours.rotated(positions)
    close = 1e-3 * bias.abs().max().item()
    return theirs[0].shape == expected.shape and torch.allclose(theirs[0].float(), expected, rtol=0, atol=close)
