"""One step of block diffusion: a canvas of tokens in which the surest proposals stay and the others are drawn afresh.

Source: DiffusionGemma, transformers `generation_diffusion_gemma.py`; entropy-bounded acceptance arXiv 2505.24857.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any, Protocol

import torch
from torch import Tensor

from sparing.config.generation import CANVAS, parse_canvas
from sparing.decoding.faults import origin
from sparing.decoding.sampling import SMALLEST_TEMPERATURE
from sparing.kernels.vocabulary import VocabularyResult, entropy, gumbel
from sparing.memory.group import Reading
from sparing.memory.sequence import Memory
from sparing.models.batch import RaggedBatch, Row
from sparing.models.diffusion_gemma import DiffusionGemma

__all__ = [
    "BlockDiffusion",
    "Canvas",
    "Denoiser",
    "Denoising",
    "StableAndConfident",
    "entropy_bound_accept",
    "linear_temperature",
    "new_canvas",
    "predict",
    "uniform_corrupt",
    "unsettled",
]


def uniform_corrupt(
    x0: Tensor, t: Tensor, vocab_size: int, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """The forward process: each token is replaced with probability t by one drawn uniformly from all ids.

    x0: int64 [B, L]; t: float [B] in 0..1, shared by a row's tokens. Returns (xt int64 [B, L], replaced bool [B, L]);
    the drawn id may be the original one. Raises ValueError for t outside 0..1.
    Source: DiffusionGemma; uniform-state D3PM arXiv 2107.03006: q(xt = v | x0) = (1 - t) [v = x0] + t / V.
    """
    t = torch.as_tensor(t)
    if ((t < 0) | (t > 1)).any():
        raise ValueError(f"t must lie in 0..1, found {t.min().item():g}..{t.max().item():g}")
    replaced = torch.rand(x0.shape, generator=generator) < t[..., None]
    drawn = torch.randint(vocab_size, x0.shape, generator=generator)
    return torch.where(replaced, drawn, x0), replaced


def linear_temperature(steps_remaining: int, max_steps: int, t_min: float, t_max: float) -> float:
    """Temperature of a step: t_max on the first (steps_remaining = max_steps), falling linearly, never t_min.

    Source: DiffusionGemma generation_config `t_min`, `t_max`.
    """
    return t_min + (t_max - t_min) * steps_remaining / max_steps


def entropy_bound_accept(logits: Tensor, bound: float) -> Tensor:
    """Which canvas positions are accepted: bool [B, L].

    logits: [B, L, V] tempered logits, or [B, L] entropies in nats; bound: nats per canvas, above 0. Positions are
    taken by rising entropy while the entropies of those before them sum to at most `bound`: the surest is always in.
    Raises ValueError for a bound that is not above 0. Source: arXiv 2505.24857.
    """
    if not bound > 0:
        raise ValueError(f"entropy_bound is {bound}: use a number of nats above 0")
    values = entropy(logits) if logits.ndim == 3 else logits.float()
    ordered, order = values.sort(dim=-1, stable=True)
    keep = ordered.cumsum(-1) - ordered <= bound
    return torch.zeros_like(keep).scatter(-1, order, keep)


class StableAndConfident:
    """Stop once the most likely canvas has not changed for `stability_threshold` steps and its mean entropy is low.

    Call with argmax: int64 [B, L] and tempered logits [B, L, V] (or entropies [B, L], nats) of each step in order:
    returns bool [B]. confidence_threshold: nats, mean over the canvas, strictly below. `reset()` before a new canvas.
    Source: DiffusionGemma generation_config.
    """

    def __init__(self, stability_threshold: int, confidence_threshold: float):
        self.stability_threshold = stability_threshold
        self.confidence_threshold = confidence_threshold
        self.reset()

    def reset(self) -> None:
        self._history: list[Tensor] = []

    def __call__(self, argmax: Tensor, logits: Tensor) -> Tensor:
        values = entropy(logits) if logits.ndim == 3 else logits.float()
        stable = torch.full(argmax.shape[:1], len(self._history) >= self.stability_threshold, device=argmax.device)
        for earlier in self._history:
            stable &= (earlier == argmax).all(-1)
        self._history = [*self._history, argmax][-self.stability_threshold :] if self.stability_threshold else []
        return stable & (values.mean(-1) < self.confidence_threshold)


@dataclass(frozen=True)
class BlockDiffusion:
    """Settings of the sampler; the defaults are the released ones. Raises ValueError for values out of range.

    max_denoising_steps: per canvas; entropy_bound: nats accepted per step and canvas; t_min, t_max: temperature
    schedule; stability_threshold, confidence_threshold: of `StableAndConfident`, None: always all steps;
    greedy: propose the most likely token instead of drawing.
    """

    max_denoising_steps: int = 48
    entropy_bound: float = 0.1
    t_min: float = 0.4
    t_max: float = 0.8
    stability_threshold: int | None = 1
    confidence_threshold: float | None = 0.005
    greedy: bool = False

    def __post_init__(self) -> None:
        for name, check in CANVAS.items():
            value = getattr(self, name)
            if value is not None or name not in ("stability_threshold", "confidence_threshold"):
                object.__setattr__(self, name, check(name, value))
        if not self.t_min < self.t_max:
            raise ValueError(f"t_min is {self.t_min} and t_max {self.t_max}: use 0 <= t_min < t_max")
        last = linear_temperature(1, self.max_denoising_steps, self.t_min, self.t_max)
        if last < SMALLEST_TEMPERATURE:
            found = f"t_min is {self.t_min} and t_max {self.t_max}"
            raise ValueError(f"{found}: at the last step's temperature of {last} logits overflow, use larger ones")

    @classmethod
    def from_generation_config(cls, config: Mapping[str, Any], **overrides: Any) -> BlockDiffusion:
        """From a generation_config.json, where null means unset, with what the caller set on top."""
        return cls(**{**parse_canvas(config), **overrides})


@dataclass
class Canvas:
    """One row's canvas between two steps. All tensors [L] (soft: [L, ...] as the model returned it)."""

    start: Tensor  # int64: the ids it started from
    given: Tensor  # bool: positions that the caller gave a token, which change when another one is accepted
    fixed: Tensor  # bool: given positions that never change
    steps_remaining: int
    stop: StableAndConfident | None
    soft: Tensor | None = None
    reading: Reading | None = None  # what passes over it share

    def __post_init__(self) -> None:
        self.ids = self.argmax = self.start

    def held(self, ids: Tensor) -> Tensor:
        return torch.where(self.fixed, self.start, ids)

    def update(
        self, found: VocabularyResult, generator: torch.Generator, settings: BlockDiffusion, vocab_size: int
    ) -> tuple[Tensor, Tensor, bool]:
        """Take the prediction of a step: (accepted [L], entropy [L], finished).

        Random draws of a row: Gumbel noise over the vocabulary for the prediction, then L uniform ids.
        """
        # A held position is certain: it costs nothing of the bound and does not delay stopping.
        spread = found.entropy.masked_fill(self.fixed, 0.0)
        before = self.ids, self.argmax
        self.argmax = self.held(found.argmax)
        accepted = entropy_bound_accept(spread[None], settings.entropy_bound)[0]
        fresh = torch.randint(vocab_size, self.ids.shape, generator=generator).to(self.ids.device)
        # What is not accepted becomes noise again; a token that was given stays until another one is accepted.
        self.ids = self.held(torch.where(accepted, found.sample, torch.where(self.given, self.ids, fresh)))
        self.soft = found.soft
        self.steps_remaining -= 1
        settled = self.stop is not None and bool(self.stop(self.argmax[None], spread[None]))
        if self.stop is not None and self.given.all():  # no noise left to settle: done when nothing changes
            settled |= all(map(torch.equal, before, (self.ids, self.argmax)))
        return accepted, spread, settled or self.steps_remaining == 0


@dataclass
class Denoising:
    """What a row with a canvas runs next: a pass over it in which all its tokens see each other.

    ids: int64 [L]; soft: what the previous pass returned, None in the first; temperature: of the proposals; generator:
    of their noise, None: the most likely tokens; bias: float32 [V], added to the logits of every position, not to the
    noise; reading: what passes over the canvas share.
    """

    ids: Tensor
    soft: Tensor | None
    temperature: float
    generator: torch.Generator | None
    bias: Tensor | None
    reading: Reading | None


class Denoiser(Protocol):
    """What denoising needs of a model."""

    def predict(
        self, hidden: Tensor, temperature: Tensor, noise: Callable[[int], Tensor] | None, bias: Tensor | None
    ) -> VocabularyResult:
        """See `DiffusionGemma.predict`."""
        ...


def predict(model: Denoiser, canvases: Sequence[Denoising], states: Sequence[Tensor]) -> list[VocabularyResult]:
    """What each canvas becomes, those of the same bias in one pass over the vocabulary.

    states: of each canvas as the model's pass returned them.
    """
    found: dict[int, VocabularyResult] = {}
    alike: dict[tuple[int, bool], list[int]] = {}
    for i, canvas in enumerate(canvases):
        alike.setdefault((id(canvas.bias), canvas.generator is None), []).append(i)
    for places in alike.values():
        group, sizes = [canvases[i] for i in places], [len(canvases[i].ids) for i in places]
        hidden = torch.cat([states[i] for i in places])
        temperature = torch.tensor([canvas.temperature for canvas in group]).repeat_interleave(torch.tensor(sizes))
        generators = [canvas.generator for canvas in group if canvas.generator is not None]
        noise = gumbel(generators, sizes, hidden.device) if generators else None
        result = model.predict(hidden, temperature.to(hidden.device), noise, group[0].bias)
        ends = accumulate(sizes)
        found |= {i: result.rows(slice(end - n, end)) for i, n, end in zip(places, sizes, ends, strict=True)}
    return [found[i] for i in range(len(canvases))]


def unsettled(model: DiffusionGemma, row: int, canvas: Canvas, memory: Memory, usable: Tensor) -> ValueError:
    """The error for a canvas with a position where nothing can be chosen. usable: bool [L]."""
    position, where = int((~usable).nonzero()[0]), ""
    if isinstance(model, DiffusionGemma):
        batch = RaggedBatch([Row(canvas.ids, memory, causal=False)])
        where = f", {origin(lambda trace: model.denoise_hidden(batch, canvas.soft, trace), [memory])}"
    return ValueError(
        f"row {row}, canvas position {position}: the logits hold NaN or infinity, or nothing that may be"
        f" chosen{where}: no token was chosen"
    )


def new_canvas(
    length: int,
    vocab_size: int,
    generator: torch.Generator,
    settings: BlockDiffusion,
    device: torch.device,
    given: Sequence[int | None] | None = None,
    fixed: Sequence[int] = (),
) -> Canvas:
    """A canvas of uniform noise, with `given` ids (None: noise) from the start and those at `fixed` held throughout.

    A given id is taken for text that may be wrong, not for noise: it stays until the model is sure of another.
    """
    ids = torch.randint(vocab_size, (length,), generator=generator)
    there, held = torch.zeros(2, length, dtype=torch.bool)
    for i, token in enumerate(given or ()):
        if token is not None:
            ids[i], there[i] = token, True
    held[list(fixed)] = True
    stop = None
    if settings.stability_threshold is not None and settings.confidence_threshold is not None:
        stop = StableAndConfident(settings.stability_threshold, settings.confidence_threshold)
    return Canvas(ids.to(device), there.to(device), held.to(device), settings.max_denoising_steps, stop)
