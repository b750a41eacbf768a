"""`sparing.plan`: will it fit, and how fast can it be at best. Never imports torch."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from sparing.config.deepseek_v4 import DeepseekV4Config
from sparing.config.memory import AttentionSpec, MemorySpec
from sparing.config.numbers import whole, whole_numbers
from sparing.config.policy import Budget, apply_policy, parse_policy
from sparing.config.protocol import HasRelease, ModelConfig
from sparing.planning.fp8 import against_v32
from sparing.planning.hardware import Hardware, find_hardware
from sparing.planning.memory import canvas_bytes, memory_by_kind
from sparing.planning.parameters import (
    active_parameters,
    bits_per_parameter,
    count_parameters,
    element_size,
    held_bytes,
    released_size,
)
from sparing.planning.roofline import decode_pass, denoise_pass, prefill_pass
from sparing.planning.source import ModelSource, find_source, stored_tensors
from sparing.text import readable, readable_bytes, readable_seconds, table

__all__ = ["Plan", "plan"]

DEFAULT_STEPS = 48  # the released samplers' maximum


@dataclass(frozen=True)
class Plan:
    """What a model needs.

    parameters, active_parameters: all, and those one token makes use of. weight_bytes: of all weights; of those that a
    release packs, as its files hold them, drafting layers included, which are no `parameters`.
    memory_bytes, memory_by_kind: what `batch` sequences of `context` tokens remember. canvas_bytes: what they hold
    besides while a canvas after them is denoised over codes. flops_per_token, bytes_per_token: a pass's operations
    and bytes read, shared out over the tokens it yields. seconds_per_token: the least time between two tokens of the
    whole batch; generation_seconds: the least time for prompt and new tokens; fits: weights, memories and canvases
    together; all three None without hardware. notes: what to know when reading this.
    """

    model: str
    context: int
    batch: int
    kv: str
    weights: str
    hardware: str | None
    new_tokens: int | None
    steps: int | None
    parameters: int
    active_parameters: int
    weight_bytes: int
    memory_bytes: int
    memory_by_kind: Mapping[str, int]
    canvas_bytes: int
    flops_per_token: float
    bytes_per_token: float
    seconds_per_token: float | None
    generation_seconds: float | None
    fits: bool | None
    notes: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields, of types that JSON knows."""
        return {**asdict(self), "memory_by_kind": dict(self.memory_by_kind), "notes": list(self.notes)}

    def table(self) -> str:
        """All figures as aligned plain text."""
        sequences = "1 sequence" if self.batch == 1 else f"{self.batch} sequences"
        rows: list[tuple[str, str]] = [
            ("model", self.model),
            ("parameters", f"{readable(self.parameters)}, {readable(self.active_parameters)} active for a token"),
            ("weights", f"{readable_bytes(self.weight_bytes)} ({self.weights})"),
            ("memory", f"{readable_bytes(self.memory_bytes)} ({self.kv}, {sequences} of {self.context} tokens)"),
            *((f"  {_held_by(kind)}", readable_bytes(held)) for kind, held in self.memory_by_kind.items()),
            *([("decoded for a canvas", readable_bytes(self.canvas_bytes))] if self.canvas_bytes else []),
            ("together", readable_bytes(self.weight_bytes + self.memory_bytes + self.canvas_bytes)),
            ("read for a token", readable(self.bytes_per_token, "B")),
            ("computed for a token", readable(self.flops_per_token, "FLOP")),
        ]
        if self.steps is not None:
            rows.append(("denoising steps", f"{self.steps} a canvas"))
        if self.hardware is not None and self.seconds_per_token is not None:
            rows.append(("hardware", f"{self.hardware}: {'fits' if self.fits else 'does NOT fit'}"))
            speed = f"{readable_seconds(self.seconds_per_token)} a token, {1 / self.seconds_per_token:.4g} tokens/s"
            rows.append(("at best", speed))
        if self.generation_seconds is not None:
            rows.append((f"{self.new_tokens} new tokens", f"{readable_seconds(self.generation_seconds)} at best"))
        rows += [("note", note) for note in self.notes]
        return table(rows, header=False)


def plan(
    source_or_config: ModelSource,
    *,
    context: int,
    batch: int = 1,
    kv: str = "dense",
    weights: str = "stored",
    hardware: str | Hardware | None = None,
    new_tokens: int | None = None,
    steps: int | None = None,
    **options: Any,
) -> Plan:
    """Bytes, operations and least times of a model, from its config alone.

    source_or_config: a released model's name, a folder, GGUF file or hub id, the contents of a config.json, or a
    parsed config. context: tokens that each of `batch` sequences remembers in the end, prompt and new ones together.
    kv: memory policy. weights: "stored" (packed where a checkpoint's file is), "fp8", "int8", "int4", "nvfp4" or
    "mxfp4". hardware: a name from the table of machines, or a `Hardware`. new_tokens: how many of `context` are
    generated, for `generation_seconds`. steps: denoising passes a canvas takes (block diffusion only; the released
    maximum where it is left out). options: of the memory policy, as in `model.memory`; they may stand in `kv` as well.
    Raises ValueError for a name that is not known, listing those that are, and for numbers out of range;
    CheckpointError for a bad config, and for quantised weights that are not supported.
    """
    source = find_source(source_or_config)
    config = source.config
    machine = find_hardware(hardware) if isinstance(hardware, str) else hardware
    canvas: int | None = config.canvas_length
    context, batch = whole_numbers(1, context=context, batch=batch)
    new_tokens = None if new_tokens is None else whole("new_tokens", new_tokens, 1)
    steps = None if steps is None else whole("steps", steps, 1)
    if new_tokens is not None and new_tokens > context:
        raise ValueError(f"new_tokens is {new_tokens}, context is {context}: context counts prompt and new tokens")
    if steps is not None and canvas is None:
        raise ValueError(f"steps={steps}: {source.name} yields one token a pass and takes no denoising steps")

    policy = parse_policy(kv, options)
    specs = apply_policy(config.memory_specs(), policy)
    tensors, notes = stored_tensors(source)
    counts, loaded = count_parameters(config.tensors()), held_bytes(config, weights, tensors)
    bits = bits_per_parameter(counts, loaded)
    held = {kind: n * batch for kind, n in memory_by_kind(specs, context, element_size(config)).items()}
    weight_bytes = sum(loaded.values())
    if weights == "stored" and tensors is None and isinstance(config, HasRelease) and config.is_fp8:
        count, weight_bytes = released_size(config)
        notes.append(f"weights as the release stores them, in {count} tensors")
    if isinstance(config, DeepseekV4Config) and policy.is_released:
        memory, work = against_v32(config, specs, context)
        notes.append(f"{memory:.2%} of DeepSeek-V3.2's memory, {work:.2%} of its operations in units of FP8")
    if context > config.max_position_embeddings:
        notes.append(f"the model was made for {config.max_position_embeddings} tokens of context")
    if isinstance(policy.keep, Budget):
        most = policy.keep.size + policy.keep.interval - 1
        notes.append(f"between two rounds of forgetting a growing layer holds up to {most} entries")
        if not policy.keep.allow_nope and (layer := _first_without_rope(config, specs)) is not None:
            notes.append(
                f"layer {layer} has no RoPE: pruning it, by content alone, needs"
                f" triattention:{policy.keep.size},allow_nope=true"
            )
    if canvas is not None and steps is None:
        steps = DEFAULT_STEPS
        notes.append(f"counted with {steps} denoising steps a canvas; text that settles early takes fewer")

    run, tokens, passes = decode_pass, 1, 1
    if canvas is not None and steps is not None:
        # A finished canvas is read once more, causally, into the memory: about as much work as a denoising step.
        run, tokens, passes = denoise_pass, canvas, steps + 1
    one = run(config, specs, context=context, batch=batch, bits=bits)
    share = passes / (tokens * batch)
    seconds = generation = None
    if machine is not None:
        seconds = one.seconds(machine, weights) * share
        if new_tokens is not None:
            # Reads grow with the length, so the pass at half of the way is the average one.
            half = run(config, specs, context=context - new_tokens // 2, batch=batch, bits=bits)
            generation = math.ceil(new_tokens / tokens) * passes * half.seconds(machine, weights)
            if context > new_tokens:
                prompt = prefill_pass(config, specs, tokens=context - new_tokens, batch=batch, bits=bits)
                generation += prompt.seconds(machine, weights)
    memory_bytes = sum(held.values())
    decoded = 0 if canvas is None else batch * canvas_bytes(specs, context, canvas, element_size(config))
    return Plan(
        model=Path(source.name).name if source.checkpoint else source.name,
        context=context,
        batch=batch,
        kv=policy.kv,
        weights=weights,
        hardware=None if machine is None else machine.name,
        new_tokens=new_tokens,
        steps=steps,
        parameters=sum(counts.values()),
        active_parameters=active_parameters(config, counts),
        weight_bytes=weight_bytes,
        memory_bytes=memory_bytes,
        memory_by_kind=held,
        canvas_bytes=decoded,
        flops_per_token=one.flops * share,
        bytes_per_token=one.nbytes * share,
        seconds_per_token=seconds,
        generation_seconds=generation,
        fits=None if machine is None else weight_bytes + memory_bytes + decoded <= machine.memory,
        notes=tuple(notes),
    )


def _held_by(kind: str) -> str:
    """A kind of `memory_by_kind` in words."""
    return kind if kind == "compressors" else f"{kind} layers"


def _first_without_rope(config: ModelConfig, specs: Sequence[MemorySpec | None]) -> int | None:
    """Index of the first layer that a budget bounds although nothing rotates its keys; None where there is none."""
    layers = enumerate(zip(specs, config.layer_ropes(), strict=True))
    bounded = (i for i, (spec, rope) in layers if isinstance(spec, AttentionSpec) and spec.rounds and rope is None)
    return next(bounded, None)
