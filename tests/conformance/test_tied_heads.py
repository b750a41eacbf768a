"""A table that is embedding and head: stored once under either name, twice, or beside a head that is another."""

import pytest
import torch
from safetensors.torch import save_file, save_model
from transformers import (
    Gemma4ForCausalLM,
    Gemma4TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import sparing
from sparing.checkpoint import write_json
from sparing.errors import CheckpointError
from sparing.inspection import inspect
from sparing.weights.convert import quantize
from tests.conformance.reference import assert_same, load, reload, rewrite, run_reference, save_random
from tests.tiny import CONFIGS, DRAFTER, ENDLESS, FULL, SIZES, SLIDING, VOCAB, WINDOW, built, random_ids

COMMON = SIZES | ENDLESS | {"num_hidden_layers": 2, "head_dim": 8, "tie_word_embeddings": True}
GEMMA = {
    "global_head_dim": 16,
    "layer_types": [SLIDING, FULL],
    "hidden_size_per_layer_input": 6,
    "vocab_size_per_layer_input": VOCAB,
    "sliding_window": WINDOW,
}
MODELS = {
    "llama": (LlamaForCausalLM, LlamaConfig(**COMMON)),
    "qwen3": (Qwen3ForCausalLM, Qwen3Config(**COMMON)),
    "gemma4": (Gemma4ForCausalLM, Gemma4TextConfig(**COMMON | GEMMA)),
}
TABLE, HEAD = "model.embed_tokens.weight", "lm_head.weight"


def other_head(tensors):
    return tensors | {HEAD: tensors[TABLE].flip(0).contiguous()}


WAYS = {
    "once, as the embedding": lambda tensors: tensors,
    "once, as the head": lambda tensors: {HEAD if name == TABLE else name: t for name, t in tensors.items()},
    "twice": lambda tensors: tensors | {HEAD: tensors[TABLE].clone()},
    "beside another head": other_head,
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", MODELS)
def test_as_the_reference_reads_it(name, way, tmp_path):
    model_class, config = MODELS[name]
    save_random(model_class, config, tmp_path, seed=1)
    rewrite(tmp_path, tensors=WAYS[way])
    tokens, ours = random_ids(17), load(tmp_path)
    reference = run_reference(reload(model_class, tmp_path, torch.float32), tokens).logits[0]
    assert_same(ours.logits(tokens), reference, 1e-4)
    is_own = way == "beside another head"
    assert (ours.lm_head is not None) == is_own  # equal copies are one table in memory
    held = sum(p.numel() for n, p in ours.named_parameters() if "scalar" not in n)
    found = inspect(tmp_path)
    assert not found.problems
    assert found.parameters == sparing.plan(tmp_path, context=8).to_dict()["parameters"] == held


def test_what_save_model_writes(tmp_path):
    model_class, config = MODELS["llama"]
    theirs = save_random(model_class, config, tmp_path, seed=1)
    save_model(theirs, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    assert_same(load(tmp_path).logits(random_ids(9)), run_reference(theirs, random_ids(9)).logits[0], 1e-4)


@pytest.mark.parametrize("weights", ["int8", "fp8"])
@pytest.mark.parametrize("way", WAYS)
def test_packed(way, weights, tmp_path):
    """Packing matrices leaves both tables as they are; packed while loading, the head that counts is packed."""
    folder, out = tmp_path / "model", tmp_path / "packed"
    folder.mkdir()
    model_class, config = MODELS["llama"]
    save_random(model_class, config, folder, seed=1)
    rewrite(folder, tensors=WAYS[way])
    dense = load(folder)
    quantize(folder, out, weights=weights)
    stored, loaded = load(out), sparing.load(folder, weights=weights, device="cpu")
    assert (stored.lm_head is not None) == (loaded.lm_head is not None) == (way == "beside another head")
    assert torch.equal(stored.output_table(), dense.output_table())
    tokens = random_ids(9)
    expected = dense.logits(tokens)
    for model in (stored, loaded):
        assert (model.logits(tokens) - expected).abs().max() < 0.25 * expected.abs().max()
        bytes_held = sparing.plan(model.path, context=8, weights=model.weights).to_dict()["weight_bytes"]
        assert bytes_held > 0


def tensors_of(config, folder):
    """A random model of a config, whose config.json alone is written: its tensors by name."""
    write_json(folder / "config.json", config)
    return {name: tensor.contiguous() for name, tensor in built(config).state_dict().items()}


def test_a_denoiser_has_one_table(tmp_path):
    tensors = tensors_of(CONFIGS["denoiser"], tmp_path)
    table, norm = "model.decoder.embed_tokens.weight", "model.decoder.norm.weight"
    copy = "model.encoder.language_model.norm.weight"
    once = {HEAD if name == table else name: t for name, t in tensors.items()}
    for same in (tensors, tensors | {HEAD: tensors[table].clone(), copy: tensors[norm].clone()}, once):
        save_file(same, tmp_path / "model.safetensors")
        assert torch.equal(load(tmp_path).output_table(), tensors[table])
    save_file(tensors | {HEAD: tensors[table] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"lm_head.weight differs from the embedding"):
        load(tmp_path)
    save_file(tensors | {copy: tensors[norm] + 1}, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"{copy} differs from {norm}"):
        load(tmp_path)


def test_a_drafter_looks_nothing_up(tmp_path):
    """What goes into it are its target's embeddings: of two tables in the file the head is the one that counts."""
    tensors = tensors_of(DRAFTER | {"backbone_hidden_size": 40}, tmp_path)
    head = tensors[TABLE].flip(0).contiguous()
    for each in (tensors | {HEAD: head}, {name: t for name, t in tensors.items() if name != TABLE} | {HEAD: head}):
        save_file(each, tmp_path / "model.safetensors")
        assert torch.equal(load(tmp_path).output_table(), head)
        assert not inspect(tmp_path).problems
