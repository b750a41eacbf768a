"""Tiny checkpoints with random weights, as folders."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE

from sparing.checkpoint import save_weights, write_json
from sparing.config import parse_config
from sparing.models.loading import build
from sparing.sudoku.text import DIGIT, make_tokenizer
from sparing.training import RECIPES
from tests.tiny import LLAMA

SIZE = 4  # of the Sudoku model
CANVAS = 12  # of the text model
CONTEXT = 256
TEXTS = [
    "Once upon a time there was a king's daughter, and nobody knew her name.\n",
    "The old woman went into the forest with her goose, and 12 of 345 came back.\n",
    "Grüße aus Köln, 你好世界 🙂 déjà vu",
]
TEMPLATE = (
    "<bos>{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
)
SMALL = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 2,
    "head_dim": 16,
    "global_head_dim": 16,
    "num_global_key_value_heads": 1,
    "num_key_value_heads": 1,
    "moe_intermediate_size": 16,
    "max_position_embeddings": CONTEXT,
}


def grid_folder(folder: Path) -> Path:
    """A block-diffusion model of 4x4 Sudokus."""
    recipe = RECIPES["recipes/sudoku"]
    text = {**recipe.config["text_config"], **SMALL, "vocab_size": DIGIT + SIZE + SIZE * SIZE * (SIZE + 1)}
    config = {**recipe.config, "canvas_length": SIZE * (SIZE + 1), "text_config": text}
    return write(folder, config, make_tokenizer(SIZE), recipe.generation_config)


def text_folder(folder: Path) -> Path:
    """A block-diffusion model of byte-level text, with a chat template."""
    tokenizer = text_tokenizer()
    recipe = RECIPES["recipes/tales"]
    text = {**recipe.config["text_config"], **SMALL, "vocab_size": tokenizer.get_vocab_size()}
    config = {**recipe.config, "canvas_length": CANVAS, "text_config": text}
    generation = {**recipe.generation_config, "max_denoising_steps": 6}
    write(folder, config, tokenizer, generation)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def causal_folder(folder: Path) -> Path:
    """A Llama, which has no canvas, with a chat template."""
    tokenizer = text_tokenizer()
    config = LLAMA | {
        "intermediate_size": 48,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": CONTEXT,
        "tie_word_embeddings": True,
        "eos_token_id": 1,
    }
    write(folder, config, tokenizer, {})
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def text_tokenizer() -> Tokenizer:
    """All bytes, and the words of TEXTS built up from the left: training would break ties anew each time."""
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    vocabulary = ["<pad>", "<eos>", "<bos>", "<unk>", "<turn>", "<end>", *sorted(byte_level.alphabet())]
    merges = []
    for text in TEXTS:
        for word, _ in byte_level.pre_tokenize_str(text):
            for end in range(1, len(word)):
                if word[: end + 1] not in vocabulary:
                    merges.append((word[:end], word[end]))
                    vocabulary.append(word[: end + 1])
    tokenizer = Tokenizer(BPE({token: i for i, token in enumerate(vocabulary)}, merges))
    tokenizer.add_special_tokens(vocabulary[:6])
    tokenizer.pre_tokenizer = byte_level
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return tokenizer


def write(folder: Path, config: dict[str, Any], tokenizer: Tokenizer, generation_config: Any) -> Path:
    folder.mkdir(parents=True)
    generator = torch.Generator().manual_seed(5)
    tensors = {}
    for name, tensor in build(parse_config(config)).state_dict().items():
        noise = torch.randn(tensor.shape, generator=generator)
        tensors[name] = 1 + 0.3 * noise if tensor.ndim < 2 else noise * 1.5 * tensor.shape[-1] ** -0.5
    save_weights(folder, tensors)
    write_json(folder / "config.json", config)
    write_json(folder / "generation_config.json", dict(generation_config))
    tokenizer.save(str(folder / "tokenizer.json"))
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    write_json(folder / "tokenizer_config.json", names)
    return folder
