"""What a trained model can do, measured with the decoders that everybody runs."""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from sparing.decoding.canvas import uniform_corrupt
from sparing.decoding.events import Commit, Done, Draft
from sparing.decoding.generate import generate
from sparing.models.base import LanguageModel
from sparing.models.diffusion_gemma import DiffusionGemma
from sparing.sudoku.puzzle import Grid, is_solved
from sparing.sudoku.text import parse_answer, prompt_text
from sparing.training.block_diffusion import Examples, block_diffusion_loss
from sparing.training.data import TextData
from sparing.training.run import VALIDATION, random_numbers

__all__ = ["Answer", "answers", "repair", "solve_sudoku", "tell_tales", "text_losses", "words_of"]

ROWS = 32  # prompts decoded together


@dataclass
class Answer:
    """One prompt's answer. ids: useful tokens, without end and padding; forwards: passes that made them."""

    text: str = ""
    ids: list[int] = field(default_factory=list)
    forwards: int = 0


def answers(model: LanguageModel, prompts: Sequence[Any], seed: int = 0, **options: Any) -> Iterator[Answer]:
    """The answer to each prompt, in order. options: of `sparing.generate`. Row r of a group draws from (seed, r)."""
    for start in range(0, len(prompts), ROWS):
        group = list(prompts[start : start + ROWS])
        found = [Answer() for _ in group]
        for event in generate(model, group, seed=seed + start, **options):
            answer = found[event.row]
            if isinstance(event, Commit):
                answer.text += event.text
                answer.ids += event.ids
            elif isinstance(event, Done):
                answer.forwards = event.stats["forwards"]
        yield from found


def solve_sudoku(
    model: LanguageModel, puzzles: Sequence[tuple[Grid, Grid]], decoder: str, seed: int = 0, **options: Any
) -> dict[str, float]:
    """Solved share of puzzles, judged by the rules and the givens, and what it took.

    decoder: "block_diffusion" with the checkpoint's sampler settings, or "autoregressive" (most likely digit).
    tokens_per_forward: answer tokens, the end id included, per pass, over all puzzles.
    """
    size, began = len(puzzles[0][0]), time.perf_counter()
    prompts = [prompt_text(puzzle) for puzzle, _ in puzzles]
    found = list(answers(model, prompts, seed, decoder=decoder, max_new_tokens=size * (size + 1), **options))
    seconds = time.perf_counter() - began
    grids = [parse_answer(answer.text, size) for answer in found]
    solved = sum(is_solved(puzzle, grid) for (puzzle, _), grid in zip(puzzles, grids, strict=True))
    forwards = sum(answer.forwards for answer in found)
    return {
        "puzzles": len(puzzles),
        "solved": solved / len(puzzles),
        "forwards": forwards / len(puzzles),
        "tokens_per_forward": sum(len(answer.ids) for answer in found) / forwards,
        "seconds": seconds,
    }


def text_losses(model: DiffusionGemma, data: TextData, tokens: int = 50_000, context: int = 256) -> dict[str, float]:
    """Bits per character of held-out text left to right, and the diffusion loss on it (nats per token).

    tokens: how many are scored, from the start of the held-out part of each book in turn; each is predicted from at
    least `context` tokens of its tale, or all there are.
    """
    bits, characters, scored = 0.0, 0, 0
    for tale in data.held_out_tales():
        if scored >= tokens:
            break
        ids = [data.bos, *tale]
        for start in range(1, len(ids), context):
            first = max(0, start - context)
            chunk = torch.tensor(ids[first : start + context])
            logits = model.logits(chunk[:-1])[start - first - 1 :].double()
            target = chunk[start - first :]
            bits -= logits.log_softmax(-1).gather(-1, target[:, None]).sum().item() / math.log(2)
            characters += len(data.tokenizer.decode(target.tolist()))
            scored += len(target)
    with torch.no_grad():
        batches = data.validation()
        losses = [block_diffusion_loss(model, b, random_numbers(0, VALIDATION, i)) for i, b in enumerate(batches)]
    diffusion = sum(loss.diffusion.item() for loss in losses) / len(losses)
    return {"bits_per_character": bits / characters, "tokens": scored, "diffusion": diffusion}


def words_of(text: str) -> list[str]:
    """The words of a text in lower case, without their apostrophes at the ends."""
    return [word.strip("'") for word in re.findall(r"[a-z']+", text.lower()) if word.strip("'")]


def tell_tales(
    model: DiffusionGemma,
    prompts: Sequence[str],
    vocabulary: set[str],
    decoder: str,
    seed: int = 0,
    max_new_tokens: int = 256,
    **options: Any,
) -> dict[str, float]:
    """Share of told words that the corpus knows, and the speed in useful tokens per pass and per second.

    vocabulary: of `words_of` the corpus. A word cut off by the start or the end of an answer does not count.
    """
    began = time.perf_counter()
    found = list(answers(model, prompts, seed, decoder=decoder, max_new_tokens=max_new_tokens, **options))
    seconds = time.perf_counter() - began
    words = [word for answer in found for word in words_of(answer.text)[1:-1]]
    tokens = sum(len(answer.ids) for answer in found)
    return {
        "words": len(words),
        "real_words": sum(word in vocabulary for word in words) / max(1, len(words)),
        "tokens_per_forward": tokens / sum(answer.forwards for answer in found),
        "tokens_per_second": tokens / seconds,
    }


def repair(
    model: DiffusionGemma, batches: Iterable[Examples], corruption: float, seed: int = 0, **options: Any
) -> dict[str, float]:
    """What becomes of canvases of which a share of tokens was replaced at random.

    batches: the first canvas of each example is garbled. restored: share of changed tokens that come back; kept: share
    of unchanged tokens that stay; each after the first denoising pass and at the end. options: of `sparing.generate`.
    """
    length = model.config.canvas_length
    options |= {"decoder": "block_diffusion", "max_new_tokens": length}
    changed, first, last, passes = [], [], [], 0  # first, last: which tokens are right
    for i, examples in enumerate(batches):
        target = examples.ids[:, examples.prefix : examples.prefix + length]
        share = torch.full((len(target),), corruption)
        garbled, _ = uniform_corrupt(target, share, model.config.vocab_size, random_numbers(seed, VALIDATION, i))
        changed.append(garbled != target)
        for prompt, text, canvas in zip(examples.ids[:, : examples.prefix].tolist(), target, garbled, strict=True):
            events = generate(model, prompt, seed=seed, canvas=canvas.tolist(), **options)
            drafts = [torch.tensor(event.ids) == text for event in events if isinstance(event, Draft)]
            first.append(drafts[0])
            last.append(drafts[-1])
            passes += len(drafts)
    garbled = torch.cat(changed)
    result: dict[str, float] = {
        "canvases": len(garbled),
        "changed": int(garbled.sum()),
        "passes": passes / len(garbled),
    }
    for name, drafts in (("first_pass", first), ("end", last)):
        right = torch.stack(drafts).float()
        result[f"restored_{name}"] = float(right[garbled].mean())
        result[f"kept_{name}"] = float(right[~garbled].mean())
    return result
