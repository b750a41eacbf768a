"""What one training run is made of: a model's config, its data, and how its parameters are changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from tokenizers import Tokenizer
    from torch import Tensor

    from sparing.models.base import LanguageModel
    from sparing.training.block_diffusion import Examples

__all__ = ["OPTIMIZERS", "Data", "Losses", "Recipe"]

OPTIMIZERS = ("adamw", "muon")


class Data(Protocol):
    """Training examples by number: `batch(n)` depends on n and the seed alone, so a run can be resumed anywhere."""

    @property
    def tokenizer(self) -> Tokenizer: ...

    def batch(self, step: int) -> Examples: ...

    def validation(self) -> list[Examples]: ...


class Losses(Protocol):
    """What a batch costs: the total that is minimised, and the parts of it that are logged."""

    @property
    def total(self) -> Tensor: ...

    @property
    def parts(self) -> dict[str, Tensor]: ...


def _nothing(model: LanguageModel, options: Mapping[str, Any], generator: torch.Generator) -> None:
    """Leave a model as it was initialised."""


def _block_diffusion(recipe: Recipe, model: LanguageModel, examples: Examples, generator: torch.Generator) -> Losses:
    from sparing.models.diffusion_gemma import DiffusionGemma
    from sparing.training.block_diffusion import block_diffusion_loss

    assert isinstance(model, DiffusionGemma)
    return block_diffusion_loss(model, examples, generator, recipe.draws)


@dataclass(frozen=True)
class Recipe:
    """A run that can be made again.

    config, generation_config: the JSON of the checkpoint folder. data: called with (recipe, seed). options: what the
    data and the model need to know. prepare: changes a freshly initialised model, called with (model, options,
    generator). loss: called with (recipe, model, examples, generator of noise), also to validate.
    steps: length of the run; the learning rate rises over `warmup` steps, stays, and falls to zero over the last
    `decay` share, so a run can be lengthened as long as it has not begun to fall. draws: noisings per example.
    optimizer: one of `OPTIMIZERS`, as `sparing.training.optimizers` makes them; beta1, beta2: of AdamW. average: decay
    of the moving average of the weights, which is what gets validated and exported.
    """

    name: str
    config: Mapping[str, Any]
    generation_config: Mapping[str, Any]
    data: Callable[[Recipe, int], Data]
    options: Mapping[str, Any] = field(default_factory=dict)
    prepare: Callable[[LanguageModel, Mapping[str, Any], torch.Generator], None] = _nothing
    loss: Callable[[Recipe, LanguageModel, Examples, torch.Generator], Losses] = _block_diffusion
    steps: int = 1000
    batch_size: int = 32
    draws: int = 1
    optimizer: str = "adamw"
    learning_rate: float = 3e-3
    warmup: int = 100
    decay: float = 0.2
    beta1: float = 0.9
    beta2: float = 0.98
    weight_decay: float = 0.01
    clip: float = 1.0
    average: float = 0.998
    validate_every: int = 200

    def learning_rate_at(self, step: int) -> float:
        """Learning rate of step 0, 1, ...: rising, constant, falling linearly to zero."""
        left = (self.steps - step) / max(1.0, self.steps * self.decay)
        return self.learning_rate * max(0.0, min(1.0, (step + 1) / self.warmup, left))

    @property
    def text_config(self) -> Mapping[str, Any]:
        """The part of the config that describes the layers."""
        return self.config.get("text_config", self.config)

    def settings(self) -> dict[str, Any]:
        """All numbers that can be set: those of the recipe, its data and its model."""
        text = {key: value for key, value in self.text_config.items() if isinstance(value, int | float)}
        canvas = {key: self.config[key] for key in ("canvas_length",) if key in self.config}
        own = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), int | float)}
        return {**text, **canvas, **self.options, **own, "optimizer": self.optimizer}

    def with_settings(self, values: Mapping[str, Any]) -> Recipe:
        """The recipe with some settings changed.

        Raises ValueError for a name that no part of it knows, and for a value of another type.
        """
        recipe = self
        for name, value in values.items():
            known = recipe.settings()
            if name not in known:
                raise ValueError(f"recipe {self.name!r} has no setting {name!r}, it knows: {', '.join(sorted(known))}")
            value = _like(known[name], name, value)
            if name in self.options:
                recipe = replace(recipe, options={**recipe.options, name: value})
            elif name in self.config.get("text_config", {}):
                text = {**recipe.text_config, name: value}
                recipe = replace(recipe, config={**recipe.config, "text_config": text})
            elif name in self.config:
                recipe = replace(recipe, config={**recipe.config, name: value})
            else:
                recipe = replace(recipe, **{name: value})
        return recipe


def _like(known: Any, name: str, value: Any) -> Any:
    """A setting in the type of the value it replaces. Raises ValueError for another type, and for what is no number."""
    if isinstance(known, float) and type(value) is int:
        value = float(value)
    if isinstance(known, int) and type(value) is float and value.is_integer():
        value = type(known)(value)
    if type(value) is not type(known) or (isinstance(value, float) and not math.isfinite(value)):
        kinds = {bool: "true or false", int: "a whole number", float: "a finite number", str: "text"}
        raise ValueError(f"setting {name} is {value!r:.60}, must be {kinds.get(type(known), type(known).__name__)}")
    return value
