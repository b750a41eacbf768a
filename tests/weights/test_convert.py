"""A checkpoint in few bits: read back, by ourselves and by transformers; interrupted, killed, refused."""

import json
import re
import signal
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import sparing
from sparing.checkpoint import open_checkpoint, save_weights, write_json
from sparing.config.formats import FORMATS
from sparing.weights import convert as module
from sparing.weights.convert import REPORT, quantize
from sparing.weights.dialect import unread
from sparing.weights.fp8 import fp8_quantize
from sparing.weights.nvfp4 import nvfp4_quantize, tensor_scale
from sparing.weights.packed_files import PackedTensors
from sparing.weights.stored import stored_weights
from sparing.weights.weight import PackedWeight
from tests.checkpoint.test_write import Disk
from tests.tiny import PACKABLE, built, saved

LLAMA, HYBRID = PACKABLE["llama"] | {"dtype": "bfloat16"}, PACKABLE["hybrid"]
TOKENS = torch.arange(12)
READ = [("int8", None), ("int4", None), ("mxfp4", None), ("fp8", "row"), ("fp8", "tensor"), ("fp8", "block")]


def save(folder, config):
    """A checkpoint in bfloat16, with a file beside its weights."""
    saved(config | {"dtype": "bfloat16"}, folder)
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

    Except for the head, which is dense in the file and packed where that is asked for. Only scale_2 of NVFP4 is another
    where matrices share it in the file.
    """
    source = save(tmp_path / "source", PACKABLE[name])
    errors = quantize(source, tmp_path / "out", format, scales="max" if format == "nvfp4" else None)
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
    tensors = stored_weights(open_checkpoint(tmp_path / "out"))
    assert isinstance(tensors, PackedTensors)
    assert {n for n in tensors.names() if tensors.format(n)} == errors.keys()
    assert (tmp_path / "out" / "merges.txt").read_text() == "a b\n"


def test_a_hybrid_whose_experts_are_stored_one_by_one(tmp_path):
    """Each expert keeps its own tensor scale, in the file and in the stack it becomes a part of."""
    model = built(HYBRID)
    tensors = {}
    for name, value in model.state_dict().items():
        if ".experts." in name:
            each = {name.replace("experts.", f"experts.{e}.") + ".weight": w for e, w in enumerate(value)}
        else:
            each = {name: value}
        tensors |= {n: t.detach().bfloat16() for n, t in each.items()}
    save_weights(tmp_path / "source", tensors)
    write_json(tmp_path / "source" / "config.json", HYBRID)
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


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_a_stack_of_experts_is_written_expert_by_expert(tmp_path, format, monkeypatch):
    """As if it had been stored so, in one file or in several."""
    source = save(tmp_path / "source", HYBRID)
    one_by_one = {}
    for name, value in load_file(source / "model.safetensors").items():
        if ".experts." in name:
            one_by_one |= {
                name.replace("experts.", f"experts.{e}.") + ".weight": w.clone() for e, w in enumerate(value)
            }
        else:
            one_by_one[name] = value
    save_weights(tmp_path / "each", one_by_one)
    write_json(tmp_path / "each" / "config.json", HYBRID)
    errors = quantize(source, tmp_path / "out", format)
    assert errors == quantize(tmp_path / "each", tmp_path / "same", format)
    expected = load_file(tmp_path / "same" / "model.safetensors")
    assert (tmp_path / "out" / "model.safetensors").read_bytes() == (
        tmp_path / "same" / "model.safetensors"
    ).read_bytes()
    assert {f"backbone.layers.1.mixer.experts.{e}.down_proj.weight" for e in range(4)} <= errors.keys()

    monkeypatch.setattr(module, "SHARD_BYTES", 10_000)
    assert quantize(source, tmp_path / "shards", format) == errors
    index = json.loads((tmp_path / "shards" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == expected.keys() and len(set(index.values())) > 3
    shards = {n: t for file in set(index.values()) for n, t in load_file(tmp_path / "shards" / file).items()}
    assert all(
        torch.equal(shards[n].view(-1).view(torch.uint8), t.view(-1).view(torch.uint8)) for n, t in expected.items()
    )


def test_the_drafting_head_stays_dense_and_its_experts_are_written_one_by_one(tmp_path):
    quantize("hybrid", tmp_path / "out", "nvfp4", scales="max")
    stored, original = stored_weights(open_checkpoint(tmp_path / "out")), stored_weights(open_checkpoint("hybrid"))
    for name in original.names():
        if name.startswith("mtp."):
            is_stack = ".experts." in name
            names = [name.replace("experts.", f"experts.{e}.") + ".weight" for e in range(16)] if is_stack else [name]
            each = torch.stack([stored.read(n) for n in names]) if is_stack else stored.read(name)
            assert torch.equal(each, original.read(name))
            assert not is_stack or name not in stored.names()
    ignored = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]["ignore"]
    assert "mtp.layers.1.mixer.experts.15.up_proj" in ignored
    model = sparing.load(tmp_path / "out")
    texts = [list(sparing.generate(model, "The fox", max_new_tokens=8, temperature=0, draft=d)) for d in (None, "mtp")]
    assert len({tuple(i for e in events if isinstance(e, sparing.Commit) for i in e.ids) for events in texts}) == 1


@pytest.mark.parametrize(("format", "scales"), [("fp8", "tensor"), ("fp8", "row"), ("fp8", "block"), ("nvfp4", "2d")])
def test_scales_are_those_of_the_whole_matrix(tmp_path, monkeypatch, format, scales):
    """Read in tiles that end anywhere. Read back they are as they were written, and native kernels know them."""
    monkeypatch.setattr("sparing.weights.load.TILE_BYTES", 30_000)
    source = save(tmp_path / "source", LLAMA | {"hidden_size": 160, "intermediate_size": 320})
    quantize(source, tmp_path / "out", format, scales=scales)
    dense, packed = stored_weights(open_checkpoint(source)), stored_weights(open_checkpoint(tmp_path / "out"))
    model = sparing.load(tmp_path / "out")
    assert isinstance(packed, PackedTensors)
    for layer in ("model.layers.0.", "model.layers.1."):
        for part, names in {"self_attn": ("q_proj", "k_proj", "v_proj"), "mlp": ("down_proj",)}.items():
            weights = {f"{layer}{part}.{name}.weight": dense.read(f"{layer}{part}.{name}.weight") for name in names}
            joined = torch.cat(list(weights.values()))
            for name, w in weights.items():
                if format == "nvfp4":
                    codes, scale, scale_2 = nvfp4_quantize(w, scales, tensor_scale(joined))
                    assert torch.equal(packed.packed(name).get_buffer("scale_2"), scale_2)
                elif scales == "tensor":
                    scale = fp8_quantize(joined.float(), "tensor")[1]
                    codes = (w.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
                else:
                    codes, scale = fp8_quantize(w.float(), scales)
                for held in (packed.packed(name), model.get_submodule(name)):
                    assert isinstance(held, PackedWeight) and held.is_native
                    assert torch.equal(held.codes.float(), codes.float())
                    assert held.scale.shape == scale.shape and torch.equal(held.scale.float(), scale.float())
    exact = sparing.load(source).logits(TOKENS).float()
    assert (model.logits(TOKENS) - exact).norm() < {"fp8": 0.1, "nvfp4": 0.4}[format] * exact.norm()


@pytest.mark.parametrize("width", [64, 128])
def test_blocks_across_gate_and_up_stay_one_tensor(tmp_path, width):
    """Experts of 64 rows of each; of 128 they are two as in every other format. Both are read back."""
    source = save(tmp_path / "source", PACKABLE["gemma"] | {"moe_intermediate_size": width})
    errors = quantize(source, tmp_path / "out", "fp8", scales="block")
    first = "model.layers.0.experts.0."
    names = {n.removeprefix(first) for n in load_file(tmp_path / "out" / "model.safetensors") if n.startswith(first)}
    modules = ("gate_up_proj", "down_proj") if width == 64 else ("gate_proj", "up_proj", "down_proj")
    assert names == {f"{module}.{part}" for module in modules for part in ("weight", "weight_scale")}
    tensors, dense = stored_weights(open_checkpoint(tmp_path / "out")), stored_weights(open_checkpoint(source))
    assert isinstance(tensors, PackedTensors) and errors.keys() == {n for n in tensors.names() if tensors.format(n)}
    stored = tensors.packed("model.layers.0.experts.3.gate_up_proj.weight")
    codes, scale = fp8_quantize(dense.read("model.layers.0.experts.gate_up_proj")[3].float(), "block")
    assert torch.equal(stored.codes.float(), codes.float()) and torch.equal(stored.scale, scale)
    save_weights(tmp_path / "dense", {n: tensors.read(n) for n in tensors.names()})
    write_json(tmp_path / "dense" / "config.json", PACKABLE["gemma"] | {"moe_intermediate_size": width})
    packed, exact = (sparing.load(tmp_path / name, dtype="float32").logits(TOKENS) for name in ("out", "dense"))
    torch.testing.assert_close(packed, exact, atol=2e-4, rtol=1e-4)


def test_matrices_of_zeros_take_the_scale_of_those_they_are_joined_to(tmp_path):
    source = save(tmp_path / "source", LLAMA)
    tensors = load_file(source / "model.safetensors")
    for name in tensors:
        if "k_proj" in name:
            tensors[name].zero_()
    save_weights(source, tensors)
    errors = quantize(source, tmp_path / "out", "fp8", scales="tensor")
    assert errors["model.layers.0.self_attn.q_proj.weight"].sqnr_db > 25
    assert errors["model.layers.0.self_attn.k_proj.weight"].sqnr_db is None


def test_errors_are_those_of_the_weights(folder, tmp_path):
    errors = quantize(folder, tmp_path / "out", "nvfp4")
    name = "model.layers.1.mlp.down_proj.weight"
    w = stored_weights(open_checkpoint(folder)).read(name).double()
    back = stored_weights(open_checkpoint(tmp_path / "out")).read(name).double()
    sqnr = 10 * torch.log10(w.square().sum() / (w - back).square().sum()).item()
    assert errors[name].sqnr_db == pytest.approx(sqnr, abs=1e-3) and 21 < sqnr < 23
    assert errors[name].cosine == pytest.approx(torch.cosine_similarity(w.ravel(), back.ravel(), 0).item(), abs=1e-6)
    assert errors[name].shape == (64, 96)
    assert json.loads((tmp_path / "out" / REPORT).read_text())["errors"][name]["sqnr_db"] == errors[name].sqnr_db


def test_nvfp4_is_written_as_modelopt_does(folder, tmp_path):
    """Names, types and shapes of a weight-only export, and both of its tables."""
    quantize(folder, tmp_path / "out", "nvfp4", scales="four_over_six")
    stored = load_file(tmp_path / "out" / "model.safetensors")
    weights = [stored_weights(open_checkpoint(folder)).read(f"model.layers.0.self_attn.{p}_proj.weight") for p in "qkv"]
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


@pytest.mark.parametrize(("format", "scales"), READ)
def test_transformers_reads_the_same_weights(folder, tmp_path, format, scales):
    """Through compressed-tensors, which rounds what it dequantises to bfloat16; and from them come the same logits."""
    from transformers import CompressedTensorsConfig, LlamaForCausalLM

    quantize(folder, tmp_path / "out", format, scales=scales)
    options = CompressedTensorsConfig(dequantize=True)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, quantization_config=options)
    ours = stored_weights(open_checkpoint(tmp_path / "out"))
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


@pytest.mark.parametrize(("format", "scales"), [case for case in READ if case[0] != "int8"])
def test_transformers_reads_experts_of_a_stack(tmp_path, format, scales):
    """Which it stacks again; blocks of scales only where an expert is one block."""
    from transformers import CompressedTensorsConfig, NemotronHForCausalLM

    quantize(save(tmp_path / "m", HYBRID), tmp_path / "out", format, scales=scales)
    options = CompressedTensorsConfig(dequantize=True)
    theirs = NemotronHForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16, quantization_config=options)
    ours = stored_weights(open_checkpoint(tmp_path / "out"))
    assert isinstance(ours, PackedTensors)
    for name in ours.names():
        path = name.replace("backbone.", "model.")
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", path):
            found = theirs.get_parameter(f"{match[1]}.{match[3]}")[int(match[2])]
        else:
            found = theirs.state_dict()[path]
        assert torch.equal(found, ours.read(name).to(found.dtype))
    assert sum(".experts." in name and ours.format(name) == format for name in ours.names()) == 2 * 4

    save_weights(tmp_path / "dense", {n: ours.read(n).bfloat16() for n in ours.names()})
    write_json(tmp_path / "dense" / "config.json", HYBRID)
    dense = sparing.load(tmp_path / "dense", dtype="float32")
    for part in theirs.modules():
        if hasattr(part, "time_step_limit"):  # transformers reads `time_step_min` instead
            part.time_step_limit = dense.config.time_step_limit
    logits = theirs.float()(TOKENS[None]).logits[0]
    torch.testing.assert_close(dense.logits(TOKENS), logits, atol=1e-4, rtol=1e-4)


WIDE = {"hidden_size": 256, "moe_latent_size": 128, "moe_intermediate_size": 256}


@pytest.mark.parametrize(
    ("config", "format", "scales", "lost"),
    [
        (HYBRID, "int8", None, "experts in int8"),
        (HYBRID | WIDE, "fp8", "block", "experts in FP8 with scales of blocks"),
        (PACKABLE["gemma"] | {"architectures": ["Gemma4ForCausalLM"]}, "fp8", "row", "packed experts with gates"),
    ],
)
def test_what_transformers_does_not_read_is_said(tmp_path, config, format, scales, lost):
    """A later one that reads it shows here: `dialect.unread` and docs/weights.md say otherwise."""
    from transformers import AutoModelForCausalLM, CompressedTensorsConfig

    errors = quantize(save(tmp_path / "m", config), tmp_path / "out", format, scales=scales)
    assert unread({name: error.shape for name, error in errors.items()}, format, scales) == lost
    options = CompressedTensorsConfig(dequantize=True)
    try:
        _, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / "out", dtype=torch.bfloat16, quantization_config=options, output_loading_info=True
        )
    except RuntimeError as error:
        assert "conversion of the weights" in str(error)  # noqa: PT017
    else:
        assert any(".experts." in name for name in info["missing_keys"])
    assert sparing.load(tmp_path / "out").logits(TOKENS).isfinite().all()


@pytest.mark.parametrize("format", ["int8", "mxfp4"])
def test_a_head_that_is_the_embedding_is_named_among_what_is_dense(tmp_path, format):
    """It is a linear layer for transformers, which would look for its scales."""
    from transformers import LlamaForCausalLM

    quantize(save(tmp_path / "m", LLAMA | {"tie_word_embeddings": True}), tmp_path / "out", format)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.bfloat16)
    assert torch.equal(theirs.lm_head.weight, sparing.load(tmp_path / "m").output_table())


SCRIPT = """
import os, signal, sys
from sparing.weights import convert
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
    for format, scales in [("int4", "mse"), ("fp8", "2d"), ("nvfp4", "row"), ("nvfp4", "best"), ("fp8", "")]:
        message = f"scales='{scales}' is not for {format}: nvfp4 takes max, .*2d and fp8 takes tensor, row, block"
        with pytest.raises(ValueError, match=message):
            quantize(folder, tmp_path / "out", format, scales=scales)
    assert not (tmp_path / "out").exists()
    quantize(folder, tmp_path / "out", "int8")
    with pytest.raises(sparing.CheckpointError, match="holds another quantisation; delete it or choose another"):
        quantize(folder, tmp_path / "out", "int4")
    with pytest.raises(sparing.CheckpointError, match="is already quantised; give the folder of the original"):
        quantize(tmp_path / "out", tmp_path / "twice", "int8")
    with pytest.raises(sparing.CheckpointError, match=r"is not empty \(config.json\)"):
        quantize(folder, folder, "int8")
    odd = save(tmp_path / "odd", LLAMA | {"intermediate_size": 72})
    with pytest.raises(sparing.CheckpointError, match=r"proj\.weight has 72 rows, scales='2d' needs a multiple of 16"):
        quantize(odd, tmp_path / "odd out", "nvfp4", scales="2d")
    assert not (tmp_path / "odd out").exists()
    small = save(tmp_path / "small", PACKABLE["odd"])
    with pytest.raises(sparing.CheckpointError, match="no matrix has inputs in multiples of 32"):
        quantize(small, tmp_path / "other", "int4")


def test_zeros_have_no_error(tmp_path):
    source = save(tmp_path / "m", LLAMA)
    tensors = {
        n: torch.zeros_like(stored_weights(open_checkpoint(source)).read(n))
        for n in stored_weights(open_checkpoint(source)).names()
    }
    save_weights(source, tensors)
    errors = quantize(source, tmp_path / "out", "nvfp4")
    assert {(e.sqnr_db, e.cosine) for e in errors.values()} == {(None, 1.0)}
    assert (sparing.load(tmp_path / "out").logits(TOKENS) == 0).all()
