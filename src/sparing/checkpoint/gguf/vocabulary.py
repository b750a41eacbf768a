"""What a GGUF file says of its tokens: texts, types, the special ones, and which of them end a text. Checked here.

Source: llama.cpp's llama-vocab, where a key is missing, and for the texts by which it knows ends of a text.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sparing.errors import CheckpointError, shown

__all__ = [
    "CONTROL",
    "NORMAL",
    "UNKNOWN",
    "USER_DEFINED",
    "end_ids",
    "suppressed_ids",
    "texts",
    "token_id",
    "token_types",
]

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4
SENTENCEPIECE = {"bos": 1, "eos": 2, "unknown": 0}  # of model `llama`, where the file does not say

# keys of tokens that end a text; fill-in-the-middle ends where padding, another repository or another file begins
END_KEYS = ("eos", "eot", "eom", "fim_pad", "fim_rep", "fim_sep")
# texts of tokens that do; the file names only one of them as its end
TURN_ENDS = (
    "<|endoftext|>",
    "<|end_of_text|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<|eom_id|>",
    "<turn|>",
    "<|tool_response>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<|calls|>",
    "<|flush|>",
    "<end_of_turn>",
    "<end_of_utterance>",
    "<EOT>",
    "_<EOT>",
    "[EOT]",
    "[EOS]",
    "<eos>",
    "</s>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
    "[e~[",
)


def texts(path: Path, metadata: Mapping[str, Any], key: str) -> list[str]:
    """A list of texts of the tokenizer. Raises CheckpointError for anything else."""
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not value or not all(type(item) is str for item in value):
        raise CheckpointError(f"{path}: tokenizer.ggml.{key} is not a list of texts")
    return value


def token_types(path: Path, metadata: Mapping[str, Any], count: int) -> list[int]:
    """The type of every token; all are normal where the file has none. Raises CheckpointError unless they are ints."""
    types = metadata.get("tokenizer.ggml.token_type")
    if types is None:
        return [NORMAL] * count
    if not isinstance(types, list) or len(types) != count or not all(type(item) is int for item in types):
        raise CheckpointError(f"{path}: {count} tokens do not go with the types given for them")
    return types


def token_id(path: Path, metadata: Mapping[str, Any], name: str, count: int) -> int | None:
    """The id of a special token, as bos or eos; None where there is none, which a file may also spell as -1.

    Raises CheckpointError for what is not an id, and for one beyond the tokens that something would be made of.
    """
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is None and metadata.get("tokenizer.ggml.model") == "llama":
        value = SENTENCEPIECE.get(name)
        return value if value is not None and value < count else None
    if value is None or (type(value) is int and value in (-1, 2**32 - 1)):
        return None
    if type(value) is int and value >= count and name not in ("bos", "eos", "unknown"):
        return None  # no token is ever read as it
    if type(value) is not int or not 0 <= value < count:
        raise CheckpointError(f"{path}: tokenizer.ggml.{name}_token_id {shown(value)} is not one of {count} tokens")
    return value


def end_ids(path: Path, metadata: Mapping[str, Any]) -> list[int]:
    """Ids that end a text: those the file names, then those known by their text.

    Raises CheckpointError where tokens, types or ids are none.
    """
    if "tokenizer.ggml.tokens" not in metadata:
        return []
    tokens = texts(path, metadata, "tokens")
    types = token_types(path, metadata, len(tokens))
    special = {t: i for i, (t, kind) in enumerate(zip(tokens, types, strict=True)) if kind in (CONTROL, USER_DEFINED)}
    found = {text: special[text] for text in TURN_ENDS if text in special}
    if {"<|return|>", "<|call|>"} <= found.keys() or {"<|calls|>", "<|flush|>"} <= found.keys():
        found.pop("<|end|>", None)  # of a message there, after which the next one follows
    if "<|tool_response>" in found:
        found.pop("</s>", None)  # Gemma 4 has it as a tag of HTML
    named = [token_id(path, metadata, name, len(tokens)) for name in END_KEYS]
    return list(dict.fromkeys(i for i in (*named, *found.values()) if i is not None))


def suppressed_ids(path: Path, metadata: Mapping[str, Any], count: int) -> list[int]:
    """Ids that the file wants never chosen, of those that there are. Raises CheckpointError for what is not an id."""
    value = metadata.get("tokenizer.ggml.suppress_tokens", [])
    if not isinstance(value, list) or not all(type(item) is int for item in value):
        raise CheckpointError(f"{path}: tokenizer.ggml.suppress_tokens is {shown(value)}, must be a list of ids")
    return [i for i in value if 0 <= i < count]
