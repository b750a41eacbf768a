"""Block diffusion: a canvas of tokens settles everywhere at once, then becomes context for the next canvas.

Each step proposes a token everywhere, keeps the proposals the model is surest of, and draws the others afresh.
Source: DiffusionGemma, transformers `generation_diffusion_gemma.py`; entropy-bounded acceptance arXiv 2505.24857.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from sparing.config.generation import named_ends
from sparing.config.numbers import whole
from sparing.decoding.canvas import BlockDiffusion, Canvas, Denoising, linear_temperature, new_canvas, unsettled
from sparing.decoding.engine import run
from sparing.decoding.events import Commit, Draft, Event
from sparing.decoding.outputs import Outputs, Pending
from sparing.decoding.row import ActiveRow
from sparing.decoding.stepper import Stepper
from sparing.decoding.transcript import Transcript
from sparing.kernels.vocabulary import VocabularyPass, VocabularyResult
from sparing.memory.sequence import Memory
from sparing.models.batch import Row
from sparing.models.diffusion_gemma import CanvasRow, DiffusionGemma

__all__ = ["BlockDiffusionStepper", "LogitsModel", "generate_block_diffusion"]


class BlockDiffusionStepper(Stepper):
    """Gives a Draft a step, a Commit per canvas, then the row's Done.

    The last canvas of a row is not encoded: `row.pending` holds it for a following turn.
    given, fixed: start of the first canvas, see `new_canvas`; bias: see `Denoising`.
    Raises ValueError where logits are not finite, or nothing is left to choose.
    """

    def __init__(
        self,
        model: DiffusionGemma,
        row: ActiveRow,
        settings: BlockDiffusion,
        *,
        given: Sequence[int | None] | None = None,
        fixed: Sequence[int] = (),
        bias: Tensor | None = None,
    ) -> None:
        super().__init__(row)
        self.model, self.settings, self.bias = model, settings, bias
        self._first = given, fixed
        self._canvas: Canvas | None = None  # None: what is pending is to be encoded first
        self._counts = {"canvases": 0, "denoising_steps": 0}

    def wants(self) -> Pending | Denoising:
        canvas, settings = self._canvas, self.settings
        if canvas is None:
            return Pending(outputs=0)
        temperature = linear_temperature(
            canvas.steps_remaining, settings.max_denoising_steps, settings.t_min, settings.t_max
        )
        generator = None if settings.greedy else self.row.generator
        return Denoising(canvas.ids, canvas.soft, temperature, generator, self.bias, canvas.reading)

    def take(self, outputs: Outputs) -> Iterator[Event]:
        canvas, found = self._canvas, outputs.canvas
        return self._begin() if canvas is None or found is None else self._settle(canvas, found)

    def _begin(self) -> Iterator[Event]:
        """Keep what was encoded, and start a canvas after it."""
        row, config = self.row, self.model.config
        row.keep()
        given, fixed = (None, ()) if self._counts["canvases"] else self._first
        of_model = config.canvas_length, config.vocab_size
        self._canvas = new_canvas(*of_model, row.generator, self.settings, row.pending.device, given, fixed)
        self._canvas.reading = row.memory.reading()
        return iter(())

    def _settle(self, canvas: Canvas, found: VocabularyResult) -> Iterator[Event]:
        row, config = self.row, self.model.config
        if not (usable := found.entropy.isfinite()).all():
            raise unsettled(self.model, row.row, canvas, row.memory, usable)
        accepted, spread, finished = canvas.update(found, row.generator, self.settings, config.vocab_size)
        row.forwards += 1
        self._counts["denoising_steps"] += 1
        number = self.settings.max_denoising_steps - canvas.steps_remaining
        yield Draft(row.row, canvas.argmax.tolist(), accepted.tolist(), number, spread.tolist())
        if not finished:
            return
        self._canvas = None
        self._counts["canvases"] += 1
        row.pending = canvas.argmax  # what is committed is the most likely canvas, not the sampled one
        ids, text = row.transcript.push(canvas.argmax.tolist())
        yield Commit(row.row, ids, text, marks=row.transcript.marks)
        room = config.max_position_embeddings - row.memory.length - len(row.pending)
        if row.transcript.reason is not None or room < config.canvas_length:
            self.finished = True
            yield row.done(**self._counts)

    def close(self) -> None:
        self._canvas = None  # with what its passes share


class LogitsModel:
    """Anything with `denoise(canvas, memory, soft) -> logits [L, V]`, as the engine runs it; `soft` is tempered logits.

    What its passes return stands for hidden states: logits of canvases, and nothing of texts.
    """

    def __init__(self, model: DiffusionGemma):
        self.model, self.config = model, model.config

    def run(self, rows: Sequence[Row]) -> Tensor:
        if texts := [row for row in rows if row.causal]:
            self.model.run(texts)
        canvases = [(row.tokens, row) for row in rows if isinstance(row, CanvasRow)]
        logits = [self.model.denoise(ids, row.memory, row.soft) for ids, row in canvases if ids is not None]
        return torch.cat(logits).float() if logits else torch.empty(0)

    def check_memory(self, memory: Memory) -> None:
        """All are the model's own."""

    def head(self, hidden: Tensor) -> Tensor:
        return self.model.head(hidden)

    def predict(
        self, hidden: Tensor, temperature: Tensor, noise: Callable[[int], Tensor] | None, bias: Tensor | None
    ) -> VocabularyResult:
        z = (hidden if bias is None else hidden + bias) / temperature[:, None]
        vocabulary = VocabularyPass()
        vocabulary.update(z, None if noise is None else noise(z.shape[-1]))
        result = vocabulary.result()
        result.soft = z
        return result


class Streamer(Protocol):
    """Watches one row. ids: int64 [L], all of a canvas."""

    def put_draft(self, ids: Tensor) -> None:
        """A denoising step's canvas."""
        ...

    def put(self, ids: Tensor) -> None:
        """A finished canvas."""
        ...


def generate_block_diffusion(
    model: DiffusionGemma,
    input_ids: Tensor,
    generation_config: object,
    attention_mask: Tensor | None = None,
    streamer: Streamer | None = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> tuple[Tensor, Tensor, list[Memory]]:
    """Generate canvases after each row of a left-padded batch: (sequences, tokens_per_forward, memories).

    model: a block-diffusion model, of which `denoise`, `memory`, `run` and `config` are used; input_ids: int64 [B, P];
    attention_mask: [B, P], 0 on padding; generation_config: mapping or object with max_new_tokens, eos_token_id,
    pad_token_id and the settings of `BlockDiffusion` (a threshold of None: never stop early); generator: one for all
    rows or one per row.
    sequences: [B, P + n L], whole canvases, what follows a row's first end id replaced by pad (if a pad id is set);
    tokens_per_forward: float32 [B] tokens that are not padding per denoising pass; memories: per row, holding the
    prompt and all canvases but the last.
    """
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids holds no tokens: the prompt is empty")
    config = _settings(generation_config)
    disabled = {key: None for key in ("stability_threshold", "confidence_threshold") if config.get(key, 0) is None}
    settings = BlockDiffusion.from_generation_config(config, **disabled)
    length = model.config.canvas_length
    limit = config.get("max_new_tokens")
    canvases = -(-(length if limit is None else whole("max_new_tokens", limit, 1)) // length)
    eos_ids = named_ends(config) or ()
    pad = config.get("pad_token_id")
    batch = len(input_ids)
    if generator is None or isinstance(generator, torch.Generator):
        generator = [generator or torch.Generator().manual_seed(0)] * batch
    keep = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    rows = [
        ActiveRow(i, input_ids[i][keep[i].bool()], model.memory(), Transcript(None, eos_ids, (), canvases * length), g)
        for i, g in zip(range(batch), generator, strict=True)
    ]
    output: list[list[int]] = [[] for _ in rows]
    steps = torch.zeros(batch)
    for event in run(LogitsModel(model), (BlockDiffusionStepper(model, row, settings) for row in rows)):
        if isinstance(event, Draft):
            steps[event.row] += 1
            if streamer is not None:
                streamer.put_draft(torch.tensor(event.ids))
        elif isinstance(event, Commit):
            # The event stops at the row's end id; the whole canvas is in `pending`, to be encoded before the next one.
            canvas = rows[event.row].pending.tolist()
            if pad is not None:
                canvas[len(event.ids) :] = [pad] * (len(canvas) - len(event.ids))
            output[event.row] += canvas
            if streamer is not None:
                streamer.put(torch.tensor(canvas))
    longest = max(map(len, output))
    fill = pad if pad is not None else eos_ids[0] if eos_ids else 0
    tail = torch.tensor([ids + [fill] * (longest - len(ids)) for ids in output], device=input_ids.device)
    useful = torch.tensor([float(sum(token != pad for token in ids)) for ids in output])
    return torch.cat((input_ids, tail), 1), useful / steps, [row.memory for row in rows]


def _settings(generation_config: object) -> Mapping[str, Any]:
    if isinstance(generation_config, Mapping):
        return generation_config
    to_dict = getattr(generation_config, "to_dict", None)  # of transformers' GenerationConfig
    return vars(generation_config) if to_dict is None else to_dict()
