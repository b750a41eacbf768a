"""A checkpoint in few bits: read back, by ourselves and by transformers; interrupted, killed, refused."""

import json
import signal
import subprocess
import sys

import pytest
import torch

import sparing
from sparing.checkpoint import open_checkpoint, save_weights, write_json
from sparing.checkpoint.packed import PackedTensors
from sparing.config import parse_config
from sparing.models.loading import build
from sparing.quantize import convert as module
from sparing.quantize.convert import REPORT, quantize
from sparing.quantize.formats import FORMATS
from sparing.quantize.nvfp4 import nvfp4_quantize, tensor_scale
from sparing.quantize.weight import PackedWeight
from tests.checkpoint.test_write import Disk
from tests.conformance.reference import randomise
from tests.models.test_packed_loading import MODELS

LLAMA = MODELS["llama"] | {"num_hidden_layers": 2, "dtype": "bfloat16"}
TOKENS = torch.arange(12)
NEMOTRON = {
    "model_type": "nemotron_h",
    "dtype": "bfloat16",
    "vocab_size": 61,
    "hidden_size": 64,
    "hybrid_override_pattern": "ME*",
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "intermediate_size": 96,
    "ssm_state_size": 16,
    "mamba_num_heads": 4,
    "mamba_head_dim": 16,
    "n_groups": 2,
    "conv_kernel": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "moe_shared_expert_intermediate_size": 64,
    "moe_latent_size": 32,
}


def save(folder, config):
    model = build(parse_config(config)).to_empty(device="cpu")
    randomise(model, seed=0)
    save_weights(folder, {n: t.detach().bfloat16() for n, t in model.state_dict().items()})
    write_json(folder / "config.json", config)
    (folder / "merges.txt").write_text("a b\n")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save(tmp_path_factory.mktemp("llama") / "m", LLAMA)


def files(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_a_written_folder_is_what_loading_packs(tmp_path, name, format):
    """The same bits, hence the same logits; and `plan` counts what the file makes `load` hold.

    But for the head, which is dense in the file and packed where that is asked for. Only scale_2 of NVFP4 is another
    where matrices share it in the file.
    """
    source = save(tmp_path / "source", MODELS[name] | {"dtype": "bfloat16"})
    errors = quantize(source, tmp_path / "out", format, scales="max")
    stored, packed = (sparing.load(path, weights=format) for path in (tmp_path / "out", source))
    held = dict(packed.named_buffers())
    assert held.keys() == dict(stored.named_buffers()).keys()
    if format != "nvfp4":
        assert torch.equal(stored.logits(TOKENS), packed.logits(TOKENS))
        assert all(
            torch.equal(b.reshape(-1).view(torch.uint8), held[n].reshape(-1).view(torch.uint8))
            for n, b in stored.named_buffers()
        )
    counted = sparing.plan(source, context=1, weights=format)
    assert sparing.plan(tmp_path / "out", context=1, weights=format).weight_bytes == counted.weight_bytes
    as_stored = sparing.load(tmp_path / "out")
    nbytes = sum(t.nbytes for n, t in [*as_stored.named_parameters(), *as_stored.named_buffers()] if "scalar" not in n)
    assert sparing.plan(tmp_path / "out", context=1).weight_bytes == nbytes
    tensors = open_checkpoint(tmp_path / "out").tensors
    assert isinstance(tensors, PackedTensors)
    assert {n for n in tensors.names() if tensors.format(n)} == errors.keys()
    assert (tmp_path / "out" / "merges.txt").read_text() == "a b\n"


def test_a_hybrid_whose_experts_are_stored_one_by_one(tmp_path):
    """Each expert keeps its own tensor scale, in the file and in the stack it becomes a part of."""
    model = build(parse_config(NEMOTRON)).to_empty(device="cpu")
    randomise(model, seed=0)
    tensors = {}
    for name, value in model.state_dict().items():
        if ".experts." in name:
            each = {name.replace("experts.", f"experts.{e}.") + ".weight": w for e, w in enumerate(value)}
        else:
            each = {name: value}
        tensors |= {n: t.detach().bfloat16() for n, t in each.items()}
    save_weights(tmp_path / "source", tensors)
    write_json(tmp_path / "source" / "config.json", NEMOTRON)
    errors = quantize(tmp_path / "source", tmp_path / "out", "nvfp4")
    assert sum(".experts." in name for name in errors) == 8 and "backbone.layers.1.mixer.gate.weight" not in errors
    stored, packed = (sparing.load(tmp_path / name, weights="nvfp4") for name in ("out", "source"))
    scales = stored.get_buffer("backbone.layers.1.mixer.experts.up_proj.scale_2")
    assert scales.shape == (4,) and len(scales.unique()) == 4
    assert stored.logits(TOKENS).isfinite().all() and packed.logits(TOKENS).isfinite().all()
    counted = {sparing.plan(tmp_path / "out", context=1, weights="nvfp4").weight_bytes}
    counted.add(sparing.plan(tmp_path / "source", context=1, weights="nvfp4").weight_bytes)
    dense = sum(p.nbytes for p in stored.parameters())
    counted.add(dense + sum(m.nbytes for m in stored.modules() if isinstance(m, PackedWeight)))
    assert len(counted) == 1


def test_errors_are_those_of_the_weights(folder, tmp_path):
    errors = quantize(folder, tmp_path / "out", "nvfp4")
    name = "model.layers.1.mlp.down_proj.weight"
    w = open_checkpoint(folder).tensors.read(name).double()
    back = open_checkpoint(tmp_path / "out").tensors.read(name).double()
    sqnr = 10 * torch.log10(w.square().sum() / (w - back).square().sum()).item()
    assert errors[name].sqnr_db == pytest.approx(sqnr, abs=1e-3) and 21 < sqnr < 23
    assert errors[name].cosine == pytest.approx(torch.cosine_similarity(w.ravel(), back.ravel(), 0).item(), abs=1e-6)
    assert errors[name].shape == (64, 96)
    assert json.loads((tmp_path / "out" / REPORT).read_text())["errors"][name]["sqnr_db"] == errors[name].sqnr_db


def test_nvfp4_is_written_as_modelopt_does(folder, tmp_path):
    """Names, types and shapes of a weight-only export, and both of its tables."""
    from safetensors.torch import load_file

    quantize(folder, tmp_path / "out", "nvfp4", scales="four_over_six")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    weights = [open_checkpoint(folder).tensors.read(f"model.layers.0.self_attn.{p}_proj.weight") for p in "qkv"]
    scale_2 = tensor_scale(torch.cat(weights))
    codes, scale, _ = nvfp4_quantize(weights[0], "four_over_six", scale_2)
    prefix = "model.layers.0.self_attn.q_proj."
    assert {n.removeprefix(prefix) for n in stored if n.startswith(prefix)} == {
        "weight",
        "weight_scale",
        "weight_scale_2",
    }
    assert torch.equal(stored[f"{prefix}weight"], codes)
    assert stored[f"{prefix}weight_scale"].dtype == torch.float8_e4m3fn
    assert torch.equal(stored[f"{prefix}weight_scale"].float(), scale.float())
    assert torch.equal(stored[f"{prefix}weight_scale_2"], scale_2)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    table = json.loads((tmp_path / "out" / "hf_quant_config.json").read_text())["quantization"]
    assert config["quantization_config"]["quant_method"] == "modelopt"
    assert config["quantization_config"]["quant_algo"] == table["quant_algo"] == "W4A16_NVFP4"
    assert config["quantization_config"]["ignore"] == table["exclude_modules"] == ["lm_head", "model.embed_tokens"]
    assert {k: v for k, v in config.items() if k != "quantization_config"} == LLAMA


@pytest.mark.parametrize("format", ["int8", "int4", "mxfp4", "fp8"])
def test_transformers_reads_the_same_weights(folder, tmp_path, format):
    """Through compressed-tensors, which rounds what it dequantises to bfloat16; and from them come the same logits."""
    from transformers import CompressedTensorsConfig, LlamaForCausalLM

    quantize(folder, tmp_path / "out", format)
    options = CompressedTensorsConfig(dequantize=True)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, quantization_config=options)
    ours = open_checkpoint(tmp_path / "out").tensors
    assert isinstance(ours, PackedTensors)
    compared = [n for n in ours.names() if ours.format(n)]
    for name in compared:
        assert torch.equal(theirs.get_parameter(name), ours.read(name).bfloat16())
    assert len(compared) == 14

    save_weights(tmp_path / "dense", {n: ours.read(n).bfloat16() for n in ours.names()})
    write_json(tmp_path / "dense" / "config.json", LLAMA)
    dense = sparing.load(tmp_path / "dense", dtype="float32").logits(TOKENS)
    torch.testing.assert_close(dense, theirs.float()(TOKENS[None]).logits[0], atol=1e-5, rtol=1e-5)
    packed = sparing.load(tmp_path / "out", dtype="float32").logits(TOKENS)
    torch.testing.assert_close(packed, dense, atol=0.02 * dense.abs().max().item(), rtol=0)


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
def test_a_head_that_is_the_embedding_is_named_among_what_is_dense(tmp_path, format):
    """It is a linear layer for transformers, which would look for its scales."""
    from transformers import LlamaForCausalLM

    quantize(save(tmp_path / "m", LLAMA | {"tie_word_embeddings": True}), tmp_path / "out", format)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(theirs.lm_head.weight, sparing.load(tmp_path / "m").output_table())


SCRIPT = """
import os, signal, sys
from sparing.quantize import convert
convert.SHARD_BYTES = 20_000
seen = []
def log(progress):
    seen.append(progress)
    if len(seen) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
convert.quantize(sys.argv[1], sys.argv[2], "nvfp4", log=log)
"""


def test_a_killed_run_goes_on_to_the_same_bytes(folder, tmp_path, monkeypatch):
    done = subprocess.run([sys.executable, "-c", SCRIPT, str(folder), str(tmp_path / "killed")], check=False)
    assert done.returncode == -signal.SIGKILL
    shards = {path.name for path in (tmp_path / "killed").glob("model-*")}
    assert shards and not (tmp_path / "killed" / "config.json").exists()
    with pytest.raises(sparing.CheckpointError, match=r"no config\.json"):
        sparing.load(tmp_path / "killed")

    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    written = []
    quantize(folder, tmp_path / "whole", "nvfp4", log=lambda p: written.append(p.name))
    resumed = []
    quantize(folder, tmp_path / "killed", "nvfp4", log=lambda p: resumed.append(p.name))
    assert resumed == written[len(written) - len(resumed) :] and 0 < len(resumed) < len(written)
    assert files(tmp_path / "killed") == files(tmp_path / "whole")
    assert sparing.load(tmp_path / "killed").logits(TOKENS).isfinite().all()
    again = []
    quantize(folder, tmp_path / "killed", "nvfp4", log=lambda p: again.append(p.name))
    assert again == []


def test_an_interrupt_leaves_whole_shards_alone(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)

    def log(progress):
        if progress.done > progress.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(folder, tmp_path / "out", "int8", log=log)
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    assert set(files(tmp_path / "out")) == {REPORT, *report["shards"]}


@pytest.mark.parametrize("full_at", [*range(8), 10])
def test_a_full_disk_leaves_whole_shards_or_nothing(folder, tmp_path, monkeypatch, full_at):
    """At any file: what stays is what the same call goes on from, and a folder that was made for nothing is gone."""
    monkeypatch.setattr(module, "SHARD_BYTES", 40_000)
    out = tmp_path / "made" / "too"
    with monkeypatch.context() as patch:
        patch.setattr("sparing.checkpoint.write.os.fsync", Disk(full_at))
        with pytest.raises(sparing.CheckpointError, match=r"No space left on device.*Free some space"):
            quantize(folder, out, "int8")
    if full_at < 6:  # the report, a shard, the report again: each one and then its folder
        assert list(tmp_path.iterdir()) == []
    else:
        assert set(files(out)) == {REPORT, *json.loads((out / REPORT).read_text())["shards"]} > {REPORT}
    quantize(folder, out, "int8")
    quantize(folder, tmp_path / "whole", "int8")
    assert files(out) == files(tmp_path / "whole")


def test_progress_counts_every_number_once(folder, tmp_path):
    seen = []
    errors = quantize(folder, tmp_path / "out", "int4", log=seen.append)
    total = sum(p.numel() for p in sparing.load(folder).parameters())
    assert [p.total for p in seen] == [total] * len(seen) and seen[-1].done == total
    assert {p.name: p.error for p in seen if p.error} == errors


def test_refusals(folder, tmp_path):
    with pytest.raises(ValueError, match="weights='int3' is not known, use int8, int4"):
        quantize(folder, tmp_path / "out", "int3")
    quantize(folder, tmp_path / "out", "int8")
    with pytest.raises(sparing.CheckpointError, match="holds another quantisation; delete it or choose another"):
        quantize(folder, tmp_path / "out", "int4")
    with pytest.raises(sparing.CheckpointError, match="is already quantised; give the folder of the original"):
        quantize(tmp_path / "out", tmp_path / "twice", "int8")
    with pytest.raises(sparing.CheckpointError, match=r"is not empty \(config.json\)"):
        quantize(folder, folder, "int8")
    small = save(tmp_path / "small", MODELS["odd"])
    with pytest.raises(sparing.CheckpointError, match="no matrix has inputs in multiples of 32"):
        quantize(small, tmp_path / "other", "int4")


def test_zeros_have_no_error(tmp_path):
    source = save(tmp_path / "m", LLAMA)
    tensors = {
        n: torch.zeros_like(open_checkpoint(source).tensors.read(n)) for n in open_checkpoint(source).tensors.names()
    }
    save_weights(source, tensors)
    errors = quantize(source, tmp_path / "out", "nvfp4")
    assert {(e.sqnr_db, e.cosine) for e in errors.values()} == {(None, 1.0)}
    assert (sparing.load(tmp_path / "out").logits(TOKENS) == 0).all()
