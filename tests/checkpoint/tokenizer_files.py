"""A small byte-level tokenizer and texts that find the corners of any."""

import json
from functools import cache
from pathlib import Path
from typing import Any

from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer

from sparing.checkpoint import write_json

SPECIAL = ["<pad>", "<eos>", "<bos>", "<|turn>", "<turn|>"]
SENTENCES = [
    "Once upon a time there was a king's daughter, and nobody knew her name.",
    "They're 12 of 345, we'll see 6789 more: don't you think?",
    "Grüße aus Köln, нaïve café, 你好世界, こんにちは, 🙂🙂 déjà vu\n\n  indented\ttabs",
]
CORNERS = [
    "",
    " ",
    "  two  spaces ",
    "\n\n\n",
    "I'LL don't",
    "x1234567y",
    "a\r\nb",
    "你好，世界！",  # noqa: RUF001
    "🙂👩‍👩‍👧",
    "e\u0301",
    "\u00a0x",
    "!!??...",
    "ÀÉ ß",
]
texts = st.sampled_from(CORNERS) | st.text(max_size=30) | st.text("ab '\n1é你🙂", max_size=30)


@cache
def trained() -> Tokenizer:
    """GPT-2's scheme with 600 pieces, the special tokens first."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(SENTENCES * 3, trainer)
    return tokenizer


def vocabulary() -> tuple[list[str], list[str]]:
    """Tokens by id and merges as lines."""
    model = json.loads(trained().to_str())["model"]
    return sorted(model["vocab"], key=model["vocab"].get), [" ".join(pair) for pair in model["merges"]]


def write_folder(folder: Path, **config: Any) -> Path:
    """A folder with tokenizer.json and tokenizer_config.json."""
    folder.mkdir(exist_ok=True)
    trained().save(str(folder / "tokenizer.json"))
    named = {"bos_token": "<bos>", "eos_token": {"__type": "AddedToken", "content": "<eos>"}, "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", named | config)
    return folder
