"""Llama, Mistral, Qwen2 and Qwen3 against transformers, on tiny random models loaded from saved checkpoints."""

from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from sparing.decoding.events import Commit
from sparing.decoding.generate import generate
from sparing.models.batch import Row
from tests.conformance.reference import assert_same, load, reload, rewrite, run_chunked, run_reference, save_random
from tests.tiny import FULL, SIZES, SLIDING, random_ids

CLASSES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "mistral": (MistralConfig, MistralForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}
COMMON = SIZES | {"num_hidden_layers": 3, "max_position_embeddings": 64}
QWEN_WINDOW = COMMON | {"use_sliding_window": True, "sliding_window": 5}
YARN = {"rope_type": "yarn", "rope_theta": 500.0, "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}


def rotation(**rope):
    return "llama", COMMON | {"rope_parameters": rope, "head_dim": 16}


CASES = {
    "llama": ("llama", COMMON),
    "llama, biased attention": ("llama", COMMON | {"attention_bias": True}),
    "llama, biased mlp": ("llama", COMMON | {"mlp_bias": True}),
    "llama, tied": ("llama", COMMON | {"tie_word_embeddings": True}),
    "llama, large heads": ("llama", COMMON | {"head_dim": 14}),
    "llama, one kv head": ("llama", COMMON | {"num_key_value_heads": 1}),
    "llama, no grouping": ("llama", COMMON | {"num_key_value_heads": None}),
    "llama, large epsilon": ("llama", COMMON | {"rms_norm_eps": 0.1}),
    "mistral": ("mistral", COMMON | {"sliding_window": None}),
    "mistral, window": ("mistral", COMMON | {"sliding_window": 5}),
    "mistral, window and large heads": ("mistral", COMMON | {"sliding_window": 3, "head_dim": 12}),
    "mistral, window by default": ("mistral", COMMON),
    "qwen2": ("qwen2", COMMON | {"sliding_window": 5}),
    "qwen2, tied": ("qwen2", COMMON | {"tie_word_embeddings": True}),
    "qwen2, window from layer 1": ("qwen2", QWEN_WINDOW | {"max_window_layers": 1}),
    "qwen2, window everywhere": ("qwen2", QWEN_WINDOW | {"max_window_layers": 0}),
    "qwen2, window nowhere": ("qwen2", QWEN_WINDOW),
    "qwen2, layer types": ("qwen2", QWEN_WINDOW | {"layer_types": [SLIDING, FULL, SLIDING]}),
    "qwen3": ("qwen3", COMMON | {"head_dim": 12}),
    "qwen3, biased": ("qwen3", COMMON | {"head_dim": 8, "attention_bias": True}),
    "qwen3, layer types": ("qwen3", QWEN_WINDOW | {"head_dim": 8, "layer_types": [FULL, SLIDING, FULL]}),
    "qwen3, window from layer 2": ("qwen3", QWEN_WINDOW | {"head_dim": 8, "max_window_layers": 2}),
    "slow rotation": rotation(rope_type="default", rope_theta=5e5),
    "linear": rotation(rope_type="linear", factor=3.0, rope_theta=500.0),
    "dynamic": rotation(rope_type="dynamic", factor=4.0, rope_theta=500.0),
    "llama3": rotation(**LLAMA3),
    "yarn": rotation(**YARN),
    "yarn, attention factor": rotation(**YARN, attention_factor=1.3),
    "yarn, mscale": rotation(**YARN, mscale=0.7, mscale_all_dim=1.4),
    "yarn, no truncation": rotation(**YARN, truncate=False),
    "yarn, betas": rotation(**YARN, beta_fast=3.0, beta_slow=0.5),
}


@cache
def pair(case: str):
    """(the reference, our model loaded from its checkpoint)"""
    model_type, settings = CASES[case]
    config_class, model_class = CLASSES[model_type]
    with TemporaryDirectory() as folder:
        theirs = save_random(model_class, config_class(**settings), Path(folder), seed=1)
        return theirs, load(Path(folder))


@pytest.mark.parametrize("case", CASES)
def test_hidden_states_and_logits(case):
    theirs, ours = pair(case)
    for length in (1, 4, 5, 6, 17):
        tokens = random_ids(length)
        reference = run_reference(theirs, tokens)
        hidden = ours.hidden_states(tokens)
        assert len(hidden) == len(reference.hidden_states)
        for mine, other in zip(hidden[:-1], reference.hidden_states, strict=False):
            assert_same(mine, other[0], 5e-5)
        with torch.no_grad():  # the reference's last entry has the final norm applied
            assert_same(ours.model.norm(hidden[-1]), reference.hidden_states[-1][0], 5e-5)
        assert_same(ours.logits(tokens), reference.logits[0], 1e-4)


@pytest.mark.parametrize("case", CASES)
def test_cached_and_chunked_logits(case):
    """The reference's own cache step by step, and its uncached run for other ways to cut the text."""
    theirs, ours = pair(case)
    tokens = random_ids(19)
    reference = run_reference(theirs, tokens).logits[0]
    for chunks in ([3, 6, *[1] * 10], [1] * 19, [12, 1, 6]):
        assert_same(run_chunked(ours, tokens, chunks), reference, 1e-4)
    cache, memory = DynamicCache(config=theirs.config), ours.memory()
    for chunk in tokens.split([3, 6, *[1] * 10]):
        with torch.no_grad():
            cached = theirs(input_ids=chunk[None], past_key_values=cache).logits[0]
        assert_same(ours.logits(chunk, memory), cached, 1e-4)


@pytest.mark.parametrize("case", ["llama", "mistral, window", "qwen2, layer types", "qwen3", "yarn"])
def test_bfloat16(case, tmp_path):
    model_type, settings = CASES[case]
    config_class, model_class = CLASSES[model_type]
    theirs = save_random(model_class, config_class(**settings), tmp_path, dtype=torch.bfloat16)
    ours = load(tmp_path)
    assert ours.dtype == torch.bfloat16
    tokens = random_ids(17)
    reference = run_reference(theirs, tokens).logits[0].float()
    assert (ours.logits(tokens) - reference).norm() <= 3e-2 * reference.norm()


@pytest.mark.parametrize("key", ["type", "rope_type"])
@pytest.mark.parametrize("case", [case for case, (_, settings) in CASES.items() if "rope_parameters" in settings])
def test_old_spelling_of_rotations(case, key, tmp_path):
    """`rope_scaling` beside `rope_theta`, as checkpoints before `rope_parameters` have it."""
    model_type, settings = CASES[case]
    config_class, model_class = CLASSES[model_type]
    save_random(model_class, config_class(**settings), tmp_path)

    def spell(raw):
        rope = raw.pop("rope_parameters")
        raw["rope_theta"] = rope.pop("rope_theta")
        raw["rope_scaling"] = {key: rope.pop("rope_type")} | rope

    rewrite(tmp_path, spell)
    tokens = random_ids(17)
    reference = run_reference(reload(model_class, tmp_path, torch.float32), tokens).logits[0]
    assert_same(load(tmp_path).logits(tokens), reference, 1e-4)


def long_dynamic():
    """A model whose dynamic scaling starts after 8 tokens and ends at 32."""
    config = COMMON | {"max_position_embeddings": 8, "rope_parameters": {"rope_type": "dynamic", "factor": 4.0}}
    with TemporaryDirectory() as folder:
        return save_random(LlamaForCausalLM, LlamaConfig(**config), Path(folder), seed=1), load(Path(folder))


def test_dynamic_rotation_beyond_the_trained_context():
    theirs, ours = long_dynamic()
    for length in (7, 8, 9, 20, 32):  # rising: the reference keeps the slowest frequencies it has met
        assert_same(ours.logits(random_ids(length)), run_reference(theirs, random_ids(length)).logits[0], 1e-4)
    with pytest.raises(ValueError, match="context of 32"):
        ours.logits(random_ids(33))
    cache, memory = DynamicCache(config=theirs.config), ours.memory()
    for chunk in random_ids(20).split([3, 4, 5, *[1] * 8]):
        with torch.no_grad():
            cached = theirs(input_ids=chunk[None], past_key_values=cache).logits[0]
        assert_same(ours.logits(chunk, memory), cached, 1e-4)


@pytest.mark.parametrize("piece", [1, 7, 1000])
@pytest.mark.parametrize("options", [{}, {"draft": "ngram"}, {"draft": "self"}], ids=str)
def test_dynamic_rotation_of_a_prompt_follows_its_length_not_its_pieces(piece, options, monkeypatch):
    """Read in pieces, drafted for and rolled back: the frequencies are those of the reference's `generate`."""
    for module in ("engine", "drafters"):
        monkeypatch.setattr(f"sparing.decoding.{module}.PIECE", piece)
    theirs, ours = long_dynamic()
    options = options | ({"draft": ours} if options.get("draft") == "self" else {})
    prompts = [random_ids(5, seed=1), random_ids(20, seed=2)]
    events = list(
        generate(ours, [prompt.tolist() for prompt in prompts], max_new_tokens=10, temperature=0.0, **options)
    )
    for row, prompt in enumerate(prompts):
        theirs.model.rotary_emb = type(theirs.model.rotary_emb)(theirs.config)  # which remembers its longest text
        whole = theirs.generate(prompt[None], max_new_tokens=10, do_sample=False, eos_token_id=None)[0]
        said = [i for event in events if isinstance(event, Commit) and event.row == row for i in event.ids]
        assert said == whole[len(prompt) :].tolist()


def test_dynamic_rotation_of_a_row_does_not_depend_on_others():
    _, ours = long_dynamic()
    rows = [random_ids(length, seed=length) for length in (5, 20, 31)]
    memories = [ours.memory() for _ in rows]
    for cut in (lambda row: row[:-1], lambda row: row[-1:]):  # empty memories, then filled ones
        hidden = ours.run([Row(cut(row), memory) for row, memory in zip(rows, memories, strict=True)])
        logits = ours.head(hidden).split([len(cut(row)) for row in rows])
        for mine, row, memory in zip(logits, rows, memories, strict=True):
            alone = run_chunked(ours, row, [len(row) - 1, 1])
            assert_same(mine, alone[memory.length : memory.length + len(mine)], 1e-5)
            memory.commit(len(mine))


@pytest.mark.parametrize("case", ["llama, biased attention", "mistral, window", "qwen3"])
def test_only_wanted_positions(case):
    theirs, ours = pair(case)
    tokens = random_ids(17)
    reference = run_reference(theirs, tokens).logits[0]
    for wanted in (1, 4):
        hidden = ours.run([Row(tokens, ours.memory(), wanted=wanted)])
        assert_same(ours.head(hidden), reference[-wanted:], 1e-4)
