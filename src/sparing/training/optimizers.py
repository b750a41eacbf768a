"""How a model's parameters are changed: by AdamW, or matrices by Muon and the rest by AdamW."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

import torch

from sparing.config.roles import Stacked
from sparing.models.layers import Network
from sparing.training.masters import checkpoint_name
from sparing.training.muon import Muon
from sparing.training.recipe import OPTIMIZERS

__all__ = ["make_optimizer"]


def make_optimizer(
    name: str, model: Network, *, betas: tuple[float, float], weight_decay: float
) -> torch.optim.Optimizer:
    """An optimizer of every parameter of a model, or of a part of one. Its groups wait for their learning rate, `lr`.

    name: "adamw" or "muon"; betas: of AdamW; weight_decay: of all but vectors. Masters are what is trained, whatever
    they multiply in. Raises ValueError for another name.
    """
    if name not in OPTIMIZERS:
        raise ValueError(f"optimizer is {name!r}, use {' or '.join(OPTIMIZERS)}")
    tables = [p for p in model.parameters() if p.ndim > 1]
    vectors = {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}
    if name == "adamw":
        return torch.optim.AdamW([{"params": tables}, vectors], 0.0, betas, weight_decay=weight_decay, fused=True)
    matrices = matrix_groups(model)
    taken = {p for group in matrices for p in group["params"]}
    rest = [{"params": [p for p in tables if p not in taken]}, vectors]
    groups = [*matrices, *({**group, "algorithm": "adamw"} for group in rest)]
    return Muon(groups, 0.0, weight_decay=weight_decay, betas=betas)


def matrix_groups(model: Network) -> list[dict[str, Any]]:
    """The parameters that Muon trains, by role, in groups that hold independent matrices of the same rows."""
    tensors = model.tensors()
    by_rows: dict[tuple[int, ...] | None, list[torch.nn.Parameter]] = defaultdict(list)
    for name, parameter in model.named_parameters():
        shape, role = tensors[checkpoint_name(name)]
        if role.is_orthogonalised:
            by_rows[shape.rows if isinstance(shape, Stacked) else None].append(parameter)
    return [{"params": parameters, "rows": rows} for rows, parameters in by_rows.items()]
