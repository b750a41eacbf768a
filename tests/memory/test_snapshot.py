"""Files that hold no memory, or only half of one."""

import pytest

from sparing.checkpoint.write import save_safetensors
from sparing.errors import CheckpointError
from tests.properties.models import filled, model


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
