"""A conversation that remembers: only what is new is encoded each turn, also when it goes on from a file."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from sparing.cli.chat_options import TEMPLATE_OPTIONS
from sparing.cli.options import memory_options
from sparing.config.generation import parse_generation_config
from sparing.config.numbers import whole
from sparing.decoding.answer import for_history
from sparing.decoding.chat_prompt import check_variables, template_variables
from sparing.decoding.engine import read
from sparing.decoding.events import Commit, Event
from sparing.decoding.generate import generate, prompt_ids
from sparing.decoding.row import unspoken
from sparing.errors import CheckpointError
from sparing.memory.sequence import Memory
from sparing.models.base import LanguageModel

__all__ = ["Conversation"]

SAVED = "conversation"  # what it is called beside a memory


class Conversation:
    """Messages so far, and memories of the tokens they were.

    options: of `generate`. What a template looks for in old answers (thoughts, calls of tools) keeps its marks in the
    messages, though it is not shown. forgotten: exchanges left out because the context was full.
    """

    def __init__(self, model: LanguageModel, system: str | None = None, **options: Any):
        self.model, self.system = model, system
        kv = options.pop("kv", "dense")
        self.for_template = {name: options.pop(name) for name in TEMPLATE_OPTIONS if name in options}
        self.variables = template_variables(**self.for_template)
        if model.tokenizer is not None:
            check_variables(model.tokenizer, self.variables)
        of_memory = memory_options(kv, options)
        self.options = {name: value for name, value in options.items() if name not in of_memory}
        self.plan = model.memory_plan(kv, **of_memory)
        self.reset()

    def reset(self) -> None:
        self.messages: list[Mapping[str, str]] = [{"role": "system", "content": self.system}] if self.system else []
        self.forgotten = 0
        # (tokens, memory that holds them) after the last question and after its answer. A template may rewrite an
        # answer once it is history (leave out thoughts, say); then the older of the two still serves.
        self._known: list[tuple[list[int], Memory]] = []

    def answer(self, text: str) -> Iterator[Event]:
        """Events of the answer to a message. Both join the conversation, an interrupted answer as far as it came.

        Raises ValueError where the message alone is too long for the model.
        """
        self._ask(text)
        assert self.model.tokenizer is not None
        ids = prompt_ids(self.model, self.messages, self.variables)
        known, self._known = self._known, []  # what an interruption leaves half done is not worth keeping
        said, shown = "", False
        try:
            held, memory = self._longest(known, ids)
            memory.check_prompt(len(ids) - len(held))
            self._encode(ids[len(held) : -1], memory)
            self._known = [(ids[:-1], memory)]
            memory, answered = memory.fork(), list(ids)
            for event in generate(self.model, ids[-1:], memory=memory, context=ids[:-1], **self.options):
                if isinstance(event, Commit):
                    answered += event.ids
                    event = event if shown else self._begun(event, answered[len(ids) :])
                    shown = shown or bool(event.text)
                    said += for_history(event, self.model.tokenizer)
                yield event
            self._known.append((answered[: memory.length], memory))
        finally:
            if said:
                self.messages.append({"role": "assistant", "content": said})
            else:
                self.messages.pop()  # a question without an answer would upset most templates

    def save(self, path: Path) -> None:
        """Write what was said and the memory that the next question goes on from, in one file, as one step."""
        asked = [*self.messages, {"role": "user", "content": "?"}]
        held, memory = self._longest(self._known, prompt_ids(self.model, asked, self.variables))
        about = {"system": self.system, "messages": self.messages, "forgotten": self.forgotten, "held": held}
        memory.save(path, {SAVED: json.dumps(about)})

    def restore(self, path: Path) -> None:
        """Go on from what `save` wrote. Raises CheckpointError for another file, and one of another model or policy;
        ValueError where the instructions it began with are not those of this conversation."""
        from sparing.checkpoint.safetensors import SafetensorsFile
        from sparing.memory.snapshot import load_memory

        text = SafetensorsFile(path).metadata.get(SAVED)
        found = _conversation(path, text)
        if self.system not in (None, found["system"]):
            raise ValueError(
                f"{path}: the conversation began with other instructions: leave them out, or use another file"
            )
        memory = self.plan.memory()
        load_memory(path, memory)
        if memory.length != len(found["held"]):
            raise CheckpointError(
                f"{path}: the memory holds {memory.length} tokens, the conversation {len(found['held'])}"
            )
        self.system, self.messages, self.forgotten = found["system"], found["messages"], found["forgotten"]
        self._known = [(found["held"], memory)] if found["held"] else []

    def _begun(self, event: Commit, answer: list[int]) -> Commit:
        """The beginning of an answer, without the blank of a word that nothing precedes in the answer itself.

        answer: its ids so far, some of whose text may have waited for what follows.
        """
        assert self.model.tokenizer is not None
        alone = self.model.tokenizer.decode(answer)
        blanks, wanted = (len(text) - len(text.lstrip(" ")) for text in (event.text, alone))
        extra = max(blanks - wanted, 0)
        marks = [(max(offset - extra, 0), mark) for offset, mark in event.marks]
        return replace(event, text=event.text[extra:], marks=marks)

    def _ask(self, text: str) -> None:
        """Add a message; leave out the oldest exchanges until it fits the context with room for an answer."""
        messages = [*self.messages, {"role": "user", "content": text}]
        context = self.model.config.max_position_embeddings
        limit = self.options.get("max_new_tokens")
        if limit is None:
            limit = parse_generation_config(self.model.generation_config).limit(0)
        room = max(self.model.config.canvas_length or 1, min(limit, context // 4))
        first = 1 if self.system else 0
        while len(prompt_ids(self.model, messages, self.variables)) + room > context and len(messages) > first + 1:
            del messages[first : first + 2]
            self.forgotten += 1
        length = len(prompt_ids(self.model, messages, self.variables))
        if length >= context:
            raise ValueError(f"the message makes {length} tokens, the model's context is {context}: shorten it")
        self.messages = messages

    def _longest(self, known: list[tuple[list[int], Memory]], ids: list[int]) -> tuple[list[int], Memory]:
        """The memory that holds the longest beginning of ids, never all of them: the last token asks for the next."""
        fitting = [(held, memory) for held, memory in known if len(held) < len(ids) and ids[: len(held)] == held]
        return max(fitting, key=lambda pair: len(pair[0]), default=([], self.plan.memory()))

    def _encode(self, ids: list[int], memory: Memory) -> None:
        """Bring ids into the memory: a prompt without its last token."""
        if ids:
            read(self.model, [unspoken(self.model.check_tokens(ids, memory), memory)], later=1)


def _conversation(path: Path, text: str | None) -> dict[str, Any]:
    """What was saved, checked. Raises CheckpointError."""
    try:
        found = json.loads(text or "")
        messages = [{"role": str(m["role"]), "content": str(m["content"])} for m in found["messages"]]
        if messages != found["messages"] or not isinstance(found["system"], str | None):
            raise TypeError
        held = [whole("a token", token, 0) for token in found["held"]]
        return {
            "system": found["system"],
            "messages": messages,
            "held": held,
            "forgotten": whole("forgotten", found["forgotten"], 0),
        }
    except (KeyError, ValueError, TypeError, RecursionError):
        raise CheckpointError(f"{path}: not a conversation saved by 'sparing chat --session'") from None
