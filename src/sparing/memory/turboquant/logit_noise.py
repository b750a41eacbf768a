"""How much keys in codes will blur attention, told from the first prompt, before any of them is read as codes.

The error of a coded key points anywhere, so a logit of it is off by a random amount whose deviation is
`scale |q| |k| sqrt(D / d)`, with D the codebook's relative squared error. Nothing else is lost that a user could see
coming: a layer of long keys (a bias in their projection is one cause) needs more bits than the others.
Source: TurboQuant (arXiv 2504.19874), theorem 1; on the keys of SmolLM2 the prediction is right to 5 %.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor

from sparing.config.codes import CodeFormat
from sparing.memory.turboquant.codebook import lloyd_max_codebook
from sparing.memory.turboquant.key_bias import KeyBias

__all__ = ["LogitNoise", "warn_of_noise"]

LIMIT = 0.5  # nats: a weight is then off by a factor of 1.6 either way


class LogitNoise:
    """What is predicted for one layer's keys.

    role: of what is coded, "keys", or "values" where keys follow from them.
    """

    def __init__(self, form: CodeFormat, head_dim: int, bias: KeyBias | None, role: str = "keys"):
        self._bias = bias
        self._relative = math.sqrt(_distortion(form, head_dim, role) / head_dim)

    def predicted(self, q: Tensor, keys: Tensor, scale: float) -> float:
        """The deviation, nats. q [T, heads, d]: a first prompt's queries; keys [kv_heads, T, d]; normed and rotated."""
        if self._bias is not None:  # it is not quantised
            keys = keys.float() - self._bias.rotated(torch.arange(keys.shape[1], device=keys.device))
        of_keys = keys.float().square().sum(-1).mean(-1)  # [kv_heads]
        of_queries = q.float().square().sum(-1).mean(0).unflatten(0, (len(keys), -1))  # [kv_heads, group]
        both = (of_keys[:, None] * of_queries).mean().sqrt().item()
        return scale * both * self._relative


def _distortion(form: CodeFormat, head_dim: int, role: str) -> float:
    """Relative squared error of a vector, over the parts it is quantised in."""
    total = 0.0
    for channels, bits in form.split(head_dim, role):
        if form.variant == "mse":
            error = channels * lloyd_max_codebook(channels, bits)[2]
        else:  # one bit sketches what the others leave
            error = math.pi / 2 * (channels * lloyd_max_codebook(channels, bits - 1)[2] if bits > 1 else 1.0)
        total += channels / head_dim * error
    return total


def warn_of_noise(kv: str, form: CodeFormat, layers: Mapping[int, float]) -> None:
    """Warn, once for all layers, if any is predicted above the limit. layers: the deviation of each, in nats."""
    above = {i: deviation for i, deviation in layers.items() if deviation > LIMIT}
    if not above:
        return
    worst = max(above, key=above.__getitem__)
    if form.k_bits < 8:
        remedy = f"keys of more bits lose less, such as kv='turboquant:k8v{form.v_bits:g}'"
    else:
        remedy = f"leave it exact with skip_layers=({worst},)"
    warnings.warn(
        f"kv={kv!r}: codes are predicted to put noise of {above[worst]:.2f} on the attention logits of layer {worst}"
        f" ({len(above)} of {len(layers)} layers are above {LIMIT}): {remedy}",
        RuntimeWarning,  # of what the prompt shows, not of how it was called
        stacklevel=3,
    )
