"""Tokens that are named outside tokenizer.json: which they are, with which properties, and by what name.

Source: `from_pretrained` and `TokenizersBackend` of transformers 5.23, in whose order tokens get their ids.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, processors
from tokenizers import Tokenizer as Backend

from sparing.checkpoint.json_files import read_object
from sparing.errors import CheckpointError, shown

__all__ = ["add_ends", "add_special_tokens"]

NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
EXTRA, FORMER = "extra_special_tokens", "additional_special_tokens"  # one thing, newly and formerly spelled
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def add_special_tokens(backend: Backend, folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Adds the tokens that files beside tokenizer.json state; returns the texts of those that have a name.

    config: tokenizer_config.json. Where it has `added_tokens_decoder`, that is the list of added tokens. Older folders
    have special_tokens_map.json, which wins over the config, and added_tokens.json.
    A token that the vocabulary lacks gets the next free id, whatever id a file gives it.
    Raises CheckpointError for a token that is neither a text nor an object with one.
    """
    where = f"{folder / 'tokenizer_config.json'}: "
    stated: dict[int, AddedToken] = {}
    if config.get("added_tokens_decoder") is not None:
        named, further = _special_tokens(config, {}, where)
        for key, token in _object(config["added_tokens_decoder"], f"{where}added_tokens_decoder").items():
            stated[_id(key, f"{where}added_tokens_decoder")] = _token(token, f"{where}added_tokens_decoder")
    else:
        older = read_object(folder / "special_tokens_map.json", missing={})
        named, further = _special_tokens(config, older, f"{folder}: special tokens: ")
        special = {token.content for token in (*(named[key] for key in NAMED if key in named), *further)}
        file = folder / "added_tokens.json"
        for text, key in read_object(file, missing={}).items():
            stated[_id(key, f"{file}: {text}")] = AddedToken(
                text, normalized=text not in special, special=text in special
            )
        stated |= backend.get_added_tokens_decoder()
    tokens = [stated[key] for key in sorted(stated)]
    known = {token.content for token in (*backend.get_added_tokens_decoder().values(), *tokens)}
    for token in (*named.values(), *further):
        if token.content not in known and token not in tokens:
            tokens.append(token)
    by_name = {token.content for token in named.values()}
    for token in tokens:
        token.special = token.special or token.content in by_name
    backend.add_tokens(tokens)
    return {name: token.content for name, token in named.items()}


def add_ends(backend: Backend, beginning: str | None, end: str | None) -> None:
    """Lets encode() put a beginning and an end token, each a text of the vocabulary, or None."""
    ends = [{"id": name, "ids": [backend.token_to_id(text)], "tokens": [text]}
            for name, text in (("beginning", beginning), ("end", end)) if text is not None]  # fmt: skip
    if ends:
        single = [*(["beginning"] if beginning is not None else []), "$A", *(["end"] if end is not None else [])]
        # by names of our own: in a template's own language a token's text could mean something else
        backend.post_processor = processors.TemplateProcessing(single=single, special_tokens=ends)  # pyright: ignore[reportAttributeAccessIssue]


def _special_tokens(
    config: Mapping[str, Any], older: Mapping[str, Any], where: str
) -> tuple[dict[str, AddedToken], list[AddedToken]]:
    """Tokens by name, in the order in which they get ids, and those without a name; of two the later one counts.

    config: tokenizer_config.json. older: special_tokens_map.json, whose tokens are special without saying so.
    """
    values = dict(config)
    if not values.get(EXTRA) and FORMER in values:
        values[EXTRA] = values.pop(FORMER)
    specific = {key: values.pop(key) for key, value in config.items() if _is_own(key) and isinstance(value, str)}
    if isinstance(values.get(EXTRA), dict):
        specific |= values.pop(EXTRA)
    listed = values.get(EXTRA)
    values |= {key: _as_special(value) for key, value in older.items()}
    if isinstance(values.get(EXTRA), dict):
        specific |= values.pop(EXTRA)
    elif isinstance(listed, list) and isinstance(older.get(EXTRA), list):
        values[EXTRA] = listed + values[EXTRA]
    if EXTRA not in values:
        values[EXTRA] = values.get(FORMER)
    further = values[EXTRA] or []
    if not isinstance(further, list):
        raise CheckpointError(f"{where}{EXTRA} is {shown(further)}, expected a list of tokens or an object")
    usual = {key: values[key] for key in NAMED if values.get(key) is not None}
    own = {key: value for key, value in values.items() if _is_own(key) and isinstance(value, str | dict)}
    named = {key: _token(value, f"{where}{key}") for key, value in (usual | own | specific).items()}
    return named, [_token(value, f"{where}{EXTRA}") for value in further]


def _is_own(key: str) -> bool:
    """Whether a key is a model's own name for a special token."""
    return key.endswith("_token") and key not in NAMED


def _as_special(value: Any) -> Any:
    if isinstance(value, dict) and "content" in value:
        return {**value, "special": True}
    return [_as_special(item) for item in value] if isinstance(value, list) else value


def _token(value: Any, where: str) -> AddedToken:
    """A token from its text, which makes it special, or from an object with its text and properties."""
    if isinstance(value, str):
        return AddedToken(value, special=True)
    if not isinstance(value, dict) or not isinstance(value.get("content"), str):
        raise CheckpointError(f"{where}: {shown(value)} is not a token: expected its text, or an object with it")
    flags = {flag: value[flag] for flag in FLAGS if flag in value}
    if wrong := [flag for flag, state in flags.items() if not isinstance(state, bool)]:
        raise CheckpointError(f"{where}: {wrong[0]} of {shown(value['content'])} is not true or false")
    return AddedToken(value["content"], **flags)


def _object(value: Any, where: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where} must be an object of ids and tokens, is {type(value).__name__}")
    return value


def _id(value: Any, where: str) -> int:
    text = str(value)
    if isinstance(value, bool) or not isinstance(value, int | str) or not text.isascii() or not text.isdigit():
        raise CheckpointError(f"{where}: {shown(text)} is not a token id")
    return int(text[:20])
