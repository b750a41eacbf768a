"""Rendering the chat template of a checkpoint: messages in, the text that the model was trained to see out."""

from collections.abc import Mapping
from functools import cached_property
from typing import Any

from jinja2 import Template, TemplateSyntaxError, UndefinedError
from jinja2.exceptions import SecurityError

from sparing.checkpoint.chat_sandbox import RejectedByTemplate, TooMuch, allowance, sandbox
from sparing.errors import CheckpointError

__all__ = ["ChatTemplate"]

MAX_SOURCE = 500_000  # characters; the longest template in use has some thirty thousand


class ChatTemplate:
    """One template, compiled at its first use.

    source: the template's text. where: file and key, for error messages. tool_use: the template for conversations
    with tools, where the checkpoint has two.
    """

    def __init__(self, source: str, where: str = "chat template", tool_use: str | None = None) -> None:
        self.source = source
        self.where = where
        self.tool_use = tool_use

    def render(self, *, messages: Any, tools: Any = None, **variables: Any) -> str:
        """The text of a conversation.

        Everything passed must be made of text, numbers, lists and mappings.
        Raises CheckpointError for a template with a mistake, one that tries to escape and one that does not end;
        ValueError where the template itself rejects the messages, or a value is of another type.
        """
        template = self._for_tools if tools and self.tool_use is not None else self._for_text
        visible = {"messages": messages, "tools": tools, "documents": None, **variables}
        plain = {name: _plain(value, name) for name, value in visible.items()}
        try:
            with allowance() as spend:
                parts = []
                for part in template.generate(**plain):
                    spend(len(part))
                    parts.append(part)
                return "".join(parts)
        except RejectedByTemplate as error:
            raise ValueError(f"the chat template rejects this conversation: {error}") from error
        except SecurityError as error:
            raise CheckpointError(f"{self.where}: refused, it reaches out of its box: {error}") from error
        except TooMuch as error:
            raise CheckpointError(f"{self.where}: refused, {error}") from error
        except UndefinedError as error:
            raise CheckpointError(f"{self.where}: asks for something that is not there: {error}") from error
        except Exception as error:  # whatever the operations it uses raise
            reason = (str(error).splitlines() or ["no reason given"])[0][:200]
            raise CheckpointError(f"{self.where}: fails with {type(error).__name__}: {reason}") from error

    @cached_property
    def _for_text(self) -> Template:
        return self._compile(self.source)

    @cached_property
    def _for_tools(self) -> Template:
        return self._compile(self.tool_use or self.source)

    def _compile(self, source: str) -> Template:
        if len(source) > MAX_SOURCE:
            raise CheckpointError(f"{self.where}: {len(source)} characters, at most {MAX_SOURCE} are accepted")
        try:
            return sandbox().from_string(source)
        except TemplateSyntaxError as error:
            raise CheckpointError(f"{self.where}: line {error.lineno}: {error.message}") from error
        except (RecursionError, MemoryError, SyntaxError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{self.where}: cannot be compiled: {type(error).__name__}") from error


def _plain(value: Any, name: str) -> Any:
    """A copy made of JSON types only: methods of richer objects would be doors out of the box."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key, name): _plain(item, name) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, name) for item in value]
    raise ValueError(f"{name}: a chat template takes text, numbers, lists and mappings, not {type(value).__name__}")
