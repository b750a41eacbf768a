"""`sparing chat`: a conversation that remembers."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.options import load_model, model_options, sampling_options, settings

if TYPE_CHECKING:
    from sparing.models.base import LanguageModel

__all__ = ["Conversation", "chat"]


class Conversation:
    """Messages so far, and the memory of the tokens they were; only what is new is encoded each turn."""

    def __init__(self, model: LanguageModel, system: str | None, options: dict[str, Any]):
        self.model, self.system, self.options = model, system, options
        self.kv = options.pop("kv", "dense")
        self.reset()

    def reset(self) -> None:
        self.messages: list[dict[str, str]] = [{"role": "system", "content": self.system}] if self.system else []
        self._forget()

    def _forget(self) -> None:
        self._ids: list[int] = []  # the first `memory.length` of these are what the memory holds
        self._memory = self.model.memory(self.kv)

    def answer(self, text: str):
        """Events of the answer to a message; both join the conversation, an interrupted answer as far as it came."""
        from sparing.decoding.events import Commit
        from sparing.decoding.generate import generate, prompt_ids

        messages = [*self.messages, {"role": "user", "content": text}]
        ids = prompt_ids(self.model, messages)
        held = self._ids[: self._memory.length]
        if ids[: len(held)] != held or len(ids) == len(held):
            self._forget()  # the template rewrote the past
            held = []
        events = generate(self.model, ids[len(held) :], memory=self._memory, **self.options)
        self._ids = ids
        answer = ""
        try:
            for event in events:
                if isinstance(event, Commit):
                    answer += event.text
                    self._ids = [*self._ids, *event.ids]
                yield event
        finally:
            self.messages = [*messages, {"role": "assistant", "content": answer}]


@click.command()
@click.argument("model", default="smollm2")
@click.option("--system", help="Instructions that precede the conversation.")
@sampling_options
@model_options
def chat(
    model: str,
    system: str | None,
    dtype: str,
    device: str,
    threads: int | None,
    revision: str | None,
    **options: Any,
) -> None:
    """Talk to MODEL (default: smollm2, of the extra [smollm2]).

    /reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer.
    """
    from sparing.cli.render import choose, show

    loaded = load_model(model, dtype, device, threads, revision)
    if loaded.tokenizer is None or loaded.tokenizer.chat_template is None:
        raise ValueError(f"{model} has no chat template: use 'sparing generate -m {model}'")
    conversation = Conversation(loaded, system, settings(options))
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (line editing and history for input())
    while True:
        try:
            text = input("> " if interactive else "").strip()
        except EOFError:
            break
        except KeyboardInterrupt:
            print()
            break
        if text == "/exit":
            break
        if text == "/reset":
            conversation.reset()
        elif text:
            try:
                show(conversation.answer(text), choose(False, 1, loaded.tokenizer))
            except KeyboardInterrupt:
                print(" [stopped]")
            except ValueError as error:  # too long by now: say so and stay
                print(f"sparing: {error}; /reset starts afresh", file=sys.stderr)
