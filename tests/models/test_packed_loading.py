"""`load(weights=...)`: what is packed, its bytes against `plan`, its logits, its peak memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import sparing
from sparing.checkpoint import save_weights, write_json
from sparing.config import parse_config
from sparing.config.formats import FORMATS, HEAD_FORMAT
from sparing.models.loading import build
from sparing.weights.weight import PackedWeight
from tests.tiny import CONFIGS, PACKABLE, built, saved

MODELS = {name: config for name, config in PACKABLE.items() if name != "hybrid"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for name, config in MODELS.items():
        saved(config, root / name)
    return root


def weights(model) -> dict[str, torch.Tensor | PackedWeight]:
    """Parameter name -> what stands for it."""
    found: dict[str, torch.Tensor | PackedWeight] = dict(model.named_parameters())
    return found | {name: module for name, module in model.named_modules() if isinstance(module, PackedWeight)}


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("name", sorted(MODELS))
def test_matrices_are_packed_and_plan_knows_their_bytes(folders, name, format):
    model, dense = sparing.load(folders / name, weights=format), sparing.load(folders / name)
    held = weights(model)
    assert held.keys() == dict(dense.named_parameters()).keys()
    roles = dense.roles()
    for parameter, value in held.items():
        if roles[parameter].is_head:
            assert isinstance(value, PackedWeight) and value.format == HEAD_FORMAT
            continue
        fits = value.shape[-1] % FORMATS[format].block == 0
        assert isinstance(value, PackedWeight) == (roles[parameter].is_matrix and fits)
    nbytes = sum(value.nbytes for value in held.values())
    assert sparing.plan(folders / name, context=1, weights=format).weight_bytes == nbytes
    assert nbytes < sum(p.nbytes for p in dense.parameters())


@pytest.mark.parametrize("format", sorted(FORMATS))
@pytest.mark.parametrize("name", sorted(MODELS))
def test_logits_are_those_of_the_dequantised_matrices(folders, name, format):
    packed, dense = sparing.load(folders / name, weights=format), sparing.load(folders / name)
    plain = dict(dense.named_parameters())
    for parameter, value in weights(packed).items():
        if isinstance(value, PackedWeight):
            plain[parameter].copy_(value.dequantize())
    tokens = torch.arange(12)
    assert torch.allclose(packed.logits(tokens), dense.logits(tokens), atol=2e-4)
    memory = packed.memory()
    steps = torch.cat([packed.logits([t], memory) for t in tokens.tolist()])
    assert torch.allclose(steps, packed.logits(tokens), atol=2e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_embedding_is_looked_up_row_by_row(folders, dtype):
    """In the model's type, which it has from the table: states and memories are of it."""
    model = sparing.load(folders / "gemma", weights="int4", dtype=dtype)
    table = model.output_table()
    assert isinstance(table, PackedWeight) and model.dtype == table.dtype == getattr(torch, dtype)
    ids = torch.tensor([[3, 60], [0, 3]])
    rows = model.model.embed_tokens(ids)
    assert torch.equal(rows, table.dequantize().to(model.dtype)[ids] * model.model.embed_tokens.scale())
    assert model.hidden_states([1, 2])[0].dtype == model.logits([1]).new_empty(0, dtype=model.dtype).dtype
    assert model.bfloat16().dtype == torch.bfloat16 and model.logits([1, 2, 3]).isfinite().all()


@pytest.mark.parametrize("format", sorted(FORMATS))
def test_tables_that_are_more_than_head_and_embedding_stay_dense(tmp_path, format):
    """DiffusionGemma mixes predictions from its table."""
    loaded = sparing.load(saved(CONFIGS["denoiser"], tmp_path), weights=format)
    assert isinstance(loaded.output_table(), torch.Tensor)
    held = sum(value.nbytes for value in weights(loaded).values())
    assert sparing.plan(tmp_path, context=1, weights=format).weight_bytes == held


def test_a_head_that_a_file_holds_packed_stays_so(folders, tmp_path):
    table = sparing.load(folders / "llama", weights="int8").output_table()
    assert isinstance(table, PackedWeight)
    tensors = dict(sparing.load(folders / "llama").named_parameters())
    tensors |= {"lm_head.weight": table.codes, "lm_head.weight_scale": table.scale[:, None]}
    save_weights(tmp_path, tensors)
    write_json(
        tmp_path / "config.json", MODELS["llama"] | {"quantization_config": {"quant_method": "compressed-tensors"}}
    )
    model = sparing.load(tmp_path)
    assert isinstance(model.output_table(), PackedWeight)
    assert torch.equal(model.output_table().dequantize(), table.dequantize())
    assert sparing.plan(tmp_path, context=1).weight_bytes == sum(value.nbytes for value in weights(model).values())


def test_more_bits_are_closer(folders):
    exact = sparing.load(folders / "llama").logits(torch.arange(20))
    error = {f: (sparing.load(folders / "llama", weights=f).logits(torch.arange(20)) - exact).norm() for f in FORMATS}
    assert error["int8"] < error["fp8"] < min(error["int4"], error["nvfp4"])
    assert max(error.values()) < 0.5 * exact.norm()


def test_a_packed_model_generates_and_moves(folders):
    model = sparing.load(folders / "gemma", weights="nvfp4", dtype="bfloat16")
    events = list(sparing.generate(model, [1, 2, 3], max_new_tokens=4, temperature=0))
    assert isinstance(events[-1], sparing.Done) and events[-1].reason == "length"
    before = weights(model)["model.layers.0.experts.gate_up_proj"].dequantize()
    model.float()
    after = weights(model)["model.layers.0.experts.gate_up_proj"]
    assert torch.equal(after.dequantize(), before)
    assert model.logits([1, 2, 3]).isfinite().all()


def test_numbers_that_are_not_finite_are_refused(folders, tmp_path):
    tensors = built(MODELS["llama"]).state_dict()
    tensors["model.layers.0.mlp.up_proj.weight"][3, 3] = float("nan")
    save_weights(tmp_path, tensors)
    write_json(tmp_path / "config.json", MODELS["llama"])
    with pytest.raises(sparing.CheckpointError, match=r"model.safetensors: .*up_proj.weight holds numbers"):
        sparing.load(tmp_path, weights="int8")


MEASURE = """
import sys, torch, sparing

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

sparing.load(sys.argv[1] + "/warm", weights=sys.argv[2]).logits([1])  # loads every library
open("/proc/self/clear_refs", "w").write("5")  # resets the high-water mark
before = status("VmRSS")
model = sparing.load(sys.argv[1] + "/big", weights=sys.argv[2])
print(status("VmHWM") - before, sum(t.nbytes for t in [*model.parameters(), *model.buffers()]))
"""


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from /proc")
@pytest.mark.parametrize("format", ["nvfp4", "int8"])
def test_peak_memory_is_the_packed_model_and_a_few_tiles(tmp_path: Path, format):
    """64 MiB in bfloat16; the loaded model is a quarter or a half of that."""
    big = MODELS["llama"] | {"hidden_size": 1024, "intermediate_size": 8192, "num_hidden_layers": 1}
    for name, config in {"warm": MODELS["llama"], "big": big}.items():
        model = build(parse_config(config)).bfloat16()
        save_weights(tmp_path / name, {n: torch.ones(t.shape, dtype=t.dtype) for n, t in model.state_dict().items()})
        (tmp_path / name / "config.json").write_text(json.dumps(config | {"dtype": "bfloat16"}))
    # glibc keeps up to 32 MiB of what was freed, now and then; with a fixed threshold it gives large pieces back.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "1000000"}
    command = [sys.executable, "-c", MEASURE, str(tmp_path), format]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    peak, held = map(int, done.stdout.split())
    assert peak < held + 40 * 2**20
