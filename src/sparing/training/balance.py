"""Keeping a mixture's experts equally busy: a correction bias follows their load, and a small loss looks at each text.

After each step the bias of an expert that got fewer tokens than the mean rises by a constant, that of a busier one
falls. The bias chooses experts and never weighs them, so no gradient knows of it. It evens out batches; that one text
does not send all its tokens to a few experts is what the loss is for.
Source: DeepSeek-V3, arXiv 2412.19437, 2.1.2; Nemotron 3 uses the same rate.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sparing.kernels import router_scores
from sparing.models.deepseek_v4 import Experts
from sparing.models.nemotron3 import LatentMoELayer

__all__ = ["balance_experts", "correction_biases", "sequence_balance", "sequence_balance_of", "watch_experts"]

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


def _routed(mixture: Mixture) -> list[tuple[Tensor, Tensor]]:
    """(scores [tokens, experts], ids int64 [tokens, k]) of each pass since the last step, of a watched mixture."""
    return mixture.routed  # type: ignore[return-value]


def watch_experts(model: nn.Module) -> None:
    """Note from now on which experts tokens get in passes that record gradients, until `balance_experts` is called."""
    for _, mixture in _mixtures(model):
        mixture.load = torch.zeros(len(_bias(mixture)), dtype=torch.int64)
        mixture.routed = []  # type: ignore[assignment]
        mixture.register_forward_hook(_note)


def _note(mixture: Mixture, arguments: tuple[Tensor, ...], output: Tensor) -> None:
    if torch.is_grad_enabled():
        with torch.no_grad():
            ids, _ = mixture.route(*arguments)
        load = _load(mixture)
        load += torch.bincount(ids.flatten(), minlength=len(load))
        _routed(mixture).append(
            (router_scores(arguments[0], mixture.gate.get_parameter("weight"), mixture.scoring), ids)
        )


def sequence_balance(scores: Tensor, ids: Tensor) -> Tensor:
    """How unevenly each text uses its experts, the mean over texts: 1 where all are used alike, E / k at worst.

    scores: [B, T, E], above 0, what a router chooses by; ids: int64 [B, T, k], chosen. The sum over experts of the
    share of tokens that an expert gets, in units of an even share, times the mean share of its scores; the gradient is
    that of the scores.
    Source: DeepSeek-V3, arXiv 2412.19437, equations 17 to 20.
    """
    experts, k = scores.shape[-1], ids.shape[-1]
    chosen = torch.zeros_like(scores).scatter_(-1, ids, 1.0)
    busy = chosen.mean(1) * (experts / k)  # [B, E]
    return (busy * (scores / scores.sum(-1, keepdim=True)).mean(1)).sum(-1).mean()


def sequence_balance_of(model: nn.Module, rows: int) -> Tensor | None:
    """`sequence_balance` of the passes since the last step, the mean over mixtures; None where none was noted.

    rows: texts of equal length that lay one after another in each pass.
    """
    found = [
        sequence_balance(*(x.unflatten(0, (rows, -1)) for x in pair))
        for _, mixture in _mixtures(model)
        for pair in _routed(mixture)
    ]
    return torch.stack(found).mean() if found else None


@torch.no_grad()
def balance_experts(model: nn.Module) -> None:
    """Move the correction biases of a watched model by one step, and note anew. Other models stay as they are."""
    for _, mixture in _mixtures(model):
        load = _load(mixture)
        _bias(mixture).add_((load.float().mean() - load).sign(), alpha=RATE)
        load.zero_()
        _routed(mixture).clear()
