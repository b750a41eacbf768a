"""Reading safetensors: tensors, shards and indices, and what is refused."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparing.checkpoint import open_checkpoint
from sparing.checkpoint.safetensors import SafetensorsFile, open_safetensors
from sparing.checkpoint.tensors import PIECE_BYTES
from sparing.errors import CheckpointError


def random_tensors() -> dict[str, torch.Tensor]:
    return {
        "matrix": torch.randn(5, 7),
        "half": torch.randn(3, 2).to(torch.float16),
        "brain": torch.randn(9).to(torch.bfloat16),
        "double": torch.randn(2, dtype=torch.float64),
        "ids": torch.randint(-(2**40), 2**40, (4,)),
        "bytes": torch.randint(0, 255, (3, 3), dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "eight": torch.randn(11).to(torch.float8_e4m3fn),
        "scalar": torch.tensor(3.5),
        "empty": torch.empty(0, 4),
    }


def test_reads_what_the_safetensors_package_writes(tmp_path):
    tensors = random_tensors()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt", "note": "ä"})
    source = open_safetensors(tmp_path)
    assert set(source.names()) == set(tensors)
    for name, tensor in load_file(tmp_path / "model.safetensors").items():
        assert source.shape(name) == tuple(tensor.shape)
        assert source.read(name).dtype == tensor.dtype
        assert torch.equal(source.read(name).double(), tensor.double())
    assert source.dtype("brain") == "BF16"
    assert SafetensorsFile(tmp_path / "model.safetensors").metadata == {"format": "pt", "note": "ä"}


def test_pieces_cover_a_tensor_in_order(tmp_path):
    tensor = torch.randn(3 * PIECE_BYTES // 8 + 5)
    save_file({"long": tensor}, tmp_path / "model.safetensors")
    pieces = list(open_safetensors(tmp_path).pieces("long"))
    assert len(pieces) == 2
    assert torch.equal(torch.cat(pieces), tensor)


def test_a_released_tensor_can_be_read_again(tmp_path):
    save_file(random_tensors(), tmp_path / "model.safetensors")
    source = open_safetensors(tmp_path)
    view = source.read("matrix")
    before = view.clone()
    source.release("matrix")
    assert torch.equal(view, before)


def test_writing_into_a_view_leaves_the_file_alone(tmp_path):
    save_file(random_tensors(), tmp_path / "model.safetensors")
    before = (tmp_path / "model.safetensors").read_bytes()
    open_safetensors(tmp_path).read("matrix").zero_()
    assert (tmp_path / "model.safetensors").read_bytes() == before


def test_a_misaligned_tensor_is_copied(tmp_path):
    data = bytes([7]) + torch.arange(3, dtype=torch.float32).numpy().tobytes()
    header = {
        "byte": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "floats": {"dtype": "F32", "shape": [3], "data_offsets": [1, 13]},
    }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    (tmp_path / "model.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    assert open_safetensors(tmp_path).read("floats").tolist() == [0.0, 1.0, 2.0]


def write_shards(folder, index=None):
    save_file({"a": torch.ones(2)}, folder / "model-00001-of-00002.safetensors")
    save_file({"b": torch.zeros(3), "stray": torch.zeros(1)}, folder / "model-00002-of-00002.safetensors")
    index = index or {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))


def test_shards_are_read_through_their_index(tmp_path):
    write_shards(tmp_path)
    source = open_safetensors(tmp_path)
    assert source.names() == ["a", "b"]
    assert source.file("b").name == "model-00002-of-00002.safetensors"
    assert torch.equal(source.read("a"), torch.ones(2))


def test_a_missing_shard_is_named(tmp_path):
    write_shards(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 2 shards missing: model-00002-of-00002\.safetensors"):
        open_safetensors(tmp_path)


def test_a_tensor_that_its_shard_lacks_is_named(tmp_path):
    write_shards(tmp_path, {"a": "model-00002-of-00002.safetensors"})
    with pytest.raises(CheckpointError, match="a should be in model-00002"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("shard", ["../model.safetensors", "/etc/x.safetensors", "a\\b.safetensors", 3, ["x"], "x.bin"])
def test_an_index_cannot_point_outside_its_folder(tmp_path, shard):
    write_shards(tmp_path, {"a": shard})
    with pytest.raises(CheckpointError, match="not a plain file name"):
        open_safetensors(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', "nonsense", "\xff"])
def test_a_malformed_index_is_refused(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="latin-1")
    with pytest.raises(CheckpointError, match=r"index\.json"):
        open_safetensors(tmp_path)


def test_a_lone_file_of_another_name_is_taken_and_several_are_not(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "weights.safetensors")
    assert open_safetensors(tmp_path).names() == ["a"]
    save_file({"a": torch.ones(1)}, tmp_path / "more.safetensors")
    with pytest.raises(CheckpointError, match=r"2 safetensors files .* no model\.safetensors\.index\.json"):
        open_safetensors(tmp_path)


def test_pickled_weights_are_refused_with_the_reason(tmp_path):
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"pytorch_model\.bin.*run any code"):
        open_safetensors(tmp_path)


def test_a_folder_without_weights_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="no weights found"):
        open_safetensors(tmp_path)


def shards_of(folder, weight_map, **shards):
    for shard, names in shards.items():
        save_file({name: torch.ones(2) for name in names}, folder / f"{shard}.safetensors")
    files = {name: f"{shard}.safetensors" for name, shard in weight_map.items()}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def test_a_tensor_in_two_shards_is_named(tmp_path):
    shards_of(tmp_path, {"x": "a", "y": "b"}, a=["x"], b=["x", "y"])
    with pytest.raises(CheckpointError, match=r"x is both in a\.safetensors and in b\.safetensors"):
        open_safetensors(tmp_path)


def test_a_tensor_that_lies_in_another_shard_than_the_index_says(tmp_path):
    shards_of(tmp_path, {"x": "b", "y": "b", "z": "a"}, a=["x", "z"], b=["y"])
    with pytest.raises(CheckpointError, match=r"x should be in b\.safetensors, which does not hold it"):
        open_safetensors(tmp_path)


def test_an_index_of_endless_size_is_not_read(tmp_path):
    with (tmp_path / "model.safetensors.index.json").open("wb") as file:
        file.truncate(2**40)
    with pytest.raises(CheckpointError, match="not an index of shards"):
        open_safetensors(tmp_path)


def test_a_pipe_is_not_waited_for(tmp_path):
    import os

    os.mkfifo(tmp_path / "model.gguf")
    with pytest.raises(CheckpointError, match="is no regular file"):
        open_checkpoint(tmp_path / "model.gguf")
