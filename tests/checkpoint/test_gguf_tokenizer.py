"""Tokenizers of GGUF files against the originals they were made from."""

from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from sparing.checkpoint import open_checkpoint
from sparing.checkpoint.gguf.tokenizer import build_tokenizer
from sparing.checkpoint.gguf.word_patterns import WORDS
from sparing.errors import CheckpointError
from tests.checkpoint.tokenizer_files import CORNERS, SENTENCES, SPECIAL, texts, vocabulary
from tests.fetched import fetched


def metadata(**changes):
    tokens, merges = vocabulary()
    return {
        f"tokenizer.ggml.{key}": value
        for key, value in (
            {
                "model": "gpt2",
                "pre": "gpt-2",
                "tokens": tokens,
                "merges": merges,
                "token_type": [3 if token in SPECIAL else 1 for token in tokens],
                "bos_token_id": 2,
                "eos_token_id": 1,
                "padding_token_id": 0,
            }
            | changes
        ).items()
    }


def build(path="m.gguf", **changes):
    return build_tokenizer(Path(path), metadata(**changes), (1,))


def reference(pre_tokenizer) -> Tokenizer:
    tokens, merges = vocabulary()
    pairs = [tuple(line.split(" ")) for line in merges]
    tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    tokenizer.pre_tokenizer = pre_tokenizer
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(SPECIAL)
    return tokenizer


def qwen2_pattern():
    from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

    split = pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), "isolated")
    return pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


REFERENCES = {
    "gpt-2": lambda: pre_tokenizers.ByteLevel(add_prefix_space=False),
    "smollm": lambda: pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    ),
    "qwen2": qwen2_pattern,
}


@pytest.fixture(scope="module", params=REFERENCES)
def pair(request):
    return build(pre=request.param), reference(REFERENCES[request.param]())


@given(text=texts)
def test_words_are_cut_as_the_original_tokenizers_cut_them(pair, text):
    ours, theirs = pair
    ids = ours.encode(text)
    assert ids == theirs.encode(text).ids
    assert ours.decode(ids) == text


@pytest.mark.parametrize("pattern", ["default", "llama-bpe", "tekken", "qwen2", "smollm", "gpt-2"])
def test_every_pattern_gives_the_text_back(pattern):
    tokenizer = build(pre=pattern, add_bos_token=False)
    for text in CORNERS + SENTENCES:
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_llama_3_groups_digits_by_three_and_qwen_takes_them_singly():
    for pattern, pieces in (("llama-bpe", ["123", "456", "7"]), ("qwen2", list("1234567"))):
        cut = build(pre=pattern).backend.pre_tokenizer.pre_tokenize_str("1234567")
        assert [piece for piece, _ in cut] == pieces


def test_special_tokens_are_whole_and_hidden():
    tokenizer = build()
    ids = tokenizer.encode("<|turn>user\n")
    assert ids[0] == SPECIAL.index("<|turn>")
    assert tokenizer.decode(ids) == "user\n"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<|turn>user\n"
    assert tokenizer.special_ids == frozenset(range(5))
    assert (tokenizer.bos_id, tokenizer.eos_ids, tokenizer.pad_id) == (2, (1,), 0)


def test_user_defined_tokens_are_whole_and_shown():
    tokens, _ = vocabulary()
    types = [4 if token == "<|turn>" else 3 if token in SPECIAL else 1 for token in tokens]
    tokenizer = build(token_type=types)
    ids = tokenizer.encode("<|turn>x")
    assert ids[0] == SPECIAL.index("<|turn>")
    assert tokenizer.decode(ids) == "<|turn>x"


@pytest.mark.parametrize(("add_bos", "add_eos"), [(True, False), (False, True), (True, True), (False, False)])
def test_beginning_and_end_are_added_as_the_file_says(add_bos, add_eos):
    tokenizer = build(add_bos_token=add_bos, add_eos_token=add_eos)
    plain = tokenizer.encode("abc", add_special_tokens=False)
    assert tokenizer.encode("abc") == [2] * add_bos + plain + [1] * add_eos
    if add_bos:
        assert tokenizer.encode("<bos>abc") == [2, *plain] + [1] * add_eos


BEGINNING = ["llama-bpe", "llama3", "llama-v3", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2", "tekken"]


@pytest.mark.parametrize("pattern", WORDS)
def test_word_patterns_imply_a_beginning_as_in_llama_cpp(pattern):
    begins = build(pre=pattern).encode("abc")[:1] == [2]
    assert begins == (pattern in BEGINNING)
    assert build(pre=pattern, add_bos_token=not begins).encode("abc")[:1] != ([2] if begins else [])


@given(text=texts)
def test_every_pattern_covers_every_text(text):
    for patterns in set(WORDS.values()):
        steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in patterns]
        pieces = pre_tokenizers.Sequence(steps).pre_tokenize_str(text)
        assert "".join(piece for piece, _ in pieces) == text


@pytest.mark.parametrize("text", ["a:b", "$B", "$A:1", ":", "$", "<bos> x"])
def test_a_beginning_may_have_any_text(text):
    tokens, _ = vocabulary()
    tokens[2] = text
    tokenizer = build(tokens=tokens, add_bos_token=True, add_eos_token=True)
    assert tokenizer.encode("abc")[0] == 2
    assert tokenizer.encode("abc")[-1] == 1


def test_a_token_listed_twice_is_both_ids():
    tokens, _ = vocabulary()
    types = [3 if token in SPECIAL else 1 for token in tokens]
    twice = [*tokens, "the", "the", "a", "\u0120king", "<pad>"]
    tokenizer = build(tokens=twice, token_type=[*types, 1, 1, 1, 1, 3])
    for i, token in enumerate(twice):
        plain = (
            "" if i in tokenizer.special_ids else tokenizer.decode([tokens.index(token)] if token in tokens else [i])
        )
        assert tokenizer.decode([i]) == plain
    assert tokenizer.decode([len(tokens), len(tokens) + 1]) == "thethe"
    assert tokenizer.encode("a") == [len(tokens) + 2]
    assert tokenizer.decode([len(twice) - 1], skip_special_tokens=False) == "<pad>"
    assert sentencepiece(tokens=[*PIECES, "ab", "ab"], token_type=[*TYPES, 1, 1],
                         scores=[*PIECES.values(), 0.0, 0.0]).decode([len(PIECES)] * 2) == "abab"  # fmt: skip


def test_templates_for_tools_are_found():
    template = {"role": "user", "content": "x"}
    for default in ("tokenizer.chat_template", "tokenizer.chat_template.default"):
        found = metadata() | {default: "plain", "tokenizer.chat_template.tool_use": "with tools"}
        tokenizer = build_tokenizer(Path("m.gguf"), found, (1,))
        assert tokenizer.apply_chat_template([template]) == "plain"
        assert tokenizer.apply_chat_template([template], tools=[{"name": "f"}]) == "with tools"


def test_special_tokens_that_a_file_spells_as_none():
    tokenizer = build(padding_token_id=2**32 - 1, eos_token_id=-1, bos_token_id=None)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (None, None, None)
    assert build(padding_token_id=10_000).pad_id is None


# SentencePiece ------------------------------------------------------------------------------------------------------

PIECES = {
    "<unk>": 0.0, "<s>": 0.0, "</s>": 0.0, **{f"<0x{byte:02X}>": 0.0 for byte in range(256)},
    "▁": -9.0, "a": -10.0, "b": -11.0, "c": -12.0, "ab": -1.0, "bc": -0.5, "abc": -7.0, "▁a": -2.0, "▁ab": -3.0,
    "aa": -4.0, "▁▁": -5.0, "ca": -0.25, "é": -20.0,
}  # fmt: skip
TYPES = [2, 3, 3] + [6] * 256 + [1] * (len(PIECES) - 259)


def sentencepiece(**changes):
    base = {"model": "llama", "tokens": list(PIECES), "scores": list(PIECES.values()), "token_type": TYPES}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "unknown_token_id": 0, "add_bos_token": False}
    dropped = {"pre": None, "merges": None, "padding_token_id": None}
    found = metadata(**dropped, **base, **ids) | {f"tokenizer.ggml.{key}": value for key, value in changes.items()}
    return build_tokenizer(Path("m.gguf"), {key: value for key, value in found.items() if value is not None}, (2,))


def literal_sentencepiece(text: str) -> list[int]:
    """The definition: join the neighbours whose union scores highest, the leftmost among equals, until none is left."""
    ids = {piece: i for i, piece in enumerate(PIECES)}
    if not text:
        return []
    pieces = list("▁" + text.replace(" ", "▁"))
    while True:
        unions = [(PIECES[a + b], -i) for i, (a, b) in enumerate(pairwise(pieces)) if a + b in PIECES]
        if not unions:
            break
        at = -max(unions)[1]
        pieces[at : at + 2] = [pieces[at] + pieces[at + 1]]
    result = []
    for piece in pieces:
        result += [ids[piece]] if piece in ids else [ids[f"<0x{byte:02X}>"] for byte in piece.encode()]
    return result


@given(text=st.text("abc é你", max_size=20))
def test_scores_join_pieces_as_sentencepiece_does(text):
    tokenizer = sentencepiece()
    ids = tokenizer.encode(text)
    assert ids == literal_sentencepiece(text)
    assert tokenizer.decode(ids) == text


def test_the_prefix_space_can_be_left_out():
    tokenizer = sentencepiece(add_space_prefix=False)
    assert tokenizer.backend.encode("ab").tokens == ["ab"]
    assert tokenizer.decode(tokenizer.encode(" ab")) == " ab"


def test_old_files_get_their_beginning_token_without_asking():
    assert sentencepiece(add_bos_token=None).encode("ab")[0] == 1


def test_gemma_4_has_merges_and_no_prefix_space():
    merges = ["a b", "▁ ab", "b c"]
    tokenizer = sentencepiece(model="gemma4", merges=merges, scores=None)
    assert tokenizer.backend.encode("ab ab").tokens == ["ab", "▁ab"]
    assert tokenizer.decode(tokenizer.encode(" ab 你\n")) == " ab 你\n"


def test_files_that_name_no_special_ids_have_those_of_sentencepiece():
    tokenizer = sentencepiece(bos_token_id=None, eos_token_id=None, unknown_token_id=None, add_bos_token=None)
    assert (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    assert tokenizer.encode("ab")[0] == 1


def test_the_unknown_token_is_hidden():
    assert sentencepiece().decode([0]) == ""


def test_long_tokens_are_taken_apart_in_no_time():
    long = ["a" * 400_000, "ab" * 100_000]
    tokens, scores = [*PIECES, *long], [*PIECES.values(), -30.0, -31.0]
    tokenizer = sentencepiece(tokens=tokens, scores=scores, token_type=[*TYPES, 1, 1])
    assert tokenizer.encode("ab ca") == sentencepiece().encode("ab ca")
    nested = ["b" * (i + 2) for i in range(1500)]
    with pytest.raises(CheckpointError, match="in too many ways for a vocabulary"):
        sentencepiece(
            tokens=[*PIECES, *nested], scores=[0.0] * (len(PIECES) + 1500), token_type=TYPES + [1] * len(nested)
        )


# What is wrong with a file ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"model": "bert"}, "tokenizer model 'bert' is not supported; supported: gpt2, llama, gemma4"),
        ({"pre": "unheard-of"}, r"word pattern 'unheard-of' \(tokenizer\.ggml\.pre\) is not known"),
        ({"pre": ["x"]}, "word pattern"),
        ({"merges": ["ab"]}, "merge 'ab' is not two pieces"),
        ({"merges": ["q zz"]}, "do not form a tokenizer"),
        ({"merges": None}, "merges is not a list of texts"),
        ({"tokens": [1, 2]}, "tokens is not a list of texts"),
        ({"token_type": [1]}, "do not go with the types"),
        ({"tokens": ["a", 1]}, "tokens is not a list of texts"),
        ({"tokens": [["a"]]}, "tokens is not a list of texts"),
        ({"tokens": "abc"}, "tokens is not a list of texts"),
        ({"merges": ["a b", ["a"]]}, "merges is not a list of texts"),
        ({"token_type": ["x"] * len(vocabulary()[0])}, "do not go with the types"),
        ({"bos_token_id": [1]}, r"bos_token_id \[1\] is not one of"),
        ({"bos_token_id": 1.0}, "bos_token_id 1.0 is not one of"),
        ({"add_bos_token": 1}, "add_bos_token is 1, must be true or false"),
        ({"bos_token_id": 10_000}, "bos_token_id 10000 is not one of"),
        ({"model": "llama", "merges": None}, "merges"),
        ({"model": "llama", "scores": [1.0]}, "neither merges nor as many scores"),
    ],
)
def test_a_tokenizer_that_does_not_fit_together(changes, reason):
    changed = metadata(**changes)
    if changes.get("model") == "llama":
        changed.pop("tokenizer.ggml.merges")
    with pytest.raises(CheckpointError, match=reason):
        build_tokenizer(Path("m.gguf"), changed, ())


# The real file ------------------------------------------------------------------------------------------------------

KNOWN = {  # ids that other implementations of this tokenizer give
    "Hello, we can use": [19556, 28, 392, 416, 722],
    "The capital of France is": [504, 3575, 282, 4649, 314],
    "Hello world! 123": [19556, 905, 17, 216, 33, 34, 35],
    "Café déjà vu.": [51, 1939, 2756, 32564, 90, 16739, 386, 101, 30],
    "  multiple   spaces": [216, 2701, 256, 5600],
    "\n": [198],
}


@pytest.fixture(scope="module")
def smollm2():
    return open_checkpoint(fetched("smollm2"))


@pytest.mark.real
def test_smollm2_tokenizer(smollm2):
    tokenizer = smollm2.tokenizer
    for text, ids in KNOWN.items():
        assert tokenizer.encode(text) == ids
    for text in CORNERS + SENTENCES:
        assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.vocab_size == smollm2.config["vocab_size"] == 49152
    assert tokenizer.eos_ids == (2, 0)
    rendered = tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}])
    assert rendered.endswith("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert tokenizer.encode_chat([{"role": "user", "content": "Hi"}])[0] == tokenizer.token_to_id("<|im_start|>")


@pytest.mark.real
def test_smollm2_weights_are_those_transformers_reads(smollm2):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    path, config = smollm2.path, LlamaConfig(**smollm2.config)  # stated: to find it, the header is read once more
    theirs = LlamaForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, config=config, dtype=torch.float32
    ).state_dict()
    theirs.pop("lm_head.weight")
    assert set(theirs) == set(smollm2.files.names())
    for name, tensor in theirs.items():
        assert torch.equal(smollm2.files.read(name), tensor), name
