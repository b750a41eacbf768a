"""Writing checkpoints: read back by others, replaced as a whole, or not at all."""

import errno
import json
import math
import os
from functools import partial

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from tokenizers import Tokenizer as Backend
from tokenizers.models import BPE

from sparing.checkpoint.chat.template import ChatTemplate
from sparing.checkpoint.safetensors import open_safetensors
from sparing.checkpoint.tokenizer import Tokenizer, read_tokenizer
from sparing.checkpoint.write import (
    folder_to_fill,
    replacing,
    save_safetensors,
    save_tokenizer,
    save_weights,
    write_config,
    write_json,
)
from sparing.errors import CheckpointError
from tests.checkpoint.test_safetensors import random_tensors
from tests.checkpoint.tokenizer_files import SPECIAL, vocabulary
from tests.tiny import LLAMA


def test_the_safetensors_package_reads_what_is_written(tmp_path):
    tensors = random_tensors()
    save_safetensors(tmp_path / "x.safetensors", tensors, {"note": "ä"})
    loaded = load_file(tmp_path / "x.safetensors")
    assert set(loaded) == set(tensors)
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype
        assert torch.equal(loaded[name].float(), tensor.float())
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "note": "ä"}


def test_equal_tensors_give_equal_bytes_and_aligned_data(tmp_path):
    tensors = random_tensors()
    save_safetensors(tmp_path / "a.safetensors", tensors)
    save_safetensors(tmp_path / "b.safetensors", dict(reversed(tensors.items())))
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


def test_strided_tensors_are_written_in_order(tmp_path):
    tensor = torch.arange(12).reshape(3, 4).T
    save_safetensors(tmp_path / "x.safetensors", {"t": tensor, "v": torch.arange(10)[2:5]})
    loaded = load_file(tmp_path / "x.safetensors")
    assert torch.equal(loaded["t"], tensor)
    assert loaded["v"].tolist() == [2, 3, 4]


def test_weights_are_split_and_read_back(tmp_path):
    tensors = {f"layer.{i}": torch.randn(10, 10) for i in range(7)}
    save_weights(tmp_path, tensors, max_shard_bytes=1000)
    assert len(list(tmp_path.glob("model-*-of-00004.safetensors"))) == 4
    source = open_safetensors(tmp_path)
    assert all(torch.equal(source.read(name), tensor) for name, tensor in tensors.items())
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == 7 * 400


@pytest.mark.parametrize(
    "limit",
    [[0.0, math.inf], (0, math.inf), [0.0, "inf"], [0.0, "Infinity"], [0.0, {"__float__": "Infinity"}]],
)
def test_infinities_of_a_config_have_one_spelling(tmp_path, limit):
    """The one that transformers' configs take; text that is no number of a list stays text."""
    config = {"text_config": {"limit": limit, "least": -math.inf}, "words": ["inf", "on"], "name": "inf"}
    write_config(tmp_path, config)
    stored = json.loads((tmp_path / "config.json").read_text())
    assert stored["text_config"]["limit"] == [0.0, {"__float__": "Infinity"}]
    assert stored["text_config"]["least"] == {"__float__": "-Infinity"}
    assert (stored["words"], stored["name"]) == (["inf", "on"], "inf")


def test_a_later_save_replaces_an_earlier_one_of_another_number_of_files(tmp_path):
    many = {f"layer.{i}": torch.randn(10, 10) for i in range(7)}
    one = {"only": torch.randn(3)}
    (tmp_path / "notes.txt").write_text("stay")
    save_weights(tmp_path, many, max_shard_bytes=1000)
    save_weights(tmp_path, one)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.safetensors", "notes.txt"]
    save_weights(tmp_path, many, max_shard_bytes=1000)
    assert open_safetensors(tmp_path).names() == list(many)


def test_transformers_loads_what_is_written(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**LLAMA)
    model = LlamaForCausalLM(config)
    save_weights(tmp_path, model.state_dict(), max_shard_bytes=4000)
    write_json(tmp_path / "config.json", config.to_dict())
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_json_is_indented_and_refuses_nan(tmp_path):
    write_json(tmp_path / "x.json", {"a": [1, "ä"]})
    assert json.loads((tmp_path / "x.json").read_text(encoding="utf-8")) == {"a": [1, "ä"]}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "x.json", float("nan"))
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_type_the_format_lacks_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"x: safetensors cannot hold torch\.complex128"):
        save_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(1, dtype=torch.complex128)})
    assert os.listdir(tmp_path) == []


class Disk:
    """Stands in for os.fsync on a disk that fills up at the n-th file."""

    def __init__(self, full_at: int) -> None:
        self.left = full_at

    def __call__(self, descriptor: int) -> None:
        self.left -= 1
        if self.left < 0:
            raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("full_at", range(5))
def test_a_full_disk_leaves_the_old_weights(tmp_path, monkeypatch, full_at):
    old = {"old": torch.randn(3)}
    save_weights(tmp_path, old)
    monkeypatch.setattr("sparing.checkpoint.write.os.fsync", Disk(full_at))
    tensors = {f"layer.{i}": torch.randn(10, 10) for i in range(12)}
    with pytest.raises(CheckpointError, match=r"No space left on device; nothing was changed\. Free some space"):
        save_weights(tmp_path, tensors, max_shard_bytes=1000)
    assert os.listdir(tmp_path) == ["model.safetensors"]
    assert torch.equal(open_safetensors(tmp_path).read("old"), old["old"])


def test_a_really_full_device_gives_one_line(monkeypatch):
    # the device that is always full, in place of the temporary file
    full = partial(open, "/dev/full")
    monkeypatch.setattr("sparing.checkpoint.write.open", lambda _, mode: full(mode), raising=False)
    with pytest.raises(CheckpointError, match="No space left on device") as caught:
        write_json("never-written.json", "x" * 100_000)
    assert "\n" not in str(caught.value)


def test_folders_made_for_nothing_are_removed_and_no_others(tmp_path):
    def interrupted(*inside: str) -> None:
        with folder_to_fill(tmp_path / "there" / "a" / "b") as folder:
            for name in inside:
                (folder / name).touch()
            raise KeyboardInterrupt

    (tmp_path / "there").mkdir()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path / "there") == []
    with pytest.raises(KeyboardInterrupt):
        interrupted("x")
    assert os.listdir(tmp_path / "there" / "a" / "b") == ["x"]


@pytest.mark.parametrize("tool_use", [None, "{{ tools }}"])
def test_a_tokenizer_comes_back(tmp_path, tool_use):
    tokens, merges = vocabulary()
    pairs = [tuple(line.split(" ")) for line in merges]
    backend = Backend(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=pairs))
    backend.add_special_tokens(SPECIAL)
    special = {"bos_token": SPECIAL[2], "eos_token": SPECIAL[1]}
    template = ChatTemplate("{{ bos_token }}{{ messages[0].content }}", tool_use=tool_use)
    written = Tokenizer(backend, bos_id=2, eos_ids=(1,), chat_template=template, special_tokens=special)
    save_tokenizer(tmp_path, written)
    read = read_tokenizer(tmp_path)
    assert (read.bos_id, read.eos_ids, read.pad_id, read.special_ids) == (2, (1,), None, written.special_ids)
    assert read.backend.to_str() == backend.to_str()
    for tools in (None, [{"name": "f"}]):
        messages = [{"role": "user", "content": "x"}]
        assert read.apply_chat_template(messages, tools) == written.apply_chat_template(messages, tools)


def test_an_interrupted_block_changes_nothing(tmp_path):
    (tmp_path / "x").write_text("old")

    def interrupted() -> None:
        with replacing(tmp_path / "x") as file:
            file.write(b"new")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_text() == "old"


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(CheckpointError, match="No such file or directory"):
        write_json(tmp_path / "no" / "x.json", {})
