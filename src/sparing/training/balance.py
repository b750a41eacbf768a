"""Keeping a mixture's experts equally busy without a loss of its own: the correction bias follows their load.

After each step the bias of an expert that got fewer tokens than the mean rises by a constant, that of a busier one
falls. The bias chooses experts and never weighs them, so no gradient knows of it.
Source: DeepSeek-V3, arXiv 2412.19437, 2.1.2; Nemotron 3 uses the same rate.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparing.models.deepseek_v4 import Experts
from sparing.models.nemotron3 import LatentMoELayer

__all__ = ["balance_experts", "correction_biases", "watch_experts"]

RATE = 1e-3
Mixture = LatentMoELayer | Experts


def _mixtures(model: nn.Module) -> Iterator[tuple[str, Mixture]]:
    """Those that choose experts by score."""
    for name, module in model.named_modules():
        if isinstance(module, Mixture) and hasattr(module.gate, "e_score_correction_bias"):
            yield name, module


def correction_biases(model: nn.Module) -> dict[str, Tensor]:
    """Name -> correction bias, float32 [experts], of every mixture that has one: what `balance_experts` changes."""
    return {f"{name}.gate.e_score_correction_bias": _bias(mixture) for name, mixture in _mixtures(model)}


def _bias(mixture: Mixture) -> Tensor:
    return mixture.gate.get_buffer("e_score_correction_bias")


def _load(mixture: Mixture) -> Tensor:
    """int64 [experts]: tokens that each has got, of a watched mixture."""
    return mixture.load  # type: ignore[return-value]


def watch_experts(model: nn.Module) -> None:
    """Count from now on how many tokens each expert of a model gets in passes that record gradients."""
    for _, mixture in _mixtures(model):
        mixture.load = torch.zeros(len(_bias(mixture)), dtype=torch.int64)
        mixture.register_forward_hook(_count)


def _count(mixture: Mixture, arguments: tuple[Tensor, ...], output: Tensor) -> None:
    if torch.is_grad_enabled():
        with torch.no_grad():
            ids, _ = mixture.route(*arguments)
        load = _load(mixture)
        load += torch.bincount(ids.flatten(), minlength=len(load))


@torch.no_grad()
def balance_experts(model: nn.Module) -> None:
    """Move the correction biases of a watched model by one step, and count anew. Other models stay as they are."""
    for _, mixture in _mixtures(model):
        load = _load(mixture)
        _bias(mixture).add_((load.float().mean() - load).sign(), alpha=RATE)
        load.zero_()
