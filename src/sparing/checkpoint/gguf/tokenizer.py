"""The tokenizer stored in a GGUF file, rebuilt for the `tokenizers` library.

Three kinds: `gpt2`, byte-level BPE whose text is cut into words by the pattern its file names; `llama`, SentencePiece
BPE that knows scores instead of merges and spells unknown characters as bytes; `gemma4`, the same with merges.
"""

from bisect import bisect_left
from collections import Counter
from itertools import islice
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from sparing.checkpoint.chat.template import ChatTemplate
from sparing.checkpoint.gguf.vocabulary import CONTROL, NORMAL, UNKNOWN, USER_DEFINED, texts, token_id, token_types
from sparing.checkpoint.gguf.word_patterns import WHOLE_WORDS, WITH_BEGINNING, WORDS
from sparing.checkpoint.special_tokens import add_ends
from sparing.checkpoint.tokenizer import Tokenizer, backend_errors
from sparing.errors import CheckpointError, shown

__all__ = ["build_tokenizer"]

SPACE = "\u2581"
KINDS = ("gpt2", "llama", "gemma4")
COPY = 0  # a type of our own: of a token that is there twice
MOST_CUT = 50  # characters looked at for one of a token, in search of its parts; vocabularies in use need under 10


def build_tokenizer(path: Path, metadata: dict[str, Any], eos_ids: tuple[int, ...]) -> Tokenizer:
    """The tokenizer a GGUF file describes, with its special tokens and chat template.

    Raises CheckpointError for a kind or a word pattern that is not known, and for lists that do not fit together.
    """
    kind, words = metadata.get("tokenizer.ggml.model"), metadata.get("tokenizer.ggml.pre", "default")
    if kind not in KINDS:
        raise CheckpointError(f"{path}: tokenizer model {shown(kind)} is not supported; supported: {', '.join(KINDS)}")
    stored = texts(path, metadata, "tokens")
    types = token_types(path, metadata, len(stored))
    ids = {name: token_id(path, metadata, name, len(stored)) for name in ("bos", "eos", "padding", "unknown")}
    tokens, marks, made = _distinct(stored, types)
    if kind == "gpt2":
        backend = _byte_level(path, metadata, tokens, words)
    else:
        backend = _sentencepiece(path, metadata, tokens, made, ids["unknown"])
    if marks:
        unmark = [decoders.Replace(mark, "") for mark in marks]
        backend.decoder = decoders.Sequence([*unmark, backend.decoder])  # pyright: ignore[reportAttributeAccessIssue]
    typed = list(zip(tokens, types, strict=True))
    special = [AddedToken(t, normalized=False, special=True) for t, k in typed if k in (CONTROL, UNKNOWN)]
    with backend_errors(f"{path}: its special tokens do not fit its tokenizer"):
        backend.add_special_tokens(special)
        backend.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in typed if k == USER_DEFINED])
        begins = _flag(path, metadata, "add_bos_token", kind != "gpt2" or words in WITH_BEGINNING)
        ends = _flag(path, metadata, "add_eos_token", False)
        bos, eos = (None if (i := ids[name]) is None else tokens[i] for name in ("bos", "eos"))
        add_ends(backend, bos if begins else None, eos if ends else None)
    spelled = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    return Tokenizer(
        backend,
        bos_id=ids["bos"],
        eos_id=ids["eos"],
        eos_ids=eos_ids,
        pad_id=ids["padding"],
        chat_template=_template(path, metadata),
        special_tokens={spelled[name]: stored[i] for name, i in ids.items() if i is not None},
    )


def _distinct(tokens: list[str], types: list[int]) -> tuple[list[str], list[str], list[int]]:
    """Tokens of which no two are equal, the characters that number those that were, and types that say which.

    A text has one id, the last of its tokens, as in llama.cpp; the others are ids, too, that a model may give.
    """
    left = {token: count - 1 for token, count in Counter(tokens).items() if count > 1}
    if not left:
        return tokens, [], types
    used = set().union(*map(set, tokens))
    digits = list(islice((c for c in map(chr, range(0xE000, 0x110000)) if c not in used), 2))
    numbers = {ord("0"): digits[0], ord("1"): digits[1]}
    tokens, types = list(tokens), list(types)
    for i, token in enumerate(tokens):
        if number := left.get(token, 0):
            left[token] = number - 1
            tokens[i], types[i] = token + f"{number:b}".translate(numbers), COPY
    return tokens, digits, types


def _template(path: Path, metadata: dict[str, Any]) -> ChatTemplate | None:
    """The chat template, and beside it the one for conversations with tools."""
    key = "tokenizer.chat_template"
    named = {name: metadata.get(name) for name in (key, f"{key}.default", f"{key}.tool_use")}
    if wrong := [name for name, value in named.items() if value is not None and not isinstance(value, str)]:
        raise CheckpointError(f"{path}: {wrong[0]} is not a text")
    source = named[key] if named[key] is not None else named[f"{key}.default"]
    return None if source is None else ChatTemplate(source, f"{path.name}: {key}", tool_use=named[f"{key}.tool_use"])


def _flag(path: Path, metadata: dict[str, Any], key: str, default: bool) -> bool:
    value = metadata.get(f"tokenizer.ggml.{key}", default)
    if not isinstance(value, bool):
        raise CheckpointError(f"{path}: tokenizer.ggml.{key} is {shown(value)}, must be true or false")
    return value


def _byte_level(path: Path, metadata: dict[str, Any], tokens: list[str], words: Any) -> Backend:
    if not isinstance(words, str) or words not in WORDS:
        raise CheckpointError(
            f"{path}: word pattern {shown(words)} (tokenizer.ggml.pre) is not known; known: {', '.join(WORDS)}"
        )
    backend = _bpe(path, tokens, _merges(path, metadata), ignore_merges=words in WHOLE_WORDS)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in WORDS[words]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _sentencepiece(
    path: Path, metadata: dict[str, Any], tokens: list[str], types: list[int], unknown: int | None
) -> Backend:
    has_merges = "tokenizer.ggml.merges" in metadata
    merges = _merges(path, metadata) if has_merges else _merges_by_score(path, metadata, tokens, types)
    unknown_token = None if unknown is None else tokens[unknown]
    backend = _bpe(path, tokens, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown_token)
    prefix = metadata["tokenizer.ggml.model"] == "llama" and _flag(path, metadata, "add_space_prefix", True)
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces  # pyright: ignore[reportAttributeAccessIssue]
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _bpe(path: Path, tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Backend:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    with backend_errors(f"{path}: tokens and merges do not form a tokenizer"):
        return Backend(BPE(vocab=vocabulary, merges=merges, **options))


def _merges(path: Path, metadata: dict[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for line in texts(path, metadata, "merges"):
        left, space, right = line.partition(" ")
        if not (left and space and right):
            raise CheckpointError(f"{path}: merge {shown(line)} is not two pieces separated by a space")
        merges.append((left, right))
    return merges


def _merges_by_score(
    path: Path, metadata: dict[str, Any], tokens: list[str], types: list[int]
) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose union scores highest: every way to split a token is a merge."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not isinstance(scores[0], float | int):
        raise CheckpointError(f"{path}: {len(tokens)} tokens but neither merges nor as many scores")
    known = {token for token, kind in zip(tokens, types, strict=True) if kind != COPY}
    lengths = sorted({len(token) for token in known})
    ranked = sorted((i for i in range(len(tokens)) if types[i] == NORMAL), key=lambda i: (-scores[i], i))
    # Trying each cut of each token is quadratic in its length: a hostile vocabulary runs out of a budget of steps.
    left = MOST_CUT * sum(map(len, tokens)) + 1_000_000
    merges: list[tuple[str, str]] = []
    for token in (tokens[i] for i in ranked):
        cuts = lengths[: bisect_left(lengths, len(token))]
        left -= len(cuts) * len(token)
        if left < 0:
            raise CheckpointError(f"{path}: the tokens can be made of each other in too many ways for a vocabulary")
        merges += [(token[:cut], token[cut:]) for cut in cuts if token[:cut] in known and token[cut:] in known]
    return merges
