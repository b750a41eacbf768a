"""The tokenizer stored in a GGUF file, rebuilt for the `tokenizers` library.

Three kinds: `gpt2`, byte-level BPE whose text is cut into words by the pattern its file names; `llama`, SentencePiece
BPE that knows scores instead of merges and spells unknown characters as bytes; `gemma4`, the same with merges.
"""

from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from sparing.checkpoint.chat_template import ChatTemplate
from sparing.checkpoint.tokenizer import Tokenizer
from sparing.errors import CheckpointError

__all__ = ["build_tokenizer"]

CONTROL, USER_DEFINED = 3, 4
SPACE = "\u2581"

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# the patterns applied one after the other, by the name the file gives them
WORDS = {
    "default": (r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
    "gpt-2": (GPT2,),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r"), (r"\p{N}", GPT2)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen"), (LLAMA3.replace("{1,3}", ""),)),
    **dict.fromkeys(("llama-bpe", "llama3", "llama-v3", "smaug-bpe", "falcon3", "pixtral"), (LLAMA3,)),
    "tekken": (TEKKEN,),
}
# vocabularies in which a word that is a token as a whole is never built from merges
WHOLE_WORDS = {"llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "tekken"}


def build_tokenizer(path: Path, metadata: dict[str, Any], eos_ids: tuple[int, ...]) -> Tokenizer:
    """The tokenizer a GGUF file describes, with its special tokens and chat template.

    Raises CheckpointError for a kind or a word pattern that is not known, and for lists that do not fit together.
    """
    tokens = _texts(path, metadata, "tokens")
    types = metadata.get("tokenizer.ggml.token_type") or [1] * len(tokens)
    if not isinstance(types, list) or len(types) != len(tokens):
        raise CheckpointError(f"{path}: {len(tokens)} tokens do not go with the types given for them")
    kind = metadata.get("tokenizer.ggml.model")
    if kind == "gpt2":
        backend = _byte_level(path, metadata, tokens)
    elif kind in ("llama", "gemma4"):
        backend = _sentencepiece(path, metadata, tokens, types)
    else:
        raise CheckpointError(f"{path}: tokenizer model {kind!a} is not supported; supported: gpt2, llama, gemma4")
    typed = list(zip(tokens, types, strict=True))
    backend.add_special_tokens([AddedToken(t, normalized=False, special=True) for t, k in typed if k == CONTROL])
    backend.add_tokens([AddedToken(t, normalized=False, special=False) for t, k in typed if k == USER_DEFINED])

    ids = {name: _id(path, metadata, name, len(tokens)) for name in ("bos", "eos", "padding", "unknown")}
    bos_is_usual = kind != "gpt2" or metadata.get("tokenizer.ggml.pre") == "tekken"
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", bos_is_usual)
    add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
    _add_ends(backend, tokens, ids["bos"] if add_bos else None, ids["eos"] if add_eos else None)

    source = metadata.get("tokenizer.chat_template")
    template = ChatTemplate(source, f"{path.name}: tokenizer.chat_template") if isinstance(source, str) else None
    spelled = {"bos": "bos_token", "eos": "eos_token", "padding": "pad_token", "unknown": "unk_token"}
    return Tokenizer(
        backend,
        bos_id=ids["bos"],
        eos_ids=eos_ids,
        pad_id=ids["padding"],
        chat_template=template,
        special_tokens={spelled[name]: tokens[i] for name, i in ids.items() if i is not None},
    )


def _byte_level(path: Path, metadata: dict[str, Any], tokens: list[str]) -> Backend:
    words = metadata.get("tokenizer.ggml.pre", "default")
    if not isinstance(words, str) or words not in WORDS:
        raise CheckpointError(
            f"{path}: word pattern {words!a} (tokenizer.ggml.pre) is not known; known: {', '.join(WORDS)}"
        )
    backend = _bpe(path, tokens, _merges(path, metadata), ignore_merges=words in WHOLE_WORDS)
    splits = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in WORDS[words]]
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*splits, byte_level])  # pyright: ignore[reportAttributeAccessIssue]
    backend.decoder = decoders.ByteLevel()  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _sentencepiece(path: Path, metadata: dict[str, Any], tokens: list[str], types: list[int]) -> Backend:
    has_merges = "tokenizer.ggml.merges" in metadata
    merges = _merges(path, metadata) if has_merges else _merges_by_score(path, metadata, tokens, types)
    unknown = _id(path, metadata, "unknown", len(tokens))
    unknown_token = None if unknown is None else tokens[unknown]
    backend = _bpe(path, tokens, merges, byte_fallback=True, fuse_unk=True, unk_token=unknown_token)
    prefix = metadata.get("tokenizer.ggml.add_space_prefix", metadata["tokenizer.ggml.model"] == "llama")
    spaces = normalizers.Replace(" ", SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(SPACE), spaces]) if prefix else spaces  # pyright: ignore[reportAttributeAccessIssue]
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)] if prefix else steps)  # pyright: ignore[reportAttributeAccessIssue]
    return backend


def _bpe(path: Path, tokens: list[str], merges: list[tuple[str, str]], **options: Any) -> Backend:
    vocabulary = {token: i for i, token in enumerate(tokens)}
    try:
        return Backend(BPE(vocab=vocabulary, merges=merges, **options))
    except Exception as error:  # tokenizers raises bare Exception
        raise CheckpointError(f"{path}: tokens and merges do not form a tokenizer: {error}") from error


def _merges(path: Path, metadata: dict[str, Any]) -> list[tuple[str, str]]:
    merges = []
    for line in _texts(path, metadata, "merges"):
        left, space, right = line.partition(" ")
        if not (left and space and right):
            raise CheckpointError(f"{path}: merge {line[:80]!a} is not two pieces separated by a space")
        merges.append((left, right))
    return merges


def _merges_by_score(
    path: Path, metadata: dict[str, Any], tokens: list[str], types: list[int]
) -> list[tuple[str, str]]:
    """SentencePiece joins the two neighbours whose union scores highest: every way to split a token is a merge."""
    scores = metadata.get("tokenizer.ggml.scores")
    if not isinstance(scores, list) or len(scores) != len(tokens) or not isinstance(scores[0], float):
        raise CheckpointError(f"{path}: {len(tokens)} tokens but neither merges nor as many scores")
    known = set(tokens)
    ranked = sorted((i for i in range(len(tokens)) if types[i] == 1), key=lambda i: (-scores[i], i))
    return [
        (token[:cut], token[cut:])
        for token in (tokens[i] for i in ranked)
        for cut in range(1, len(token))
        if token[:cut] in known and token[cut:] in known
    ]


def _add_ends(backend: Backend, tokens: list[str], bos: int | None, eos: int | None) -> None:
    """Lets encode() put a beginning and an end token."""
    before = [] if bos is None else [(tokens[bos], bos)]
    after = [] if eos is None else [(tokens[eos], eos)]
    if before or after:
        backend.post_processor = processors.TemplateProcessing(  # pyright: ignore[reportAttributeAccessIssue]
            single=[*(token for token, _ in before), "$A", *(token for token, _ in after)],
            special_tokens=before + after,
        )


def _texts(path: Path, metadata: dict[str, Any], key: str) -> list[str]:
    value = metadata.get(f"tokenizer.ggml.{key}")
    if not isinstance(value, list) or not value or not isinstance(value[0], str):
        raise CheckpointError(f"{path}: tokenizer.ggml.{key} is not a list of texts")
    return value


def _id(path: Path, metadata: dict[str, Any], name: str, count: int) -> int | None:
    value = metadata.get(f"tokenizer.ggml.{name}_token_id")
    if value is not None and (type(value) is not int or not 0 <= value < count):
        raise CheckpointError(f"{path}: tokenizer.ggml.{name}_token_id {value!a} is not one of {count} tokens")
    return value
