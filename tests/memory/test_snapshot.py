"""Files that hold no memory, or only half of one."""

import json
from functools import cache

import pytest
import torch

import sparing
from sparing.checkpoint.safetensors import SafetensorsFile
from sparing.checkpoint.write import save_safetensors
from sparing.errors import CheckpointError
from tests.tiny import filled, model, random_ids, same, snapshot


def test_another_safetensors_file(tmp_path):
    path = tmp_path / "other.safetensors"
    save_safetensors(path, {})
    with pytest.raises(CheckpointError, match=r"other\.safetensors: not a memory"):
        model("dense").load_memory(path)


def test_a_file_cut_short(tmp_path):
    path = tmp_path / "memory.safetensors"
    filled("dense", 9).save(path)
    path.write_bytes(path.read_bytes()[:-16])
    with pytest.raises(CheckpointError, match=r"memory\.safetensors"):
        model("dense").load_memory(path)


def test_no_file(tmp_path):
    with pytest.raises((CheckpointError, FileNotFoundError), match="nowhere"):
        model("dense").load_memory(tmp_path / "nowhere")


def test_saving_into_no_folder_leaves_nothing(tmp_path):
    with pytest.raises(CheckpointError, match=r"memory\.safetensors"):
        filled("dense", 3).save(tmp_path / "missing" / "memory.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_unknown_options_are_refused():
    with pytest.raises(ValueError, match="sink"):
        model("dense").memory("dense", sink=4)
    with pytest.raises(ValueError, match="turboquant: 9 bits"):
        model("dense").memory("turboquant:9")


@pytest.mark.parametrize("length", [0, 1, 2, 63, 64, 65])
@pytest.mark.parametrize(
    ("kv", "options"),
    [
        ("dense", {}),
        ("window:9", {}),
        ("turboquant:4", {"block": 1}),
        ("turboquant:2.5", {"window": 3, "sink_tokens": 2}),
        ("turboquant:3", {"variant": "prod", "block": 16}),
        ("int8", {"block": 1, "scale_dtype": "float32"}),
        ("triattention:40", {"protect_prompt": False, "interval": 5, "allow_nope": True}),
        ("triattention:40+turboquant:3.5", {"protect_prompt": False, "interval": 5, "allow_nope": True}),
    ],
)
@pytest.mark.filterwarnings("ignore:this model attends in few layers")
@pytest.mark.parametrize("name", ["dense", "value-only", "hybrid"])
def test_every_length_is_saved_and_loaded(name, kv, options, length, tmp_path):
    if "triattention" in kv:
        options = {**options, "statistics": statistics(name)}
    memory = filled(name, 0, kv=kv, **options)
    for ids in random_ids(length).split(20) if length else ():
        model(name).logits(ids, memory, prompt=False)
    memory.save(tmp_path / "memory")
    loaded = model(name).load_memory(tmp_path / "memory", kv, **options)
    assert same(snapshot(loaded), snapshot(memory)) and loaded.nbytes == memory.nbytes
    assert torch.equal(model(name).logits(random_ids(2, 1), loaded), model(name).logits(random_ids(2, 1), memory))


@cache
def statistics(name: str):
    return sparing.calibrate(model(name), random_ids(40))


def changed(path, tensors=None, **facts) -> None:
    """Write the file anew with other tensors (a function of a tensor, or None to leave it out) and facts."""
    file = SafetensorsFile(path)
    found = {name: file.read(name).clone() for name in file.names()}
    for name, change in (tensors or {}).items():
        found[name] = None if change is None else change(found.get(name))
    told = json.loads(file.metadata["memory"]) | facts
    kept = {name: tensor.contiguous() for name, tensor in found.items() if tensor is not None}
    save_safetensors(path, kept, metadata={"memory": json.dumps(told)})


@pytest.mark.parametrize(
    ("kv", "tensors", "facts", "message"),
    [
        ("dense", {}, {"length": 99}, "14 entries are held"),
        ("dense", {}, {"length": -5}, "length is -5, expected a whole number"),
        ("dense", {}, {"length": 1.5}, r"length is 1\.5"),
        ("dense", {}, {"length": "14"}, "length is '14'"),
        ("dense", {}, {"length": True}, "length is True"),
        ("dense", {}, {"length": None}, "length is None"),
        ("dense", {"0.values": None}, {}, "layer 0: values is missing"),
        ("dense", {"0.more": lambda _: torch.zeros(2)}, {}, "layer 0: more is not of this memory"),
        ("dense", {"7.keys": lambda _: torch.zeros(2)}, {}, "7.keys belongs to no layer"),
        ("dense", {"0.keys": lambda x: x[:, :1]}, {}, r"keys is float32 \[14, 1, 8\], expected float32 \['n', 2, 8\]"),
        ("dense", {"0.keys": lambda x: x.bfloat16()}, {}, "keys is bfloat16"),
        ("dense", {"0.keys": lambda x: x[:13]}, {}, "13 keys or values stand beside 14"),
        ("dense", {"0.keys": lambda _: torch.zeros(())}, {}, "keys is float32"),
        ("dense", {"1.values": lambda x: x * torch.inf}, {}, "layer 1: values holds numbers that are not finite"),
        ("dense", {"0.positions": lambda _: torch.zeros(2, 14).int()}, {}, "positions"),
        ("turboquant:4", {"0.counts": lambda x: x + torch.tensor([1, 0, 0])}, {}, "counts"),
        ("turboquant:4", {"0.counts": lambda x: x + torch.tensor([0, 1, 0])}, {}, "counts"),
        ("turboquant:4", {"0.counts": lambda x: x + torch.tensor([0, 0, 2**60])}, {}, "counts"),
        ("turboquant:4", {"0.counts": lambda x: x[:2]}, {}, "counts is int64"),
        ("turboquant:4", {"0.k_scale": lambda x: x[:3]}, {}, "k_scale holds 3"),
        ("turboquant:4", {"0.k_scale": lambda x: x * torch.nan}, {}, "not finite"),
        ("turboquant:4", {"0.v_codes": lambda x: x.repeat(5, 1, 1)}, {}, "v_codes holds 5"),
        ("turboquant:4", {"0.k_signs": lambda x: -x}, {}, "another rotation"),
        ("turboquant:2.5", {"0.k_channels": lambda x: x + 8}, {}, "channels"),
        ("turboquant:2.5", {"0.k_channels": lambda x: x[:0]}, {}, "channels"),
        ("turboquant:2.5", {"0.v_channels": lambda x: x.int()}, {}, "channels"),
    ],
)
def test_what_does_not_fit_is_refused(kv, tensors, facts, message, tmp_path):
    path = tmp_path / "memory"
    options = {"block": 1} if "turbo" in kv else {}
    filled("dense", 14, kv=kv, **options).save(path)
    changed(path, tensors, **facts)
    with pytest.raises(CheckpointError, match=message):
        model("dense").load_memory(path, kv, **options)


@pytest.mark.parametrize(
    "pruner", [None, 3, {}, {"prompt": -1}, {"answering": 1}, {"evictions": 7}, {"evictions": [{"length": 1}]}]
)
def test_what_is_not_a_pruner(pruner, tmp_path):
    options = {"statistics": statistics("dense")}
    memory = filled("dense", 6, kv="triattention:40", **options)
    memory.save(tmp_path / "memory")
    if isinstance(pruner, dict) and pruner:
        pruner = {**memory.pruner.state(), **pruner}
    changed(tmp_path / "memory", pruner=pruner)
    with pytest.raises(CheckpointError, match="pruner"):
        model("dense").load_memory(tmp_path / "memory", "triattention:40", **options)
