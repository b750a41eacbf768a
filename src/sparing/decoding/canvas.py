"""One step of block diffusion: a canvas of tokens in which the surest proposals stay and the others are drawn afresh.

Source: DiffusionGemma, transformers `generation_diffusion_gemma.py`; entropy-bounded acceptance arXiv 2505.24857.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
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
    "StableAndConfident",
    "denoise_step",
    "entropy_bound_accept",
    "linear_temperature",
    "new_canvas",
    "uniform_corrupt",
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
    """One row's canvas between two steps. All tensors [L] (soft: [L, ...] as the denoiser returned it)."""

    start: Tensor  # int64: the ids it started from
    given: Tensor  # bool: positions that the caller gave a token, which change when another one is accepted
    fixed: Tensor  # bool: given positions that never change
    steps_remaining: int
    stop: StableAndConfident | None
    row: int = 0
    soft: Tensor | None = None
    reading: Reading | None = None  # what passes over it share

    def __post_init__(self) -> None:
        self.ids = self.argmax = self.start

    def held(self, ids: Tensor) -> Tensor:
        return torch.where(self.fixed, self.start, ids)


class Denoiser(Protocol):
    """What the sampler needs of a model: `DiffusionGemma.propose` is one, `LogitsDenoiser` makes another."""

    def propose(
        self,
        canvases: Sequence[Tensor],
        memories: Sequence[Memory],
        soft: Sequence[Tensor | None],
        temperature: Tensor,
        noise: Callable[[int], Tensor] | None,
        bias: Tensor | None = None,
        readings: Sequence[Reading | None] | None = None,
    ) -> VocabularyResult:
        """soft: per canvas what the previous pass returned for it, None in its first one; bias: float32 [V], added to
        the logits of every position; readings: per canvas, what passes over it share."""
        ...


def denoise_step(
    denoiser: Denoiser,
    canvases: Sequence[Canvas],
    memories: Sequence[Memory],
    generators: Sequence[torch.Generator],
    settings: BlockDiffusion,
    vocab_size: int,
    bias: Tensor | None = None,
) -> Iterator[tuple[Tensor, Tensor, bool]]:
    """One step of several canvases in one pass; updates them, yields (accepted [L], entropy [L], finished) of each.

    Random draws of a row: Gumbel noise over the vocabulary, then L uniform ids. bias: [V], of what is proposed, not of
    the noise. Raises ValueError where logits are not finite, or nothing is left to choose.
    """
    sizes = [len(c.ids) for c in canvases]
    device = canvases[0].ids.device
    steps = [
        linear_temperature(c.steps_remaining, settings.max_denoising_steps, settings.t_min, settings.t_max)
        for c in canvases
    ]
    temperature = torch.tensor(steps, device=device).repeat_interleave(torch.tensor(sizes, device=device))
    noise = None if settings.greedy else gumbel(generators, sizes, device)
    previous, readings = [c.soft for c in canvases], [c.reading for c in canvases]
    result = denoiser.propose([c.ids for c in canvases], memories, previous, temperature, noise, bias, readings)
    if not (usable := result.entropy.isfinite()).all():
        raise _fault(denoiser, canvases, memories, usable.split(sizes))
    start = 0
    for canvas, generator, size in zip(canvases, generators, sizes, strict=True):
        part = result.rows(slice(start, start + size))
        start += size
        # A held position is certain: it costs nothing of the bound and does not delay stopping.
        spread = part.entropy.masked_fill(canvas.fixed, 0.0)
        before = canvas.ids, canvas.argmax
        canvas.argmax = canvas.held(part.argmax)
        accepted = entropy_bound_accept(spread[None], settings.entropy_bound)[0]
        fresh = torch.randint(vocab_size, (size,), generator=generator).to(device)
        # What is not accepted becomes noise again; a token that was given stays until another one is accepted.
        canvas.ids = canvas.held(torch.where(accepted, part.sample, torch.where(canvas.given, canvas.ids, fresh)))
        canvas.soft = part.soft
        canvas.steps_remaining -= 1
        settled = canvas.stop is not None and bool(canvas.stop(canvas.argmax[None], spread[None]))
        if canvas.stop is not None and canvas.given.all():  # no noise left to settle: done when nothing changes
            settled |= all(map(torch.equal, before, (canvas.ids, canvas.argmax)))
        yield accepted, spread, settled or canvas.steps_remaining == 0


def _fault(
    denoiser: Denoiser, canvases: Sequence[Canvas], memories: Sequence[Memory], usable: Sequence[Tensor]
) -> ValueError:
    """The error for the first canvas with a position where nothing can be chosen. usable: bool [L] of each."""
    i = next(i for i, of_canvas in enumerate(usable) if not of_canvas.all())
    canvas, position = canvases[i], int((~usable[i]).nonzero()[0])
    where = ""
    if isinstance(denoiser, DiffusionGemma):
        batch = RaggedBatch([Row(canvas.ids, memories[i], causal=False)])
        where = f", {origin(lambda trace: denoiser.denoise_hidden(batch, canvas.soft, trace), [memories[i]])}"
    return ValueError(
        f"row {canvas.row}, canvas position {position}: the logits hold NaN or infinity, or nothing that may be"
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
