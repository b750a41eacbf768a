"""How fast a model reads and writes, and what it holds meanwhile, on this machine."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

from sparing.decoding.events import Commit
from sparing.decoding.generate import generate
from sparing.inspection.comparison import random_ids
from sparing.text import readable_bytes, table

if TYPE_CHECKING:
    from sparing.memory.plan import MemoryPlan
    from sparing.models.base import LanguageModel

__all__ = ["Speed", "Timing", "measure_speed"]


@dataclass(frozen=True)
class Timing:
    """One memory policy. Seconds of each repetition; memory_bytes: held at the end of one.

    first: from the prompt to the first token, or canvas, that stands; rest: from there to the last one.
    """

    kv: str
    prompt_tokens: int
    new_tokens: int
    later_tokens: int
    memory_bytes: int
    first: list[float] = field(default_factory=list)
    rest: list[float] = field(default_factory=list)

    @property
    def prompt_speed(self) -> float:
        """Tokens a second until the first one stands, the median."""
        return self.prompt_tokens / statistics.median(self.first)

    @property
    def decode_speed(self) -> float | None:
        """Tokens a second after the first ones, the median; None where no others came."""
        return self.later_tokens / statistics.median(self.rest) if self.later_tokens else None


@dataclass(frozen=True)
class Speed:
    """What was measured of one model. weight_bytes: that it holds; threads: of the CPU that it may use."""

    model: str
    weights: str
    weight_bytes: int
    threads: int
    timings: tuple[Timing, ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields and speeds, of types that JSON knows."""
        found = asdict(self)
        for t, fields in zip(self.timings, found["timings"], strict=True):
            fields |= {"prompt_speed": t.prompt_speed, "decode_speed": t.decode_speed}
        return found

    def rows(self) -> list[list[object]]:
        """A line of `table` for each policy."""
        found: list[list[object]] = []
        for t in self.timings:
            held = readable_bytes(self.weight_bytes), readable_bytes(t.memory_bytes)
            speeds = f"{t.prompt_speed:.1f}", None if t.decode_speed is None else f"{t.decode_speed:.1f}"
            found.append([self.weights, t.kv, *speeds, f"{statistics.median(t.first):.3f} s{_spread(t.first)}", *held])
        return found


HEADER = ("weights", "kv", "prompt tokens/s", "new tokens/s", "first token after", "weights hold", "memory holds")


def speed_table(found: Sequence[Speed]) -> str:
    """The numbers as aligned plain text, the medians of all repetitions."""
    first, threads = found[0].timings[0], found[0].threads
    on = "1 thread" if threads == 1 else f"{threads} threads"
    title = f"{found[0].model}, {on}, {first.prompt_tokens} tokens read, {first.new_tokens} written"
    return f"{title}\n\n{table([HEADER, *(row for speed in found for row in speed.rows())])}"


def _spread(seconds: Sequence[float]) -> str:
    return f" ({min(seconds):.3f} to {max(seconds):.3f})" if len(seconds) > 1 else ""


def measure_speed(
    model: LanguageModel,
    policies: Sequence[str] = ("dense",),
    *,
    prompt_tokens: int = 512,
    new_tokens: int = 128,
    repetitions: int = 3,
    **options: Any,
) -> Speed:
    """Continue a random prompt, always with the most likely token, under each policy in turn, after one run unmeasured.

    options: of the policies. Raises ValueError where prompt and answer do not fit the model's context, and as
    `LanguageModel.memory` does.
    """
    import torch

    context = model.config.max_position_embeddings
    if prompt_tokens + new_tokens > context:
        raise ValueError(
            f"{prompt_tokens} tokens to read and {new_tokens} to write do not fit the model's context of {context}"
        )
    ids = random_ids(model, prompt_tokens, seed=0)
    plans = {kv: model.memory_plan(kv, **options) for kv in policies}
    timings: dict[str, Timing] = {}
    for repetition in range(repetitions + 1):
        for kv, plan in plans.items():
            timing = _run(model, kv, plan, ids, new_tokens)
            if repetition:
                known = timings.setdefault(kv, timing)
                if known is not timing:
                    known.first.extend(timing.first)
                    known.rest.extend(timing.rest)
    weight_bytes = sum({id(x): x.nbytes for _, _, _, x in model.parts()}.values())
    name = "model" if model.path is None else model.path.name
    return Speed(name, model.weights, weight_bytes, torch.get_num_threads(), tuple(timings.values()))


def _run(model: LanguageModel, kv: str, plan: MemoryPlan, ids: Sequence[int], new_tokens: int) -> Timing:
    memory, times, counts = plan.memory(), list[float](), list[int]()
    began = time.perf_counter()
    options: dict[str, Any] = {"max_new_tokens": new_tokens, "temperature": 0, "stop": []}
    if model.config.canvas_length is None:
        options["min_new_tokens"] = new_tokens  # the end may not come before
    for event in generate(model, list(ids), memory=memory, **options):
        if isinstance(event, Commit):
            times.append(time.perf_counter())
            counts.append(len(event.ids))
    timing = Timing(kv, len(ids), sum(counts), sum(counts[1:]), memory.nbytes, [times[0] - began])
    if len(times) > 1:
        timing.rest.append(times[-1] - times[0])
    return timing
