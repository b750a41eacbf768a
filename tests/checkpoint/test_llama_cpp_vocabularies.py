"""Vocabularies of llama.cpp's own tests: texts must become the ids that it has for them, and be given back."""

from pathlib import Path

import pytest

from sparing.checkpoint.gguf.header import read_header
from sparing.checkpoint.gguf.tokenizer import build_tokenizer
from sparing.checkpoint.tensors import MappedFile
from sparing.checkpoint.tokenizer import Tokenizer
from sparing.errors import CheckpointError
from tests.llama_cpp import vocabulary_files

UNSUPPORTED = {"bert-bge": "'bert'", "nomic-bert-moe": "'t5'"}
BEGINNING = {"llama-bpe": 128000, "llama-spm": 1, "phi-3": 1, "gemma-4": 2, "command-r": 5,
             "deepseek-coder": 32013, "deepseek-llm": 100000}  # fmt: skip


def build(file: Path) -> Tokenizer:
    return build_tokenizer(file, read_header(MappedFile(file))[0], ())


@pytest.mark.parametrize("file", vocabulary_files())
def test_ids_are_those_of_llama_cpp(file):
    name = file.stem.removeprefix("ggml-vocab-")
    if name in UNSUPPORTED:
        with pytest.raises(CheckpointError, match=f"tokenizer model {UNSUPPORTED[name]} is not supported"):
            build(file)
        return
    tokenizer = build(file)
    beginning = [BEGINNING[name]] if name in BEGINNING else []
    pairs = [Path(f"{file}.{ending}") for ending in ("inp", "out")]
    if not pairs[0].is_file():
        assert tokenizer.decode(tokenizer.encode("Hello world 123")) == "Hello world 123"
        return
    texts = pairs[0].read_bytes().decode("utf-8").split("\n__ggml_vocab_test__\n")
    expected = [[int(i) for i in line.split()] for line in pairs[1].read_text("utf-8").split("\n")]
    assert 40 < len(texts) <= len(expected) <= len(texts) + 1  # a line break may end the last line
    for text, ids in zip(texts, expected, strict=False):
        assert tokenizer.encode(text, add_special_tokens=False) == ids
        assert tokenizer.decode(ids) == text
        assert tokenizer.encode(text) == beginning + ids
