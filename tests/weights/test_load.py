"""Filling a model from tensors: every one arrives, what does not fit is named, and memory peaks low."""

import os
import subprocess
import sys

import pytest
import torch
from torch import nn

from sparing.checkpoint import open_checkpoint, save_weights, write_json
from sparing.config.names import Expected
from sparing.config.roles import BIAS, CONSTANT, EXPERTS, MATRIX, STATE, TIED_TABLE
from sparing.errors import CheckpointError
from sparing.weights.load import load_weights, row_tiles
from sparing.weights.stored import stored_weights


class Model(nn.Module):
    """A tied head, a buffer, a non-persistent buffer and an integer table."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(6, 4)
        self.layer = nn.Linear(4, 3)
        self.head = nn.Linear(4, 6, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("scale", torch.ones(1))
        self.register_buffer("order", torch.zeros(6, dtype=torch.int64))
        self.register_buffer("angles", torch.zeros(2), persistent=False)


EXPECTED = {
    "model.embed.weight": Expected("embed.weight", (6, 4), TIED_TABLE),
    "model.layer.weight": Expected("layer.weight", (3, 4), MATRIX),
    "model.layer.bias": Expected("layer.bias", (3,), BIAS),
    "model.scale": Expected("scale", (1,), CONSTANT),
    "model.order": Expected("order", (6,), CONSTANT),
}


@pytest.fixture
def stored():
    return {
        name: torch.randperm(6) if name == "model.order" else torch.randn(shape)
        for name, (_, shape, _) in EXPECTED.items()
    }


def source(folder, tensors):
    write_json(folder / "config.json", {"model_type": "x"})
    save_weights(folder, tensors)
    return stored_weights(open_checkpoint(folder))


def meta_model() -> Model:
    with torch.device("meta"):
        return Model()


def test_every_tensor_arrives(tmp_path, stored):
    model = meta_model()
    load_weights(model, source(tmp_path, stored), EXPECTED, dtype=None, device="cpu")
    for name, (path, _, _) in EXPECTED.items():
        assert torch.equal(model.state_dict()[path], stored[name])
    assert isinstance(model.layer.weight, nn.Parameter)
    assert model.angles.is_meta  # computed by the model, not stored


def test_shared_tensors_stay_shared(tmp_path, stored):
    model = meta_model()
    load_weights(model, source(tmp_path, stored), EXPECTED, dtype=torch.float32, device="cpu")
    assert model.head.weight is model.embed.weight
    assert torch.equal(model.head.weight, stored["model.embed.weight"])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_floats_are_cast_and_integers_kept(tmp_path, stored, dtype):
    model = meta_model()
    load_weights(model, source(tmp_path, stored), EXPECTED, dtype=dtype, device="cpu")
    assert torch.equal(model.layer.weight, stored["model.layer.weight"].to(dtype))
    assert model.order.dtype == torch.int64


def test_a_mapped_tensor_stays_a_view_in_the_stored_type(tmp_path, stored):
    tensors = source(tmp_path, stored)
    model = meta_model()
    load_weights(model, tensors, EXPECTED, dtype=torch.bfloat16, device="cpu", keep_mapped={"model.embed.weight"})
    assert model.embed.weight.dtype == torch.float32
    assert model.embed.weight.data_ptr() == tensors.read("model.embed.weight").data_ptr()
    assert model.layer.weight.dtype == torch.bfloat16


def refused(tmp_path, stored, **options) -> str:
    model = meta_model()
    with pytest.raises(CheckpointError) as caught:
        load_weights(model, source(tmp_path, stored), EXPECTED, dtype=None, device="cpu", **options)
    assert all(parameter.is_meta for parameter in model.parameters())
    return str(caught.value)


def test_missing_tensors_are_named(tmp_path, stored):
    del stored["model.layer.bias"]
    message = refused(tmp_path, stored)
    assert "1 of 5 tensors are missing" in message
    assert "model.layer.bias" in message
    assert str(tmp_path) in message


def test_unexpected_tensors_are_named_unless_ignored(tmp_path, stored):
    stored |= {"model.vision.weight": torch.ones(2, 3), "lm_head.weight": torch.ones(1)}
    message = refused(tmp_path, stored, ignore=[r"^lm_head\."])
    assert "1 unexpected tensors: model.vision.weight [2, 3]" in message
    assert "model.safetensors" in message
    model = meta_model()
    ignore = [r"^lm_head\.", r"\.vision\."]
    load_weights(model, source(tmp_path, stored), EXPECTED, dtype=None, device="cpu", ignore=ignore)


def test_a_wrong_shape_is_named_with_both(tmp_path, stored):
    stored["model.layer.weight"] = torch.ones(4, 3)
    message = refused(tmp_path, stored)
    assert "model.safetensors: model.layer.weight has shape [4, 3], config.json asks for [3, 4]" in message


def test_integers_where_floats_belong_are_refused(tmp_path, stored):
    stored["model.layer.weight"] = torch.ones(3, 4, dtype=torch.int8)
    assert "model.layer.weight is stored as I8" in refused(tmp_path, stored)


def test_a_parameter_that_nothing_fills_is_an_error_of_the_model(tmp_path, stored):
    expected = {name: value for name, value in EXPECTED.items() if name != "model.scale"}
    del stored["model.scale"]
    with pytest.raises(ValueError, match="no checkpoint tensor is expected for scale"):
        load_weights(meta_model(), source(tmp_path, stored), expected, dtype=None, device="cpu")
    wrong = expected | {"model.scale": Expected("nowhere", (1,), CONSTANT)}
    tensors = source(tmp_path, stored | {"model.scale": torch.ones(1)})
    with pytest.raises(ValueError, match="no parameter or buffer nowhere"):
        load_weights(meta_model(), tensors, wrong, dtype=None, device="cpu")


@pytest.mark.parametrize("multiple", [1, 16, 128])
@pytest.mark.parametrize("shape", [(300, 24), (3, 40, 7), (2, 130, 16), (1, 5)])
def test_tiles_are_the_rows_of_one_matrix_in_multiples(tmp_path, monkeypatch, shape, multiple):
    """Whatever the file gives at once, and tiles may hold."""
    w = torch.randn(shape)
    tensors = source(tmp_path, {"w": w.bfloat16()})
    for piece, tile in [(2, 4), (130, 2000), (5000, 100), (1 << 20, 4000), (1 << 20, 1 << 20)]:
        monkeypatch.setattr("sparing.checkpoint.safetensors.PIECE_BYTES", piece)
        monkeypatch.setattr("sparing.weights.load.TILE_BYTES", tile)
        tiles = [t.clone() for t in row_tiles(tensors, "w", multiple=multiple)]
        assert torch.equal(torch.cat(tiles), w.bfloat16().float().view(-1, shape[-1]))
        rows, out = 0, shape[-2]
        for t in tiles:
            rows += len(t)
            assert rows <= out and (len(t) % multiple == 0 or rows == out)
            assert t.nbytes <= max(tile, 4 * multiple * shape[-1])
            rows %= out


MEASURE = """
import sys, torch
from torch import nn
from pathlib import Path
from sparing.weights.load import load_weights
from sparing.checkpoint.safetensors import open_safetensors
from sparing.config.names import Expected
from sparing.config.roles import MATRIX

def status(key):
    return next(int(l.split()[1]) * 1024 for l in open("/proc/self/status") if l.startswith(key))

def build(layers, rows):
    with torch.device("meta"):
        model = nn.ModuleList([nn.Linear(1024, rows[0] if i == 0 else rows[1], bias=False) for i in range(layers)])
    return model, {f"{i}.weight": Expected(f"{i}.weight", tuple(m.weight.shape), MATRIX) for i, m in enumerate(model)}

folder, dtype, layers, big, small = Path(sys.argv[1]), getattr(torch, sys.argv[2]), *map(int, sys.argv[3:])
warm, expected = build(1, (1, 1))  # loads every library that a first copy needs
load_weights(warm, open_safetensors(folder / "warm"), expected, dtype=dtype, device="cpu")
model, expected = build(layers, (big, small))
tensors = open_safetensors(folder / "model")
Path("/proc/self/clear_refs").write_text("5")  # resets the high-water mark
before = status("VmRSS")
load_weights(model, tensors, expected, dtype=dtype, device="cpu")
size = sum(p.nbytes for p in model.parameters())
print((status("VmHWM") - before) / size, size)
"""


def peak_share(folder, dtype: str, layers: int, big: int, small: int) -> float:
    """Peak memory while loading a bfloat16 checkpoint, in units of the loaded model."""
    save_weights(folder / "warm", {"0.weight": torch.zeros(1, 1024, dtype=torch.bfloat16)})
    tensors = {f"{i}.weight": torch.ones(big if i == 0 else small, 1024, dtype=torch.bfloat16) for i in range(layers)}
    save_weights(folder / "model", tensors, max_shard_bytes=40_000_000)
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, folder, dtype, *map(str, (layers, big, small))],
        check=True,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    return float(done.stdout.split()[0])


@pytest.mark.skipif(not os.path.exists("/proc/self/clear_refs"), reason="peak memory is read from Linux's /proc")
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_stays_under_a_tenth_above_the_model(tmp_path, dtype):
    # 96 MiB in bfloat16, half of it one embedding
    share = peak_share(tmp_path, dtype, layers=13, big=24 * 1024, small=2 * 1024)
    assert 0.99 < share < 1.1


def test_slices_of_one_parameter_come_from_tensors_of_their_own(tmp_path):
    with torch.device("meta"):
        model = nn.Module()
        model.experts = nn.Parameter(torch.empty(3, 2, 4))
    parts = {f"experts.{e}.up.weight": torch.randn(2, 4) for e in (2, 0, 1)}
    expected = {f"experts.{e}.up.weight": Expected(f"experts.{e}", (2, 4), EXPERTS) for e in range(3)}
    load_weights(model, source(tmp_path, parts), expected, dtype=torch.bfloat16, device="cpu")
    stacked = torch.stack([parts[f"experts.{e}.up.weight"] for e in range(3)])
    assert torch.equal(model.experts, stacked.bfloat16())
    assert isinstance(model.experts, nn.Parameter)


def test_a_tensor_that_stays_in_float32(tmp_path, stored):
    model = meta_model()
    tensors = source(tmp_path, stored)
    expected = EXPECTED | {"model.layer.bias": Expected("layer.bias", (3,), STATE)}
    load_weights(model, tensors, expected, dtype=torch.bfloat16, device="cpu")
    assert torch.equal(model.layer.bias, stored["model.layer.bias"])
    assert model.layer.weight.dtype == torch.bfloat16
