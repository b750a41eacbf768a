"""Rendering the chat template of a checkpoint: messages in, the text that the model was trained to see out."""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateSyntaxError, UndefinedError, meta
from jinja2.exceptions import SecurityError

from sparing.checkpoint.chat.allowance import MAX_SIZE, TooMuch, allowance, spend, written
from sparing.checkpoint.chat.messages import END_OF_TEXT, flattened, fully_shown, open_ended, plain, prepared
from sparing.checkpoint.chat.sandbox import RejectedByTemplate, sandbox
from sparing.errors import CheckpointError

__all__ = ["ChatTemplate"]

MAX_SOURCE = 500_000  # characters; the longest template in use has some thirty thousand
NUMBER = re.compile(r"\d[\da-fA-F_xX]*")
MAX_DIGITS = 4300  # that Python converts; jinja2 takes 300 bytes a digit to find out


class ChatTemplate:
    """One template, compiled at its first use.

    source: the template's text. where: file and key, for error messages. tool_use: the template for conversations
    with tools, where the checkpoint has two.
    """

    def __init__(self, source: str, where: str = "chat template", tool_use: str | None = None) -> None:
        self.source = source
        self.where = where
        self.tool_use = tool_use
        self._reads: dict[str, frozenset[str]] = {}

    def render(
        self, *, messages: Any, tools: Any = None, continue_final_message: bool | str = False, **variables: Any
    ) -> str:
        """The text of a conversation.

        Everything passed must be made of text, numbers, lists and mappings. continue_final_message: leave the last
        message open at the end of its content (or of the field named), for the model to go on with.
        A template that cannot read content in parts, a message without content or arguments of a tool call as JSON
        text gets them as one text, as an empty one, and as a mapping.
        Raises CheckpointError for a template with a mistake, one that tries to escape and one that does not end;
        ValueError where the template itself rejects the messages, or a value is of another type.
        """
        variables = {"tools": tools, "documents": None, **variables}
        visible = {name: plain(value, name) for name, value in variables.items()}
        given = prepared(messages)
        if field := "content" if continue_final_message is True else continue_final_message:
            if visible.get("add_generation_prompt"):
                raise ValueError("continue_final_message and add_generation_prompt exclude each other: leave out one")
            given = open_ended(given, field)
        template = self._for_tools if tools is not None and self.tool_use is not None else self._for_text
        text = self._readable(template, given, visible)
        return self._cut(text, given, field) if field else text

    def reads(self, tools: bool = False) -> frozenset[str]:
        """Names of the variables that the template asks for. tools: of the one for conversations with tools."""
        source = self.tool_use if tools and self.tool_use is not None else self.source
        if source not in self._reads:
            with self._blame():
                self._reads[source] = frozenset(meta.find_undeclared_variables(sandbox().parse(source)))
        return self._reads[source]

    def _readable(self, template: Template, messages: list[dict[str, Any]], visible: Mapping[str, Any]) -> str:
        """The conversation as it is given, or flattened where the template cannot show all of it like that."""
        flat = flattened(messages)
        try:
            text = self._render(template, messages, visible)
        except ValueError:
            if flat == messages:
                raise
            return self._render(template, flat, visible)
        if not any(isinstance(message.get("content"), list | tuple) for message in messages):
            return text
        try:
            expected = self._render(template, flat, visible)
        except ValueError:
            return text
        return text if fully_shown(messages, text, expected) else expected

    def _render(self, template: Template, messages: list[dict[str, Any]], visible: Mapping[str, Any]) -> str:
        context = {**visible, "messages": messages}
        size = written(list(context.values()), MAX_SIZE) + len(self.source)
        with self._blame(), allowance(size):
            parts = []
            for part in template.generate(context):
                spend(len(part))
                parts.append(part)
            return "".join(parts)

    def _cut(self, text: str, messages: Sequence[Mapping[str, Any]], field: str) -> str:
        """What comes before the mark that `open_ended` left."""
        at = text.rfind(END_OF_TEXT.strip())
        if at < 0:
            raise ValueError(
                f"continue_final_message: the chat template does not show {field!r} of the last message"
                f" ({messages[-1].get('role')}), so that there is nothing to go on with"
            )
        return text[:at] if text[at:].startswith(END_OF_TEXT) else text[:at].rstrip()

    @cached_property
    def _for_text(self) -> Template:
        return self._compile(self.source)

    @cached_property
    def _for_tools(self) -> Template:
        return self._compile(self.tool_use or self.source)

    def _compile(self, source: str) -> Template:
        if len(source) > MAX_SOURCE:
            raise CheckpointError(f"{self.where}: {len(source)} characters, at most {MAX_SOURCE} are accepted")
        if any(len(number) > MAX_DIGITS for number in NUMBER.findall(source)):
            raise CheckpointError(f"{self.where}: has a number of more than {MAX_DIGITS} digits")
        with self._blame():
            try:
                return sandbox().from_string(source)
            except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
                raise CheckpointError(f"{self.where}: cannot be compiled: {type(error).__name__}") from error

    @contextmanager
    def _blame(self) -> Iterator[None]:
        """Says whose mistake an error is, and where."""
        try:
            yield
        except RejectedByTemplate as error:
            raise ValueError(f"the chat template rejects this conversation: {_reason(error, 1000)}") from error
        except CheckpointError:
            raise
        except TemplateSyntaxError as error:
            raise CheckpointError(f"{self.where}: line {error.lineno}: {_reason(error)}") from error
        except SecurityError as error:
            raise CheckpointError(f"{self.where}: refused, it reaches out of its box: {_reason(error)}") from error
        except TooMuch as error:
            raise CheckpointError(f"{self.where}: refused, {error}") from error
        except UndefinedError as error:
            raise CheckpointError(f"{self.where}: asks for something that is not there: {_reason(error)}") from error
        except Exception as error:  # whatever the operations it uses raise
            raise CheckpointError(f"{self.where}: fails with {type(error).__name__}: {_reason(error)}") from error


def _reason(error: Exception, most: int = 200) -> str:
    message = error.message if isinstance(error, TemplateSyntaxError) else str(error)
    return ((message or "").splitlines() or ["no reason given"])[0][:most]
