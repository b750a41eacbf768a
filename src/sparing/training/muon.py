"""Muon: each matrix moves by its momentum with all singular values made equal; vectors and tables by AdamW.

    M <- momentum M + G        U = newton_schulz(momentum M + G)
    W <- W (1 - lr weight_decay) - lr rms sqrt(max(a, b)) U

U of a matrix [a, b] is nearly orthogonal, so its numbers have a mean square of 1 / max(a, b), and the step has the root
mean square `rms` that AdamW's has: one learning rate serves both.

Source: DeepSeek-V4 report, Muon; K. Jordan, Muon (quintic iteration); Moonlight, arXiv 2502.16982 (scale of the step).
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw

__all__ = ["Muon", "first_state", "independent_matrices", "muon_update", "newton_schulz"]

Schedule = str | Sequence[tuple[float, float, float]]

QUINTIC = (3.4445, -4.7750, 2.0315)  # steepest at zero, never quite at one
POLISH = (2.0, -1.5, 0.5)  # converges to one, from above
SCHEDULES = {"deepseek_v4": (QUINTIC,) * 8 + (POLISH,) * 2, "quintic5": (QUINTIC,) * 5}
GROWTH = 200.0  # of the rounding of a Gram matrix, until it is computed anew
CACHED = 2**17  # numbers that a CPU iterates at once: the matrices of a step then stay in its caches
AT_ONCE = 2**26  # elsewhere


def newton_schulz(G: Tensor, schedule: Schedule = "deepseek_v4", dtype: torch.dtype | None = None) -> Tensor:
    """The orthogonal factor of each matrix, nearly: singular vectors stay, singular values become about one.

    G: [..., a, b] of any scale; a matrix of zeros stays so. schedule: "deepseek_v4" (eight steps that raise small
    values fast, then two that settle: within 0.0006 above one for values from 2e-4 of the matrix's norm), "quintic5"
    (five of the fast ones: within about [0.1, 1.2]), or any [(c0, c1, c2), ...] of
    `X <- c0 X + c1 (X X^T) X + c2 (X X^T)^2 X`. dtype: of the products, None: that of G. Returns [..., a, b] in G's.
    Raises ValueError for what is no floating-point matrix, and another schedule.
    Source: DeepSeek-V4 report, hybrid Newton-Schulz iteration.
    """
    steps = _steps(schedule)
    if G.ndim < 2 or not G.is_floating_point():
        raise ValueError(f"G is {G.dtype} {list(G.shape)}, must be floating-point [..., a, b]")
    if G.numel() == 0:
        return G.clone()
    X = G.mT if G.shape[-2] > G.shape[-1] else G
    stack = X.reshape(-1, *X.shape[-2:])
    parts = [_iterate(_unit(part, dtype or G.dtype), steps).to(G.dtype) for part in stack.split(_at_once(stack))]
    U = (parts[0] if len(parts) == 1 else torch.cat(parts)).view(X.shape)
    return U.mT if G.shape[-2] > G.shape[-1] else U


def muon_update(
    W: Tensor,
    G: Tensor,
    M: Tensor,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    rms: float = 0.18,
    schedule: Schedule = "deepseek_v4",
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(weights, momenta) after one step; `Muon` does the same in place, many matrices at a time.

    W, G, M: weights, gradients and momenta (zeros at first), [..., a, b]; schedule, dtype: of `newton_schulz`.
    Raises ValueError as it does. Source: DeepSeek-V4 report, Muon; Nesterov's step, without a factor 1 - momentum.
    """
    M = momentum * M + G
    U = newton_schulz(momentum * M + G, schedule, dtype)
    return W * (1 - lr * weight_decay) - lr * rms * math.sqrt(max(W.shape[-2:])) * U, M


def _steps(schedule: Schedule) -> tuple[tuple[float, float, float], ...]:
    """The coefficients of each step."""
    if isinstance(schedule, str):
        if schedule not in SCHEDULES:
            raise ValueError(f"schedule is {schedule!r}, use {', '.join(SCHEDULES)} or a list of (c0, c1, c2)")
        return SCHEDULES[schedule]
    steps = tuple(tuple(map(float, step)) for step in schedule)
    if not steps or any(len(step) != 3 or not all(map(math.isfinite, step)) for step in steps):
        raise ValueError(f"schedule is {schedule!r:.80}, must be a list of three finite coefficients a step")
    return steps  # type: ignore[return-value]


def _at_once(stack: Tensor) -> int:
    """How many matrices of a stack [n, a, b] to iterate together."""
    room = CACHED if stack.device.type == "cpu" else AT_ONCE
    return max(1, room // (stack.shape[-2] * stack.shape[-1]))


def _unit(X: Tensor, dtype: torch.dtype) -> Tensor:
    """Matrices [n, a, b] with a Frobenius norm of one, so that no singular value is above it. Zeros stay zeros."""
    X = X.to(torch.promote_types(X.dtype, torch.float32))
    peak = torch.linalg.vector_norm(X, math.inf, (-2, -1), keepdim=True)
    X = X / torch.where(peak > 0, peak, 1.0)  # squares neither overflow nor vanish
    return (X / torch.linalg.matrix_norm(X, keepdim=True).clamp(min=1.0)).to(dtype)


def _iterate(X: Tensor, steps: Sequence[tuple[float, float, float]]) -> Tensor:
    """All steps on [n, a, b], a <= b.

    Each step multiplies by a polynomial of the Gram matrix, and such polynomials commute. So where b is much larger
    than a, several steps run on [a, a] alone before X is multiplied: `X <- (factor + product) X`, while the Gram matrix
    follows as `(c0 + step) gram (c0 + step)`. Its small eigenvalues carry the rounding of the large ones, which grows
    with them, so it is computed anew from X in time; at every step in 16 bits.
    """
    wide = 2 * X.shape[-2] <= X.shape[-1] and X.dtype.itemsize >= 4
    for group in _grouped(steps, GROWTH if wide else 0.0):
        gram = X @ X.mT
        factor, product = 1.0, None
        for i, (c0, c1, c2) in enumerate(group):
            step = torch.baddbmm(gram, gram, gram, beta=c1, alpha=c2)  # c0 more on the diagonal
            if i + 1 < len(group):
                half = torch.baddbmm(gram, step, gram, beta=c0)
                gram = torch.baddbmm(half, half, step, beta=c0)
            rest = step if product is None else torch.baddbmm(c0 * product + factor * step, step, product)
            factor, product = c0 * factor, rest
        assert product is not None
        X = torch.baddbmm(X, product, X, beta=factor)
    return X


def _grouped(
    steps: Sequence[tuple[float, float, float]], growth: float
) -> Iterator[Sequence[tuple[float, float, float]]]:
    """Steps in groups, within which small eigenvalues of a Gram matrix grow by up to `growth` before the last one."""
    first, grown = 0, 1.0
    for i, step in enumerate(steps):
        if i > first and grown > growth:
            yield steps[first:i]
            first, grown = i, 1.0
        grown *= max(1.0, step[0] ** 2)
    yield steps[first:]


def first_state(group: dict[str, Any], parameter: Tensor) -> dict[str, Tensor]:
    """What an optimizer remembers of a parameter before the first step; also of a group of torch's AdamW."""
    if group.get("algorithm") == "muon":
        return {"momentum": torch.zeros_like(parameter)}
    return {
        "step": torch.tensor(0.0),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": torch.zeros_like(parameter),
    }


class Muon(torch.optim.Optimizer):
    """Muon for matrices, AdamW for the rest. Matrices of equal shape are iterated together, tall ones as wide ones.

    params: matrices [a, b] and stacks of them [..., a, b], each matrix of which is one; or groups. A group of
    `{"algorithm": "adamw"}` takes tensors of any shape; `{"rows": (r0, r1, ...)}` holds parameters that are several
    independent matrices one above the other. lr, weight_decay: of both algorithms; momentum, rms (of a step relative to
    lr), schedule and dtype (of products): of Muon, as in `muon_update`; betas, eps: of AdamW.
    Raises ValueError for a number out of range, a parameter that is no matrix, and rows that do not add up.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float,
        momentum: float = 0.95,
        weight_decay: float = 0.1,
        rms: float = 0.18,
        schedule: Schedule = "deepseek_v4",
        dtype: torch.dtype | None = None,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-20,
    ):
        own = {
            "algorithm": "muon",
            "rows": None,
            "momentum": momentum,
            "rms": rms,
            "schedule": schedule,
            "dtype": dtype,
        }
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, **own, "betas": betas, "eps": eps})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, as the class takes them; raises what it does, and adds nothing then."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except ValueError:
            del self.param_groups[-1]
            raise

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the state of a Muon with the same groups.

        Raises ValueError for the state of another optimizer, and of parameters that were split in another way.
        """
        for own, saved in zip(self.param_groups, state_dict["param_groups"], strict=False):
            if "algorithm" not in saved:
                raise ValueError(
                    f"this is the state of another optimizer, not of Muon: its groups say {', '.join(saved)}"
                )
            for key in ("algorithm", "rows"):
                if saved[key] != own[key]:
                    raise ValueError(f"this is the state of another Muon: {key} is {saved[key]!r}, here {own[key]!r}")
        super().load_state_dict(state_dict)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Change every parameter that has a gradient. closure: computes loss and gradients first; returns the loss."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            for p in parameters:
                if not self.state[p]:
                    self.state[p].update(first_state(group, p))
            (self._step_matrices if group["algorithm"] == "muon" else self._step_elements)(group, parameters)
        return loss

    def _step_matrices(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        lr, momentum = group["lr"], group["momentum"]
        alike: dict[Any, list[tuple[Tensor, ...]]] = defaultdict(list)  # (weights, gradient, momentum) of each matrix
        for p in parameters:
            G, M = p.grad, self.state[p]["momentum"]
            assert G is not None
            M.mul_(momentum).add_(G)
            p.mul_(1 - lr * group["weight_decay"])
            for matrix in zip(*(independent_matrices(tensor, group["rows"]) for tensor in (p, G, M)), strict=True):
                views = tuple(view.mT if view.shape[0] > view.shape[1] else view for view in matrix)
                alike[views[0].shape, p.dtype, p.device].append(views)
        for (shape, _, _), matrices in alike.items():
            scale = lr * group["rms"] * math.sqrt(max(shape))
            count = _at_once(matrices[0][0][None])
            for i in range(0, len(matrices), count):
                W, G, M = zip(*matrices[i : i + count], strict=True)
                N = torch.stack(G).add_(torch.stack(M), alpha=momentum)
                for w, u in zip(W, newton_schulz(N, group["schedule"], group["dtype"]), strict=True):
                    w.sub_(u, alpha=scale)

    def _step_elements(self, group: dict[str, Any], parameters: list[Tensor]) -> None:
        states = [self.state[p] for p in parameters]
        beta1, beta2 = group["betas"]
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            [],
            [state["step"] for state in states],
            fused=True,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )


def independent_matrices(tensor: Tensor, rows: Sequence[int] | None) -> list[Tensor]:
    """Views [a, b] of the matrices in a tensor [..., a, b]; rows: of those that each is made of, from the top."""
    stack = tensor.view(-1, *tensor.shape[-2:])
    return [matrix for part in stack.split(rows or stack.shape[-2], 1) for matrix in part]


def _check(group: dict[str, Any]) -> None:
    """Raises ValueError for a group that is not as `Muon` takes it."""
    for name, below in {
        "lr": math.inf,
        "weight_decay": math.inf,
        "rms": math.inf,
        "eps": math.inf,
        "momentum": 1.0,
    }.items():
        if not 0 <= group[name] < below:
            raise ValueError(f"{name} is {group[name]}, must be at least 0 and below {below}")
    if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
        raise ValueError(f"betas is {group['betas']}, must be two numbers from 0 to below 1")
    if group["algorithm"] not in ("muon", "adamw"):
        raise ValueError(f"algorithm is {group['algorithm']!r}, use muon or adamw")
    _steps(group["schedule"])
    if group["algorithm"] == "adamw":
        return
    for p in group["params"]:
        rows = group["rows"]
        if p.ndim < 2 or not p.is_floating_point():
            raise ValueError(
                f"a parameter is {p.dtype} {list(p.shape)}, not matrices [..., a, b]: put it in a group of"
                ' {"algorithm": "adamw"}'
            )
        if rows is not None and (min(rows) < 1 or sum(rows) != p.shape[-2]):
            raise ValueError(f"rows are {tuple(rows)}, {sum(rows)} in all: a parameter has {list(p.shape)}")
