"""Running text as training examples: a split by books, a byte-pair tokenizer, and sequences drawn by number."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from sparing.training.block_diffusion import Examples, fill_response

__all__ = ["TextData", "corpus_file", "split_books", "tales_of", "train_tokenizer"]

PAD, EOS, BOS, UNK = 0, 1, 2, 3
SPECIALS = ["<pad>", "<eos>", "<bos>", "<unk>"]
HELD_OUT = 0.05  # of each book, its end
VALIDATION_BATCHES = 4


def corpus_file(name: str) -> Path:
    """A file of the corpus, in $SPARING_DATA or in `shared` beside the repository. Raises ValueError if absent."""
    roots = [os.environ.get("SPARING_DATA"), Path(__file__).resolve().parents[4] / "shared"]
    for root in roots:
        if root and (path := Path(root) / "corpus" / name).is_file():
            return path
    raise ValueError(
        f"corpus/{name} is not in {' or '.join(str(r) for r in roots if r)}: set SPARING_DATA to its folder"
    )


def split_books(text: str, held_out: float = HELD_OUT) -> tuple[list[str], list[str]]:
    """(training, held-out) text of each book: the last share of every one, cut at a paragraph, is held out.

    Books are separated by two empty lines.
    """
    training, validation = [], []
    for book in re.split(r"\n\n\n+", text.strip("\n")):
        cut = book.find("\n\n", int(len(book) * (1 - held_out)))
        cut = len(book) if cut < 0 else cut
        training.append(book[:cut])
        validation.append(book[cut:].strip("\n"))
    return training, [text for text in validation if text]


def tales_of(book: str) -> list[str]:
    """The tales of a book; each begins with its title, a short line of capitals."""
    tales: list[list[str]] = [[]]
    for paragraph in book.split("\n\n"):
        is_title = len(paragraph) < 80 and sum(c.isalpha() for c in paragraph) > 3 and paragraph == paragraph.upper()
        if is_title and len(tales[-1]) > 1:
            tales.append([])
        tales[-1].append(paragraph)
    return ["\n\n".join(tale) for tale in tales]


def train_tokenizer(texts: list[str], vocab_size: int) -> Tokenizer:
    """A byte-pair tokenizer with <pad> 0, <eos> 1, <bos> 2 and <unk> 3; it puts <bos> before a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=SPECIALS, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", BOS)])
    return tokenizer


class TextData:
    """Sequences of a prefix and several canvases of consecutive text; sequence i of step n depends on the seed alone.

    Half of them start at a paragraph, the others at any token. One that reaches the end of its tale is filled with end
    ids to a whole canvas.
    """

    bos = BOS

    def __init__(
        self, name: str, vocab_size: int, block: int, batch_size: int, prefix: tuple[int, int], blocks: int, seed: int
    ):
        """prefix: shortest and longest prefix in tokens, drawn evenly per batch, its <bos> included."""
        self.block, self.batch_size, self.prefix, self.blocks, self.seed = block, batch_size, prefix, blocks, seed
        training, self.held_out_texts = split_books(corpus_file(name).read_text(encoding="ascii"))
        self.tokenizer = train_tokenizer(training, vocab_size)
        self.training = _Tokens(self.tokenizer, training)
        self.held_out = _Tokens(self.tokenizer, self.held_out_texts)

    def batch(self, step: int) -> Examples:
        return self._draw(self.training, np.random.default_rng((self.seed, step)))

    def validation(self) -> list[Examples]:
        return [self.held_out_batch(i) for i in range(VALIDATION_BATCHES)]

    def held_out_batch(self, number: int) -> Examples:
        """Sequences of held-out text, which depend on the number and the seed alone."""
        return self._draw(self.held_out, np.random.default_rng((self.seed, 1, number)))

    def held_out_tales(self) -> Iterator[list[int]]:
        """Token ids of the held-out part of each book, tale by tale, without end ids."""
        for piece in np.split(self.held_out.ids, self.held_out.ends + 1):
            if len(piece):
                yield piece[:-1].tolist()

    def _draw(self, tokens: _Tokens, rng: np.random.Generator) -> Examples:
        prefix = int(rng.integers(self.prefix[0], self.prefix[1] + 1))
        length = prefix - 1 + self.blocks * self.block  # without <bos>
        rows, counts = [], []
        while len(rows) < self.batch_size:
            # Half of the examples begin where a paragraph does, the others anywhere.
            start = int(rng.choice(tokens.paragraphs) if rng.random() < 0.5 else rng.integers(len(tokens.ids)))
            row = tokens.ids[start : min(start + length, tokens.end_after(start))]  # without the end id
            if len(row) < prefix:
                continue
            end = [EOS] if len(row) < length else []
            ids = fill_response([BOS, *row[: prefix - 1]], [*row[prefix - 1 :], *end], self.block, EOS)
            counts.append((len(ids) - prefix) // self.block)
            rows.append(np.array([*ids, *[EOS] * (1 + length - len(ids))], dtype=np.int64))
        valid = torch.arange(self.blocks) < torch.tensor(counts)[:, None]
        return Examples(torch.from_numpy(np.stack(rows)), prefix, valid)


class _Tokens:
    """Running tokens in which every tale ends with an end id, and where its paragraphs begin."""

    def __init__(self, tokenizer: Tokenizer, books: list[str]):
        tales = [tale for book in books for tale in tales_of(book)]
        paragraphs = [p for tale in tales for p in _with_endings(tale)]
        encoded = [e.ids for e in tokenizer.encode_batch([text for text, _ in paragraphs], add_special_tokens=False)]
        pieces, self.paragraphs, at = [], [], 0
        for ids, (_, is_last) in zip(encoded, paragraphs, strict=True):
            self.paragraphs.append(at)
            ids = [*ids, EOS] if is_last else ids
            pieces.append(np.array(ids, dtype=np.int64))
            at += len(ids)
        self.ids = np.concatenate(pieces)
        self.ends = np.flatnonzero(self.ids == EOS)

    def end_after(self, start: int) -> int:
        """Index of the first end id at or after `start`."""
        return int(self.ends[np.searchsorted(self.ends, start)])


def _with_endings(tale: str) -> list[tuple[str, bool]]:
    """(paragraph with what separates it from the next, is it the tale's last)"""
    paragraphs = tale.split("\n\n")
    return [(p + "\n\n", False) for p in paragraphs[:-1]] + [(paragraphs[-1], True)]
