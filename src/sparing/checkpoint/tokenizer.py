"""Text to token ids and back, whatever the checkpoint's tokenizer is."""

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from sparing.checkpoint.chat.template import ChatTemplate
from sparing.checkpoint.json_files import read_object
from sparing.checkpoint.special_tokens import add_ends, add_special_tokens
from sparing.checkpoint.vocabulary_files import class_defaults, read_vocabulary
from sparing.errors import CheckpointError, shown

__all__ = ["Tokenizer", "backend_errors", "read_tokenizer"]


class Tokenizer:
    """A tokenizer with its special tokens and its chat template.

    bos_id, pad_id, eos_id: int or None; eos_id is the end of text that the tokenizer names itself. eos_ids: ends of
    text that the model's settings state, else eos_id. special_ids: ids that decode() leaves out.
    chat_template: None where the checkpoint has none. special_tokens: texts by name, as "bos_token", for the template.
    """

    def __init__(
        self,
        backend: Backend,
        *,
        bos_id: int | None = None,
        eos_id: int | None = None,
        eos_ids: Sequence[int] = (),
        pad_id: int | None = None,
        chat_template: ChatTemplate | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        self.backend = backend
        self.bos_id = bos_id
        self.eos_id = eos_id
        self.eos_ids = tuple(eos_ids) or (() if eos_id is None else (eos_id,))
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
        """Token ids of a text; with special tokens as the checkpoint adds them, but never a second beginning.

        Raises ValueError for what is not Unicode text, CheckpointError where the tokenizer is damaged.
        """
        try:
            with backend_errors("the tokenizer cannot encode this text"):
                ids = self.backend.encode(text, add_special_tokens=add_special_tokens).ids
        except TypeError as error:
            what = "is not Unicode text" if isinstance(text, str) else f"is {type(text).__name__}, not a text"
            raise ValueError(f"{shown(text)} {what}: give a str without surrogates") from error
        return ids[1:] if self.bos_id is not None and ids[:2] == [self.bos_id, self.bos_id] else ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """The text of token ids; bytes that are no UTF-8 come out as U+FFFD, ids that the tokenizer lacks as nothing.

        Raises ValueError for what is not an id, CheckpointError where the tokenizer is damaged.
        """
        ids = list(ids)
        try:
            with backend_errors("the tokenizer cannot decode these ids"):
                return self.backend.decode(ids, skip_special_tokens=skip_special_tokens)
        except (TypeError, OverflowError) as error:
            raise ValueError(f"ids {shown(ids)} are not token ids: give whole numbers from 0 on") from error

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
        given = {"messages": messages, "tools": tools, "add_generation_prompt": add_generation_prompt}
        return self.chat_template.render(**{**self.special_tokens, **variables, **given})

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


@contextmanager
def backend_errors(what: str) -> Iterator[None]:
    """Makes CheckpointErrors of what the Rust library raises: bare Exceptions, and panics, which are not even that."""
    try:
        yield
    except (CheckpointError, TypeError, OverflowError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{what}: {(str(error).splitlines() or [type(error).__name__])[0][:200]}") from error


def read_tokenizer(folder: Path, eos_ids: Sequence[int] = ()) -> Tokenizer:
    """The tokenizer of a folder: tokenizer.json or vocab.json and merges.txt, the files that add to it, chat template.

    eos_ids: ends of text that the model's configuration states; the tokenizer's own one is used where it has none.
    Raises CheckpointError for a damaged file, and for a vocabulary in a form that cannot be read.
    """
    path = folder / "tokenizer.json"
    config = read_object(folder / "tokenizer_config.json", missing={})
    if path.is_file():
        with backend_errors(f"{path}: cannot be read"):
            backend = Backend.from_file(str(path))
    else:
        config = class_defaults(folder, config) | config
        with backend_errors(f"{folder}: vocab.json and merges.txt do not form a tokenizer"):
            backend = read_vocabulary(folder, config)
    _check_template(path, backend)
    # A checkpoint may have been saved with the truncation and padding of its training.
    backend.no_truncation()
    backend.no_padding()
    with backend_errors(f"{folder}: its special tokens do not fit its tokenizer"):
        special = add_special_tokens(backend, folder, config)
    if not path.is_file():
        wanted = (special.get(f"{name}_token") if config.get(f"add_{name}_token") else None for name in ("bos", "eos"))
        add_ends(backend, *wanted)
    backend.encode_special_tokens = config.get("split_special_tokens") is True
    bos, eos, pad = (backend.token_to_id(special.get(f"{name}_token", "")) for name in ("bos", "eos", "pad"))
    template = _read_template(folder, config)
    return Tokenizer(
        backend, bos_id=bos, eos_id=eos, eos_ids=eos_ids, pad_id=pad, chat_template=template, special_tokens=special
    )


def _check_template(path: Path, backend: Backend) -> None:
    """Raises CheckpointError where the tokens put around a text are not those that the file describes (a panic)."""
    todo = [] if backend.post_processor is None else [json.loads(backend.post_processor.__getstate__())]
    while todo:
        step = todo.pop()
        todo += step.get("processors", [])
        known = step.get("special_tokens", {})
        for piece in step.get("single", ()):
            name = piece.get("SpecialToken", {}).get("id")
            if name is not None and name not in known:
                raise CheckpointError(f"{path}: post_processor puts {shown(name)}, which its special_tokens lack")
            if piece.get("Sequence", {}).get("id", "A") != "A":
                raise CheckpointError(f"{path}: post_processor puts a second text where there is one")


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
