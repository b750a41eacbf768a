"""Text to token ids and back, whatever the checkpoint's tokenizer is."""

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from sparing.checkpoint.chat_template import ChatTemplate
from sparing.errors import CheckpointError

__all__ = ["TextStream", "Tokenizer", "read_tokenizer"]

UNFINISHED = "\ufffd"
MAX_HELD = 64


class Tokenizer:
    """A tokenizer with its special tokens and its chat template.

    bos_id, pad_id: int or None. eos_ids: every id that ends a text. special_ids: ids that decode() leaves out.
    chat_template: None where the checkpoint has none. special_tokens: texts by name, as "bos_token", for the template.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        chat_template: ChatTemplate | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self.eos_ids = tuple(eos_ids)
        self.pad_id = pad_id
        self.chat_template = chat_template
        self.special_tokens = dict(special_tokens or {})
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)

    @property
    def vocab_size(self) -> int:
        return self.backend.get_vocab_size(with_added_tokens=True)

    def token_to_id(self, token: str) -> int | None:
        return self.backend.token_to_id(token)

    def id_to_token(self, token_id: int) -> str | None:
        return self.backend.id_to_token(token_id)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of a text; with special tokens as the checkpoint adds them, but never a second beginning."""
        ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        return ids[1:] if self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id] else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 come out as U+FFFD."""
        return self.backend.decode(list(ids), skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> str:
        """The conversation as the model was trained to see it.

        messages: mappings with `role` and `content`. tools: JSON schemas. variables: what else the template reads,
        such as enable_thinking.
        Raises CheckpointError where there is no template or it is broken or hostile, ValueError where it rejects
        the messages.
        """
        if self.chat_template is None:
            raise CheckpointError("this checkpoint has no chat template; give the prompt as plain text")
        return self.chat_template.render(
            messages=messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            **self.special_tokens,
            **variables,
        )

    def encode_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        **variables: Any,
    ) -> list[int]:
        """Token ids of a rendered conversation; the template alone decides about the beginning token."""
        text = self.apply_chat_template(messages, tools, add_generation_prompt, **variables)
        return self.encode(text, add_special_tokens=False)


class TextStream:
    """Decodes ids as they arrive, without ever showing half a character.

    The pieces that push() and flush() return, joined, are the text that decode() gives for all ids.
    """

    def __init__(self, tokenizer: Tokenizer, skip_special_tokens: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._before: list[int] = []  # shown already, but needed: how a token reads depends on the one before it
        self._held: list[int] = []

    def push(self, ids: Iterable[int]) -> str:
        """Takes more ids and returns the text that is now certain, possibly none."""
        shown = ""
        for token_id in ids:
            self._held.append(token_id)
            shown += self._advance(force=len(self._held) >= MAX_HELD)
        return shown

    def flush(self) -> str:
        """The rest, unfinished characters as U+FFFD."""
        return self._advance(force=True)

    def _advance(self, force: bool) -> str:
        before = self._tokenizer.decode(self._before, self._skip)
        text = self._tokenizer.decode(self._before + self._held, self._skip)
        if text.endswith(UNFINISHED) and not force:
            return ""
        # Skipped tokens must not push out of sight the token that the next one depends on.
        if text != before:
            self._before, self._held = self._held, []
        elif not force:
            return ""
        return text[len(before) :]


def read_tokenizer(folder: Path, eos_ids: Sequence[int] = ()) -> Tokenizer:
    """The tokenizer of a folder: tokenizer.json, tokenizer_config.json, special_tokens_map.json, chat template.

    eos_ids: ends of text that the model's configuration states; the tokenizer's own one is used where it has none.
    Raises CheckpointError for a damaged file or a special token that is not in the vocabulary.
    """
    try:
        backend = Backend.from_file(str(folder / "tokenizer.json"))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{folder / 'tokenizer.json'}: cannot be read: {error}") from error
    # A checkpoint may have been saved with the truncation and padding of its training.
    backend.no_truncation()
    backend.no_padding()
    config = _read_object(folder / "special_tokens_map.json") | _read_object(folder / "tokenizer_config.json")
    special = {}
    for key, value in config.items():
        text = value.get("content") if isinstance(value, dict) else value
        if key.endswith("_token") and isinstance(text, str):
            special[key] = text
    ids: dict[str, int | None] = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = special.get(name)
        ids[name] = None if token is None else backend.token_to_id(token)
        if token is not None and ids[name] is None:
            raise CheckpointError(f"{folder / 'tokenizer_config.json'}: {name} {token!r} is not in tokenizer.json")
    eos = ids["eos_token"]
    return Tokenizer(
        backend,
        bos_id=ids["bos_token"],
        eos_ids=eos_ids or (() if eos is None else (eos,)),
        pad_id=ids["pad_token"],
        chat_template=_read_template(folder, config),
        special_tokens=special,
    )


def _read_template(folder: Path, config: Mapping[str, Any]) -> ChatTemplate | None:
    """chat_template.jinja, else the template in tokenizer_config.json; further named ones beside it."""
    named: dict[str, tuple[str, str]] = {}
    stored = config.get("chat_template")
    where = f"{folder / 'tokenizer_config.json'}: chat_template"
    if isinstance(stored, str):
        named["default"] = (stored, where)
    elif isinstance(stored, list):
        for entry in stored:
            if not isinstance(entry, dict) or not all(isinstance(entry.get(k), str) for k in ("name", "template")):
                raise CheckpointError(f"{where} must be a text, or a list of objects with name and template")
            named[entry["name"]] = (entry["template"], where)
    elif stored is not None:
        raise CheckpointError(f"{where} must be a text, or a list of objects with name and template")
    files = {file.stem: file for file in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    for name, file in files.items():
        try:
            named[name] = (file.read_text(encoding="utf-8"), str(file))
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file}: cannot be read as UTF-8 text: {error}") from error
    if "default" not in named:
        return None
    return ChatTemplate(*named["default"], tool_use=named.get("tool_use", (None,))[0])


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: not valid JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: must be a JSON object, is {type(value).__name__}")
    return value
