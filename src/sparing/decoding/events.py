"""What every decoder yields."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

__all__ = ["Commit", "Done", "Draft", "Event"]


@dataclass(frozen=True)
class Draft:
    """A guess: the whole canvas after one denoising step, or the tokens that a speculative round tried.

    row: index of the prompt; ids: the most likely token at each position, or the drafted ones; accepted: per position,
    whether the sampled token was kept for the next step (the others are drawn afresh), or the draft became output;
    step: 1, 2, ... within the canvas, or the row's round; entropy: of the model's prediction per position, nats.
    """

    row: int
    ids: list[int]
    accepted: list[bool]
    step: int
    entropy: list[float]


@dataclass(frozen=True)
class Commit:
    """Final output. Texts of a row concatenate to its answer; a multi-byte character is never split.

    logprobs: log-probability of each id under the model at temperature 1, or None if not asked for.
    marks: special tokens, which are not part of the text, each as (offset in the text, what it is called): they tell
    thoughts and tool calls from the answer. The token that ends the row is none of them.
    """

    row: int
    ids: list[int]
    text: str
    logprobs: list[float] | None = None
    marks: list[tuple[int, str]] = field(default_factory=list)

    @property
    def marked(self) -> str:
        """The text with its special tokens written out, as it belongs into the history of a conversation."""
        text, at = "", 0
        for offset, mark in self.marks:
            text, at = text + self.text[at:offset] + mark, offset
        return text + self.text[at:]


@dataclass(frozen=True)
class Done:
    """Nothing more comes for this row.

    reason: "eos", "stop" (a stop string or id) or "length". stats: prompt_tokens, new_tokens, forwards, seconds,
    memory_bytes (with those of a drafter's own memory); block diffusion adds canvases, denoising_steps; the speculative
    decoder rounds (passes that checked drafts), proposed and accepted (drafts that became output); a memory with a
    budget evictions, a list of its rounds (dicts: length, tokens so far; held before, kept after and evicted, entries
    per key head), and peak_entries, the most that a key head has held at once since the memory began.
    """

    row: int
    reason: str
    stats: dict[str, Any] = field(default_factory=dict)


Event = Draft | Commit | Done
