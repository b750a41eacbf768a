"""What a checkpoint holds, from its config and the headers of its files. Never imports torch."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from sparing.config.memory import AttentionSpec, CompressedSpec, MemorySpec, RecurrentSpec
from sparing.config.names import names_in_file
from sparing.config.policy import apply_policy, parse_policy
from sparing.config.protocol import ModelConfig
from sparing.errors import CheckpointError
from sparing.planning.memory import memory_kind
from sparing.planning.parameters import active_parameters, count_parameters, element_size
from sparing.planning.source import ModelSource, find_source
from sparing.text import readable, readable_bytes, table

if TYPE_CHECKING:
    from sparing.checkpoint import Checkpoint

__all__ = ["Inspection", "LayerReport", "TensorReport", "inspect"]

SHOWN = 5
Found = TypeVar("Found")
BOOKKEEPING = ("transformers_version", "_from_model_config")


@dataclass(frozen=True)
class LayerReport:
    """One layer. kind: "full", "value_only" (keys follow from values), "sliding", "sparse" (entries are chosen),
    "compressed_sparse", "heavily_compressed", "shared" or "recurrent", or the name of a mixer that remembers nothing,
    which has no heads; window: keys a query sees, its own included; shared_with: the layer whose entries it reads;
    nbytes: held of the context; bits_per_coordinate: of every number in keys and values of a layer that grows, with
    scales, positions and what is not a code yet (None elsewhere). Of a recurrent layer num_attention_heads are those of
    its state and num_key_value_heads the groups of B and C."""

    kind: str
    num_attention_heads: int | None
    num_key_value_heads: int | None
    head_dim: int | None
    window: int | None
    shared_with: int | None
    nbytes: int
    bits_per_coordinate: float | None


@dataclass(frozen=True)
class TensorReport:
    """How the tensors of a file compare with those the config asks for. misshapen: "name: found, expected"."""

    count: int
    dtypes: Mapping[str, int]  # stored type -> how many tensors
    missing: tuple[str, ...]
    unexpected: tuple[str, ...]
    misshapen: tuple[str, ...]


@dataclass(frozen=True)
class Inspection:
    """What a model is.

    kv, context: policy and tokens that the layers' bytes are for; tensors: None where there are no weights; vocabulary:
    tokens of the tokenizer, None where there is none; unknown_keys: keys of config.json or GGUF
    metadata that have no effect here;
    problems: what will not work.
    """

    model: str
    architecture: str
    dtype: str
    parameters: int
    active_parameters: int
    vocab_size: int
    hidden_size: int
    max_position_embeddings: int
    canvas_length: int | None
    kv: str
    context: int
    layers: tuple[LayerReport, ...]
    tensors: TensorReport | None
    vocabulary: int | None
    chat_template: bool
    generation_config: Mapping[str, Any]
    unknown_keys: Mapping[str, Any]
    problems: tuple[str, ...]

    @property
    def memory_bytes(self) -> int:
        """Held of one sequence of `context` tokens."""
        return sum(layer.nbytes for layer in self.layers)

    def to_dict(self) -> dict[str, Any]:
        """All fields, of types that JSON knows."""
        return {
            **asdict(self),
            "layers": [asdict(layer) for layer in self.layers],
            "generation_config": dict(self.generation_config),
            "unknown_keys": dict(self.unknown_keys),
            "problems": list(self.problems),
            "memory_bytes": self.memory_bytes,
        }

    def table(self) -> str:
        """Everything as aligned plain text; equal layers in a row are one line."""
        active = "" if self.active_parameters == self.parameters else f", {readable(self.active_parameters)} active"
        canvas = f", canvas of {self.canvas_length}" if self.canvas_length else ""
        summary = [
            ("model", self.model),
            ("architecture", f"{self.architecture}, {self.dtype}"),
            ("parameters", f"{readable(self.parameters)}{active}"),
            ("size", f"{len(self.layers)} layers of {self.hidden_size}, vocabulary of {self.vocab_size}"),
            ("context", f"{self.max_position_embeddings} tokens{canvas}"),
            ("memory", f"{readable_bytes(self.memory_bytes)} for {self.context} tokens ({self.kv})"),
            ("weights", _describe_tensors(self.tensors)),
            ("tokenizer", f"{self.vocabulary} tokens" if self.vocabulary else "none"),
            ("chat template", "yes" if self.chat_template else "none"),
            ("generation config", _pairs({k: v for k, v in self.generation_config.items() if k not in BOOKKEEPING})),
            ("unknown keys", _pairs(self.unknown_keys)),
            *(("problem", problem) for problem in self.problems),
        ]
        header = ("layers", "kind", "heads", "kv heads", "head_dim", "window", "reads", "memory", "bits a number")
        return f"{table(summary, header=False)}\n\n{table([header, *_layer_rows(self.layers)])}"


def inspect(source: ModelSource, *, kv: str = "dense", context: int = 1024) -> Inspection:
    """What a model is, without loading it.

    source: a checkpoint folder, GGUF file or hub id, a released model's name, the contents of a config.json, or a
    parsed config. kv: memory policy; context: tokens that one sequence remembers under it.
    Damaged or missing weights and tokenizers are reported as problems.
    Raises CheckpointError for a config that is not supported, ValueError for a source that is none of the above and
    for a policy that the model cannot have.
    """
    if context < 1:
        raise ValueError(f"context is {context}, expected at least 1 token")
    found = find_source(source)
    config, checkpoint = found.config, found.checkpoint
    counts = count_parameters(config.tensors())
    specs = apply_policy(config.memory_specs(), parse_policy(kv))
    problems: list[str] = []
    tensors = tokenizer = None
    if checkpoint is not None:
        tensors = _or_problem(lambda: _read_tensors(config, checkpoint), problems)
        tokenizer = _or_problem(lambda: checkpoint.tokenizer, problems)
        _or_problem(checkpoint.check_generation_config, problems)
    if tensors is not None:
        for what in ("missing", "unexpected", "misshapen"):
            if names := getattr(tensors, what):
                problems.append(f"{len(names)} {what} tensors: {_some(names)}")
    if tokenizer is not None and tokenizer.vocab_size > config.vocab_size:
        problems.append(f"the tokenizer has {tokenizer.vocab_size} tokens, config.json says {config.vocab_size}")
    return Inspection(
        model=Path(found.name).name if checkpoint else found.name,
        architecture=config.model_type,
        dtype=config.stored_dtype,
        parameters=sum(counts.values()),
        active_parameters=active_parameters(config, counts),
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        max_position_embeddings=config.max_position_embeddings,
        canvas_length=config.canvas_length,
        kv=kv,
        context=context,
        layers=tuple(_layer(config, i, spec, context) for i, spec in enumerate(specs)),
        tensors=tensors,
        vocabulary=None if tokenizer is None else tokenizer.vocab_size,
        chat_template=tokenizer is not None and tokenizer.chat_template is not None,
        generation_config={} if checkpoint is None else checkpoint.generation_config,
        unknown_keys={**config.unknown, **({} if checkpoint is None else checkpoint.unread)},
        problems=tuple(problems),
    )


def _layer(config: ModelConfig, i: int, spec: MemorySpec | None, context: int) -> LayerReport:
    if spec is None:
        return LayerReport(config.mixers()[i], None, None, None, None, None, 0, None)
    held = spec.nbytes(context, element_size(config))
    if isinstance(spec, RecurrentSpec):
        return LayerReport(memory_kind(spec), spec.num_heads, spec.num_groups, spec.head_dim, None, None, held, None)
    if isinstance(spec, CompressedSpec):
        heads, kind = config.num_attention_heads, memory_kind(spec)
        return LayerReport(kind, heads, 1, spec.head_dim, spec.window or None, None, held, None)
    numbers = 2 * spec.num_key_value_heads * spec.head_dim * context
    return LayerReport(
        kind=memory_kind(spec),
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=spec.num_key_value_heads,
        head_dim=spec.head_dim,
        window=spec.window,
        shared_with=spec.shared_with,
        nbytes=held,
        bits_per_coordinate=8 * held / numbers if _grows(spec) else None,
    )


def _grows(spec: AttentionSpec) -> bool:
    return spec.window is None and spec.shared_with is None


def _read_tensors(config: ModelConfig, checkpoint: Checkpoint) -> TensorReport | None:
    """None for a folder without a file of weights. Raises CheckpointError for damaged ones."""
    if not checkpoint.has_weights:
        return None
    from sparing.weights.stored import stored_weights

    source = stored_weights(checkpoint)
    stored = source.names()
    expected = names_in_file(config, stored)
    tolerated = [re.compile(pattern) for pattern in config.tolerated_tensors()]
    dtypes: dict[str, int] = {}
    for name in stored:
        dtypes[source.dtype(name)] = dtypes.get(source.dtype(name), 0) + 1
    present = set(stored)
    return TensorReport(
        count=len(stored),
        dtypes=dtypes,
        missing=tuple(name for name in expected if name not in present),
        unexpected=tuple(n for n in stored if n not in expected and not any(p.fullmatch(n) for p in tolerated)),
        misshapen=tuple(
            f"{name}: {list(source.shape(name))}, expected {list(shape)}"
            for name, (_, shape, _) in expected.items()
            if name in present and source.shape(name) != shape
        ),
    )


def _or_problem(read: Callable[[], Found], problems: list[str]) -> Found | None:
    try:
        return read()
    except CheckpointError as error:
        problems.append(str(error))
        return None


def _layer_rows(layers: Sequence[LayerReport]) -> list[tuple[object, ...]]:
    """One row for each run of equal layers."""
    rows: list[tuple[object, ...]] = []
    first = 0
    for i, layer in enumerate(layers):
        if i + 1 < len(layers) and layers[i + 1] == layer:
            continue
        span = str(i) if i == first else f"{first}-{i}"
        reads = None if layer.shared_with is None else f"layer {layer.shared_with}"
        held = readable_bytes(layer.nbytes) if layer.nbytes else None
        bits = None if layer.bits_per_coordinate is None else f"{layer.bits_per_coordinate:.4g}"
        heads, kv_heads = layer.num_attention_heads, layer.num_key_value_heads
        rows.append((span, layer.kind, heads, kv_heads, layer.head_dim, layer.window, reads, held, bits))
        first = i + 1
    return rows


def _describe_tensors(tensors: TensorReport | None) -> str:
    if tensors is None:
        return "none"
    kinds = ", ".join(f"{count} {dtype}" for dtype, count in tensors.dtypes.items())
    return f"{tensors.count} tensors ({kinds})"


def _pairs(values: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}={value}" for key, value in values.items() if value is not None) or "none"


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
