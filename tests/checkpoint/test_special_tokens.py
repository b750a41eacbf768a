"""Tokens that files beside tokenizer.json state, and vocabularies without one, against transformers live."""

import json
import random
from itertools import count
from pathlib import Path

import pytest
from tokenizers import AddedToken, decoders, normalizers
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from sparing.checkpoint import open_checkpoint, write_json
from sparing.checkpoint.tokenizer import read_tokenizer
from sparing.errors import CheckpointError
from tests.checkpoint.tokenizer_files import CORNERS, SENTENCES, SPECIAL, trained, vocabulary, write_folder

TEXTS = ["<x>", "<y>", "<|im_end|>", "[PAD]", "<eos>", "a", "ab", "</s>", "<tool>", "<img>", "upon", "<z>"]
NAMES = ["eos_token", "pad_token", "unk_token", "sep_token", "cls_token", "mask_token", "image_token", "boi_token"]
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")


def sentencepiece() -> Backend:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{b:02X}>" for b in range(256)), "▁", "a", "b", "x", "<", ">", "▁a", "ab"]
    merges = [("▁", "a"), ("a", "b")]
    vocab = {piece: i for i, piece in enumerate(pieces)}
    backend = Backend(BPE(vocab=vocab, merges=merges, byte_fallback=True, fuse_unk=True, unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    return backend


class Folders:
    """Random folders in which every text is named once, in every way that there is."""

    def __init__(self, seed: int):
        self.rng = random.Random(seed)

    def some(self, chance: float) -> bool:
        return self.rng.random() < chance

    def flags(self) -> dict[str, bool]:
        return {flag: self.some(0.4) for flag in FLAGS if self.some(0.7)}

    def write(self, folder: Path) -> dict:
        backend = Backend.from_str((trained() if self.some(0.5) else sentencepiece()).to_str())
        texts = iter(self.rng.sample(TEXTS, len(TEXTS)))

        def token(*kinds: str):
            kind, text = self.rng.choice(kinds), next(texts)
            typed = {"__type": "AddedToken"} if kind == "typed" else {}
            return text if kind == "text" else typed | {"content": text} | self.flags()

        if self.some(0.3):
            backend.add_tokens([AddedToken(next(texts), **self.flags())])
        backend.save(str(folder / "tokenizer.json"))
        config: dict = {"tokenizer_class": "PreTrainedTokenizerFast"}
        config |= {name: token("text", "typed") for name in self.rng.sample(NAMES, 3)}
        key = self.rng.choice(["extra_special_tokens", "additional_special_tokens"])
        config[key] = [token("text", "typed") for _ in range(2)]
        if key.startswith("extra") and self.some(0.5):
            config[key] = {f"own_{i}": value for i, value in enumerate(config[key])}
        if self.some(0.5):
            config["added_tokens_decoder"] = {str(self.rng.randint(0, 700)): token("dict") for _ in range(2)}
        else:
            older = {name: token("text") for name in self.rng.sample(NAMES[:6], 2)}
            write_json(folder / "special_tokens_map.json", older)
            if not any(isinstance(value, dict) for value in config.values()) and self.some(0.7):
                write_json(folder / "added_tokens.json", {next(texts): 650})
        write_json(folder / "tokenizer_config.json", config)
        return config

    def text(self) -> str:
        return "".join(self.rng.choice([*TEXTS, " ", "x", "<", "é"]) for _ in range(self.rng.randint(0, 8)))


def assert_same(folder: Path, texts: list[str]) -> None:
    from transformers import AutoTokenizer

    ours, theirs = read_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert ours.vocab_size == len(theirs)
    assert ours.special_tokens == theirs.special_tokens_map
    added = (ours.backend.get_added_tokens_decoder(), theirs.added_tokens_decoder)
    first, second = ({i: repr(token) for i, token in tokens.items()} for tokens in added)
    assert first == second
    ids = (ours.bos_id, ours.eos_id, ours.pad_id)
    assert ids == (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
    for text in texts:
        encoded = theirs.encode(text)
        assert ours.encode(text) == encoded
        assert ours.decode(encoded) == theirs.decode(encoded, skip_special_tokens=True)
        assert ours.decode(encoded, skip_special_tokens=False) == theirs.decode(encoded)


@pytest.mark.parametrize("seed", range(40))
def test_tokens_stated_beside_tokenizer_json_are_those_of_transformers(tmp_path, seed):
    folders = Folders(seed)
    folders.write(tmp_path)
    assert_same(tmp_path, [folders.text() for _ in range(10)])


def test_special_tokens_in_a_prompt_can_be_taken_apart(tmp_path):
    assert_same(write_folder(tmp_path, split_special_tokens=True), ["<eos>a<|turn>", "<bos>"])


@pytest.mark.parametrize(
    "name", ["bos_token", "eos_token", "pad_token", "unk_token", "sep_token", "mask_token", "image_token"]
)
def test_a_special_token_that_the_vocabulary_lacks_is_harmless(tmp_path, name):
    folder = write_folder(tmp_path, **{name: "[NONE]"})
    assert_same(folder, SENTENCES)


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        ({"added_tokens_decoder": []}, "must be an object of ids and tokens, is list"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "'x' is not a token id"),
        ({"added_tokens_decoder": {"-1": {"content": "a"}}}, "'-1' is not a token id"),
        ({"added_tokens_decoder": {"1": 3}}, "3 is not a token"),
        ({"added_tokens_decoder": {"1": {"content": ["a"]}}}, "is not a token"),
        ({"added_tokens_decoder": {"1": {"content": "a", "special": "yes"}}}, "special of 'a' is not true or false"),
        ({"eos_token": 3}, "eos_token: 3 is not a token"),
        ({"extra_special_tokens": 3}, "extra_special_tokens is 3, expected a list"),
        ({"additional_special_tokens": [None]}, "None is not a token"),
        ({"extra_special_tokens": {"image": 7}}, "image: 7 is not a token"),
    ],
)
def test_what_is_no_token_is_named(tmp_path, config, reason):
    with pytest.raises(CheckpointError, match=reason):
        read_tokenizer(write_folder(tmp_path, **config))


def test_tokens_with_ids_that_nothing_has_cost_nothing(tmp_path):
    huge = {str(10**i): {"content": f"<{i}>"} for i in (5, 9, 18, 40)}
    tokenizer = read_tokenizer(write_folder(tmp_path, added_tokens_decoder=huge))
    size = trained().get_vocab_size()
    assert [tokenizer.token_to_id(f"<{i}>") for i in (5, 9, 18, 40)] == [size, size + 1, size + 2, size + 3]


# Without tokenizer.json ---------------------------------------------------------------------------------------------


def write_vocabulary(folder: Path, **config) -> Path:
    tokens, merges = vocabulary()
    ids = count()
    write_json(folder / "vocab.json", {token: next(ids) for token in tokens})
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]), encoding="utf-8")
    write_json(folder / "tokenizer_config.json", config)
    return folder


@pytest.mark.parametrize(
    "config",
    [
        {"tokenizer_class": "Qwen2Tokenizer", "pad_token": "<pad>", "eos_token": "<eos>"},
        {"tokenizer_class": "Qwen2TokenizerFast"},
        {"tokenizer_class": "GPT2Tokenizer", "add_prefix_space": True},
        {"tokenizer_class": "GPT2Tokenizer", "bos_token": "<bos>", "eos_token": "<eos>", "add_bos_token": True},
        {
            "tokenizer_class": "GPT2TokenizerFast",
            "added_tokens_decoder": {str(i): {"content": text, "special": True} for i, text in enumerate(SPECIAL)},
        },
    ],
)
def test_vocab_json_and_merges_are_read_as_transformers_reads_them(tmp_path, config):
    assert_same(write_vocabulary(tmp_path, **config), [*SENTENCES, *CORNERS, "<eos>x<|turn>"])


def test_the_model_says_which_vocabulary_it_is(tmp_path):
    folder = write_vocabulary(tmp_path)
    write_json(folder / "config.json", {"model_type": "qwen3"})
    tokenizer = open_checkpoint(folder).tokenizer
    assert [tokenizer.decode([i]) for i in tokenizer.encode("12 a")] == ["1", "2", " a"]


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("tekken.json", r"no tokenizer\.json, and its tekken\.json is in a form that cannot be read here.*save_pretr"),
        ("tokenizer.model", r"its tokenizer\.model is in a form that cannot be read here.*save_pretrained"),
        ("qwen.tiktoken", r"its qwen\.tiktoken is in a form that cannot be read here"),
        ("vocab.json", r"its vocab\.json is in a form that cannot be read here"),
    ],
)
def test_other_vocabularies_are_named_with_the_way_out(tmp_path, file, reason):
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    (tmp_path / file).write_text("{}")
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(tmp_path).tokenizer  # noqa: B018


def test_a_vocabulary_of_an_unknown_class_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="class 'BlenderbotTokenizer'; only Qwen2Tokenizer, GPT2Tokenizer can"):
        read_tokenizer(write_vocabulary(tmp_path, tokenizer_class="BlenderbotTokenizer"))


def test_a_vocabulary_that_does_not_fit_its_merges_is_named(tmp_path):
    folder = write_vocabulary(tmp_path, tokenizer_class="Qwen2Tokenizer")
    (folder / "merges.txt").write_text("#version: 0.2\nq zz")
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt do not form a tokenizer"):
        read_tokenizer(folder)
    (folder / "vocab.json").write_text(json.dumps({"a": -1}))
    with pytest.raises(CheckpointError, match=r"vocab\.json and merges\.txt do not form a tokenizer"):
        read_tokenizer(folder)
