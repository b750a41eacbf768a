"""Statistics of a model's queries, which TriAttention scores keys with: what they hold, which model they fit, one file.

Per layer and query head: the centre of all queries before rotation, and their mean norm, in bands (pairs of dimensions
that turn together). They come from `sparing.calibrate`; files of others are read by `foreign_statistics.py`.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparing.config.memory import AttentionSpec, RecurrentSpec
from sparing.config.protocol import ModelConfig
from sparing.config.rope import RopeParameters
from sparing.errors import CheckpointError
from sparing.kernels import inverse_frequencies
from sparing.memory.triattention.foreign_statistics import read_foreign
from sparing.memory.triattention.layer_statistics import MOST, PARTS, LayerStatistics, expect_parts

if TYPE_CHECKING:
    from sparing.checkpoint.safetensors import SafetensorsFile

__all__ = ["ScoredLayer", "Statistics", "geometry", "scored_layers"]

FORMAT = "sparing-triattention-1"
# Half-split pairs, rotating ones first; channels that do not rotate are paired by the same rule and count as slow ones.
CONVENTIONS = {"format": FORMAT, "pairing": "half", "passthrough": "pairs"}


@dataclass(frozen=True)
class ScoredLayer:
    """A layer whose queries read entries that may be forgotten. owner: the layer that stores them."""

    layer: int
    owner: int
    heads: int
    kv_heads: int
    head_dim: int
    rope: RopeParameters | None

    @property
    def rotation(self) -> tuple[Tensor, float]:
        """(float32 [<= head_dim / 2] radians a token of the bands that rotate, factor on rotated vectors)."""
        return (torch.zeros(0), 1.0) if self.rope is None else inverse_frequencies(self.rope, self.head_dim)


def scored_layers(config: ModelConfig) -> list[ScoredLayer]:
    """The layers of a model that TriAttention acts on: all that keep everything, and those that share with them.

    Windows and recurrent states are bounded already. Raises ValueError where the method is not defined: frequencies
    that change with the length, memories of another kind, and models in which nothing grows.
    """
    specs, ropes, found = config.memory_specs(), config.layer_ropes(), []
    for i, (spec, rope) in enumerate(zip(specs, ropes, strict=True)):
        if spec is None or isinstance(spec, RecurrentSpec):
            continue
        if not isinstance(spec, AttentionSpec):
            raise ValueError(
                f"layer {i} keeps entries that stand for several tokens and are key and value in one; TriAttention"
                " scores keys of single tokens: use kv='dense' or kv='released'"
            )
        if spec.window is not None:
            continue
        if rope is not None and rope.rope_type == "dynamic":
            switch = rope.original_max_position_embeddings
            if config.max_position_embeddings > switch:
                raise ValueError(
                    f"TriAttention needs constant RoPE frequencies; rope_type='dynamic' changes them at length {switch}"
                )
        owner = i if spec.shared_with is None else spec.shared_with
        heads = config.num_attention_heads
        found.append(ScoredLayer(i, owner, heads, spec.num_key_value_heads, spec.head_dim, rope))
    if not found:
        raise ValueError("no layer of this model grows without bound: TriAttention has nothing to prune")
    return found


def geometry(config: ModelConfig) -> str:
    """A digest of the layers that are scored and their sizes. Their rotations are compared number by number."""
    layers = [(s.layer, s.owner, s.heads, s.kv_heads, s.head_dim) for s in scored_layers(config)]
    facts = (config.model_type, config.hidden_size, config.num_hidden_layers, layers)
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Statistics:
    """Query statistics of a model.

    layers: by layer index; tokens: how many the means are over; geometry, weights: digests of the model's config and
    query weights, None where unknown; source: digest of the texts.
    """

    layers: Mapping[int, LayerStatistics]
    tokens: int = 0
    geometry: str | None = None
    weights: str | None = None
    source: str = ""

    @property
    def digest(self) -> str:
        """Equal for equal statistics."""
        found = hashlib.sha256()
        for i, layer in sorted(self.layers.items()):
            found.update(str(i).encode() + torch.view_as_real(layer.center).numpy().tobytes())
            found.update(layer.norm.numpy().tobytes())
        return found.hexdigest()[:16]

    def concentration(self) -> Tensor:
        """Per layer and head, R averaged over the two bands of the largest queries: float32 [layers, heads].

        R = |mean| / mean of |query| is 1 where all queries point the same way.
        """
        values = []
        for _, layer in sorted(self.layers.items()):
            r = torch.where(layer.norm > 0, layer.center.abs() / layer.norm, 0.0)
            values.append(r.gather(-1, layer.norm.topk(2, -1).indices).mean(-1))
        return torch.stack(values)

    def merge(self, other: Statistics) -> Statistics:
        """Statistics over the tokens of both. Raises ValueError if they are of different models."""
        if (
            self.geometry != other.geometry
            or self.weights != other.weights
            or self.layers.keys() != other.layers.keys()
        ):
            raise ValueError("statistics of different models cannot be merged")
        total = self.tokens + other.tokens
        layers = {}
        for i, mine in self.layers.items():
            theirs = other.layers[i]
            center = (mine.center.to(torch.complex128) * self.tokens + theirs.center * other.tokens) / total
            norm = (mine.norm.double() * self.tokens + theirs.norm * other.tokens) / total
            layers[i] = LayerStatistics(center.to(torch.complex64), norm.float(), mine.inv_freq, mine.scaling)
        source = hashlib.sha256(f"{self.source} {other.source}".encode()).hexdigest()[:16]
        return Statistics(layers, total, self.geometry, self.weights, source)

    def of(self, layer: ScoredLayer) -> LayerStatistics:
        """One layer's statistics, as its model needs them. Raises ValueError saying what does not fit."""
        i = layer.layer
        if i not in self.layers:
            raise ValueError(f"the statistics lack layer {i}, whose queries read entries of layer {layer.owner}")
        found, (inv_freq, scaling) = self.layers[i], layer.rotation
        heads, count = found.norm.shape
        full = layer.head_dim // 2
        if heads != layer.heads or count not in (full, int((inv_freq != 0).sum())):
            raise ValueError(
                f"the statistics of layer {i} have {heads} heads of {count} bands, the model {layer.heads} of {full}"
            )
        if found.inv_freq is not None:
            if found.inv_freq.shape != inv_freq.shape or not torch.allclose(
                found.inv_freq, inv_freq, rtol=1e-5, atol=0
            ):
                raise ValueError(f"the statistics of layer {i} were made under other RoPE frequencies than the model's")
            if abs(found.scaling - scaling) > 1e-5 * scaling:
                raise ValueError(
                    f"the statistics of layer {i} were made under attention_scaling {found.scaling:g},"
                    f" the model's is {scaling:g}"
                )
        center, norm = found.center, found.norm
        if not (torch.view_as_real(center).isfinite().all() and norm.isfinite().all()):
            raise ValueError(f"the statistics of layer {i} hold values that are not finite")
        if (norm < center.abs() * (1 - 1e-5)).any():
            raise ValueError(f"the statistics of layer {i} hold a mean norm below the norm of the mean")
        if count < full:  # the file leaves out bands that do not rotate: they count nothing
            center = torch.nn.functional.pad(center, (0, full - count))
            norm = torch.nn.functional.pad(norm, (0, full - count))
        return LayerStatistics(center, norm, inv_freq, scaling)

    def fitted(self, config: ModelConfig) -> Statistics:
        """The statistics that a model needs, with its rotation and config's digest, which files of others do not say.

        Raises ValueError saying what does not fit: layers or heads of another model, other frequencies, damaged values.
        """
        if self.geometry not in (None, geometry(config)):
            raise ValueError("the statistics were made for a model of another config")
        if (last := max(self.layers)) >= config.num_hidden_layers:
            raise ValueError(
                f"the statistics have a layer {last}, the model's layers are 0 to {config.num_hidden_layers - 1}"
            )
        layers = {scored.layer: self.of(scored) for scored in scored_layers(config)}
        return Statistics(layers, self.tokens, geometry(config), self.weights, self.source)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file. Layers of one shape and rotation lie in one tensor."""
        from sparing.checkpoint.write import save_safetensors

        classes: dict[tuple[Any, ...], list[int]] = {}
        for i, layer in sorted(self.layers.items()):
            rotation = None if layer.inv_freq is None else tuple(layer.inv_freq.tolist())
            classes.setdefault((tuple(layer.norm.shape), rotation, layer.scaling), []).append(i)
        tensors = {"token_count": torch.tensor([self.tokens])}
        for number, members in enumerate(classes.values()):
            end = f".{number}" if number else ""
            center = torch.stack([self.layers[i].center for i in members])
            tensors[f"layer_index{end}"] = torch.tensor(members)
            tensors[f"q_mean_real{end}"], tensors[f"q_mean_imag{end}"] = (
                center.real.contiguous(),
                center.imag.contiguous(),
            )
            tensors[f"q_abs_mean{end}"] = torch.stack([self.layers[i].norm for i in members])
            first = self.layers[members[0]]
            if first.inv_freq is not None:
                tensors[f"inv_freq{end}"] = first.inv_freq
                tensors[f"attention_scaling{end}"] = torch.tensor([first.scaling])
        facts = {"geometry": self.geometry, "weights": self.weights, "source": self.source}
        save_safetensors(path, tensors, metadata=CONVENTIONS | {k: v for k, v in facts.items() if v is not None})

    @classmethod
    def load(cls, path: str | Path, *, allow_pickle: bool = False) -> Statistics:
        """Read what `save` wrote, the method authors' `.pt`, or a TRIA file.

        allow_pickle: a `.pt` is a pickle; it is read with what restricts it to tensors, and only if asked for.
        Raises CheckpointError for a file that is none of these, damaged, or of other conventions.
        """
        from sparing.checkpoint.safetensors import SafetensorsFile

        if (foreign := read_foreign(Path(path), allow_pickle=allow_pickle)) is not None:
            return cls(*foreign)
        file = SafetensorsFile(path)
        for name, expected in CONVENTIONS.items():
            if file.metadata.get(name) != expected:
                found = file.metadata.get(name)
                raise CheckpointError(f"{path}: {name} is {found!r}, expected {expected!r} (query statistics)")
        try:
            layers: dict[int, LayerStatistics] = {}
            for name in file.names():
                if name.startswith("layer_index"):
                    layers |= _read_class(file, name.removeprefix("layer_index"))
            tokens = int(_numbers(file, "token_count", 1)[0])
            if not layers or tokens < 0:
                raise ValueError(f"{len(layers)} layers over {tokens} tokens")
        except (RuntimeError, IndexError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: damaged query statistics: {error}") from error
        facts = (file.metadata.get(name) for name in ("geometry", "weights"))
        return cls(layers, tokens, *facts, source=file.metadata.get("source", ""))


def _read_class(file: SafetensorsFile, end: str) -> dict[int, LayerStatistics]:
    index = _numbers(file, f"layer_index{end}").tolist()
    parts = [file.read(f"{name}{end}") for name in PARTS]
    expect_parts(f"of {end.lstrip('.') or 'the first'} class", parts, len(index))
    inv_freq, scaling = None, 1.0
    if f"inv_freq{end}" in file.names():
        inv_freq = file.read(f"inv_freq{end}").clone()
        scaling = float(_numbers(file, f"attention_scaling{end}", 1)[0])
        if inv_freq.dtype != torch.float32 or inv_freq.ndim != 1 or not inv_freq.isfinite().all() or not scaling > 0:
            raise ValueError(f"inv_freq{end} and attention_scaling{end} are no rotation")
    if len(set(index)) < len(index) or any(not 0 <= i < MOST for i in index):
        raise ValueError(f"layer_index{end} is {index}, expected different layers")
    real, imaginary, norm = (part.float() for part in parts)
    center = torch.complex(real, imaginary)
    return {i: LayerStatistics(c, n, inv_freq, scaling) for i, c, n in zip(index, center, norm.clone(), strict=True)}


def _numbers(file: SafetensorsFile, name: str, count: int | None = None) -> Tensor:
    """A tensor of whole numbers or lone floats [n]. Raises ValueError for another shape, and for numbers too large."""
    found = file.read(name).flatten()
    if len(found) > MOST or (count is not None and len(found) != count) or not found.isfinite().all():
        raise ValueError(f"{name} has shape {list(file.shape(name))}")
    return found
