"""A GGUF file as transformers reads it: the other side of the comparisons of real models."""

import re
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

import sparing
from sparing.checkpoint import open_checkpoint
from sparing.training.data import corpus_file

# What tokenizers stumble over: scripts, marks, gaps, characters of several bytes or of none, text that means control.
BROKEN = [
    "",
    " ",
    "  two  spaces ",
    "\n\n\n\t x\r\n",
    "Привет, как дела? Grüße aus Köln, déjà vu",
    "今日は良い天気ですね。你好,世界! 안녕하세요",
    "مرحبا بالعالم हिन्दी में नमस्ते ภาษาไทย",
    "e\u0301 a\u0300\u0323 \u200d\u200b\ufeff \u00a0x",
    "👩‍👩‍👧‍👦 🏳️‍🌈 \U0001d518\U0001d52b\U0001f9ff",
    "\x00\x01\x7f \ufffd\uffff \ue000",
    "aaaaaaaaaaaaaaaaaaaaaaaaaaaa =========----- 1234567890 3.14159",
    "<end_of_turn> <|im_end|> </s> [INST] <unused3> <table><tr>",
    "I'LL don't they'RE I'd",
]


def texts() -> list[str]:
    """Code, prose where there is a corpus, and broken texts."""
    root = Path(__file__).parents[2]
    code = [path.read_text() for path in sorted((root / "src" / "sparing" / "kernels").glob("*.py"))]
    code += [path.read_text()[:4000] for path in sorted((root / "src" / "sparing" / "kernels" / "cpu").glob("*.hpp"))]
    try:
        tales = corpus_file("fairy_tales.txt").read_text(encoding="ascii")
    except ValueError:
        tales = ""
    return [*BROKEN, *code, *(tales[i : i + 4000] for i in range(0, min(len(tales), 80_000), 4000))]


def prose(tokenizer: Any, length: int) -> Tensor:
    """The first tokens of the fairy tales. Skips where there is no corpus."""
    try:
        tales = corpus_file("fairy_tales.txt").read_text(encoding="ascii")
    except ValueError as error:
        pytest.skip(str(error))
    return torch.tensor(tokenizer.encode(tales[: 8 * length])[:length])


def read_model(model_class: Any, config_class: Any, path: Path) -> Any:
    """The model of a file in float32, each tensor as transformers reads it; the config is the one we read."""
    config = config_class(**open_checkpoint(path).config)  # stated: to find it, the header is read once more
    config._attn_implementation = "eager"
    theirs = model_class.from_pretrained(path.parent, gguf_file=path.name, config=config, dtype=torch.float32)
    return theirs.eval()


def read_headers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A header of a quarter of a million tokens takes seconds, and transformers reads it each time."""
    monkeypatch.setattr(gguf, "GGUFReader", cache(gguf.GGUFReader))


def perplexity(logits: Tensor, tokens: Tensor) -> float:
    return torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).exp().item()


@torch.no_grad()
def greedy(theirs: Any, prompt: list[int], count: int) -> list[int]:
    """The tokens that transformers takes to be the likeliest, one after the other."""
    cache, ids, new = None, torch.tensor([prompt]), []
    for _ in range(count):
        out = theirs(input_ids=ids, past_key_values=cache, use_cache=True)
        cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
        new.append(int(ids))
    return new


# What both are compared by.


def expect_same_weights(path: Path, theirs: Any) -> None:
    """To the bit: a block stands for the same numbers."""
    files, state = open_checkpoint(path).files, theirs.state_dict()
    assert set(state) - {"lm_head.weight"} == set(files.names()) - {"lm_head.weight"}
    for name in files.names():
        assert torch.equal(files.read(name).float(), state[name]), name


def expect_same_logits(model: Any, theirs: Any, length: int) -> None:
    """Of so many tokens of prose, and their perplexity within a thousandth."""
    tokens = prose(model.tokenizer, length)
    assert len(tokens) == length
    with torch.no_grad():
        expected = theirs(input_ids=tokens[None], use_cache=False).logits[0]
    logits = model.logits(tokens)
    assert (logits - expected).abs().max() <= 2e-4 * expected.abs().max()
    assert perplexity(logits, tokens) == pytest.approx(perplexity(expected, tokens), rel=1e-3)


def expect_same_text(model: Any, theirs: Any, prompt: list[int], count: int = 24) -> str:
    """The likeliest continuation, which is returned."""
    events = sparing.generate(model, prompt, temperature=0, max_new_tokens=count)
    ours = [i for event in events if isinstance(event, sparing.Commit) for i in event.ids]
    assert len(ours) > 1 and ours == greedy(theirs, prompt, len(ours))
    return model.tokenizer.decode(ours)


def expect_same_tokens(model: Any, path: Path, longest_gap: int | None = None) -> None:
    """Token for token, and back. longest_gap: to which runs of spaces are cut before."""
    theirs, ours = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name), model.tokenizer
    for text in texts():
        if longest_gap is not None:
            text = re.sub(f"(?<= {{{longest_gap}}}) +", "", text)
        ids = ours.encode(text)
        assert ids == theirs.encode(text), text[:80]
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True)
