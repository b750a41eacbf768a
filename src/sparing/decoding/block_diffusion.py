"""Block diffusion: a canvas of tokens settles everywhere at once, then becomes context for the next canvas.

Each step proposes a token everywhere, keeps the proposals the model is surest of, and draws the others afresh.
Source: DiffusionGemma, transformers `generation_diffusion_gemma.py`; entropy-bounded acceptance arXiv 2505.24857.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sparing.config.generation import named_ends
from sparing.config.numbers import whole
from sparing.decoding.autoregressive import ActiveRow, encode
from sparing.decoding.canvas import BlockDiffusion, Canvas, Denoiser, denoise_step, new_canvas
from sparing.decoding.events import Commit, Draft, Event
from sparing.decoding.transcript import Transcript
from sparing.kernels.vocabulary import VocabularyPass, VocabularyResult
from sparing.memory.group import Reading
from sparing.memory.sequence import Memory
from sparing.models.diffusion_gemma import DiffusionGemma

__all__ = ["block_diffusion", "generate_block_diffusion"]


@torch.inference_mode()
def block_diffusion(
    model: DiffusionGemma,
    rows: Sequence[ActiveRow],
    settings: BlockDiffusion,
    *,
    denoiser: Denoiser | None = None,
    given: Sequence[int | None] | None = None,
    fixed: Sequence[int] = (),
    bias: Tensor | None = None,
) -> Iterator[Event]:
    """Yield a Draft per row and step, a Commit per canvas, then the row's Done.

    Every row has its own canvas and step: it commits, starts its next canvas or leaves without waiting for others.
    The last canvas of a row is not encoded: `row.pending` holds it for a following turn.
    given, fixed: start of every row's first canvas, see `new_canvas`; bias: as in `denoise_step`.
    """
    length, vocab_size = model.config.canvas_length, model.config.vocab_size
    canvases: dict[int, Canvas] = {}
    counts = {row.row: {"canvases": 0, "denoising_steps": 0} for row in rows}
    active = list(rows)
    try:
        while active:
            fresh = [row for row in active if row.row not in canvases]
            if fresh:
                encode(model, fresh, wanted=0)
                for row in fresh:
                    first = counts[row.row]["canvases"] == 0
                    canvases[row.row] = new_canvas(
                        length,
                        vocab_size,
                        row.generator,
                        settings,
                        row.pending.device,
                        given if first else None,
                        fixed if first else (),
                    )
                    canvases[row.row].row, canvases[row.row].reading = row.row, row.memory.reading()
            current = [canvases[row.row] for row in active]
            memories, generators = [row.memory for row in active], [row.generator for row in active]
            step = denoise_step(denoiser or model, current, memories, generators, settings, vocab_size, bias)
            remaining = []
            for row, canvas, (accepted, spread, finished) in zip(active, current, step, strict=True):
                row.forwards += 1
                counts[row.row]["denoising_steps"] += 1
                number = settings.max_denoising_steps - canvas.steps_remaining
                yield Draft(row.row, canvas.argmax.tolist(), accepted.tolist(), number, spread.tolist())
                if finished:
                    del canvases[row.row]
                    counts[row.row]["canvases"] += 1
                    row.pending = canvas.argmax  # what is committed is the most likely canvas, not the sampled one
                    ids, text = row.transcript.push(canvas.argmax.tolist())
                    yield Commit(row.row, ids, text, marks=row.transcript.marks)
                    room = model.config.max_position_embeddings - row.memory.length - len(row.pending)
                    if row.transcript.reason is not None or room < length:
                        yield row.done(**counts[row.row])
                        continue
                remaining.append(row)
            active = remaining
    finally:  # what passes decoded goes too, where a traceback keeps this frame
        canvases.clear()


class LogitsDenoiser:
    """A denoiser from anything with `denoise(canvas, memory, soft) -> logits [L, V]`; `soft` is tempered logits."""

    def __init__(self, model: DiffusionGemma):
        self.model = model

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
        found = [self.model.denoise(c, m, s) for c, m, s in zip(canvases, memories, soft, strict=True)]
        logits = torch.cat(found).float()
        z = (logits if bias is None else logits + bias) / temperature[:, None]
        run = VocabularyPass()
        run.update(z, None if noise is None else noise(z.shape[-1]))
        result = run.result()
        result.soft = z
        return result


def generate_block_diffusion(
    model: DiffusionGemma,
    input_ids: Tensor,
    generation_config: Any,
    attention_mask: Tensor | None = None,
    streamer: Any = None,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
) -> tuple[Tensor, Tensor, list[Memory]]:
    """Generate canvases after each row of a left-padded batch: (sequences, tokens_per_forward, memories).

    model: a block-diffusion model, of which `denoise`, `memory`, `run` and `config` are used; input_ids: int64 [B, P];
    attention_mask: [B, P], 0 on padding; generation_config: mapping or object with max_new_tokens, eos_token_id,
    pad_token_id and the settings of `BlockDiffusion` (a threshold of None: never stop early); streamer:
    `put_draft(ids)` per step and `put(ids)` per canvas, for one row; generator: one for all rows or one per row.
    sequences: [B, P + n L], whole canvases, what follows a row's first end id replaced by pad (if a pad id is set);
    tokens_per_forward: float32 [B] tokens that are not padding per denoising pass; memories: per row, holding the
    prompt and all canvases but the last.
    """
    if input_ids.shape[1] == 0:
        raise ValueError("input_ids holds no tokens: the prompt is empty")
    config = generation_config if isinstance(generation_config, Mapping) else _attributes(generation_config)
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
    for event in block_diffusion(model, rows, settings, denoiser=LogitsDenoiser(model)):
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


def _attributes(generation_config: Any) -> dict[str, Any]:
    return generation_config.to_dict() if hasattr(generation_config, "to_dict") else vars(generation_config)
