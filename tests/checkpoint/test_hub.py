"""Downloads from the hub: what is fetched, resumed and cached, and what each failure says."""

import os
import subprocess
import sys

import pytest
import torch

from sparing.checkpoint import open_checkpoint, save_safetensors
from sparing.checkpoint.hub import download, gguf_names
from sparing.checkpoint.safetensors import open_safetensors
from sparing.errors import CheckpointError
from tests.checkpoint.hub_server import COMMIT, Hub, serving


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model.safetensors"
    save_safetensors(path, {"w": torch.arange(100_000, dtype=torch.float32)})
    return {
        "config.json": b'{"model_type": "llama"}',
        "chat_template.jinja": b"x",
        "model.safetensors": path.read_bytes(),
        "README.md": b"not needed",
        "pytorch_model.bin": b"not wanted",
        "consolidated.safetensors": b"not needed twice",
        "onnx/config.json": b"{}",
        "original/model.safetensors": b"not needed twice",
        "model-Q4.gguf": b"not by default",
    }


@pytest.fixture
def hub(files, monkeypatch, tmp_path):
    with serving(Hub(dict(files))) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.url)
        # Only whole chunks survive an interruption; ten MiB are long for a test, and so is a second between attempts.
        monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 50_000)
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
        yield running


def test_only_what_a_model_needs_is_downloaded(hub, tmp_path):
    folder = download("org/model", cache_dir=tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["chat_template.jinja", "config.json", "model.safetensors"]
    assert open_checkpoint(folder).config == {"model_type": "llama"}
    assert open_safetensors(folder).read("w")[-1] == 99_999
    before = len(hub.requests)
    assert download("org/model", cache_dir=tmp_path) == folder
    assert len(hub.requests) == before  # nothing is fetched twice


@pytest.mark.parametrize("revision", ["v1", COMMIT])
def test_a_revision_is_found(hub, tmp_path, revision):
    assert download("org/model", revision, cache_dir=tmp_path).name == COMMIT


def test_an_interrupted_download_goes_on_where_it_stopped(hub, tmp_path, files):
    size = len(files["model.safetensors"])
    hub.cut_after["model.safetensors"] = 150_000
    with pytest.raises(CheckpointError, match=r"org/model: download failed: .*run the same command again to continue"):
        download("org/model", cache_dir=tmp_path)
    hub.cut_after.clear()
    hub.requests.clear()
    folder = download("org/model", cache_dir=tmp_path)
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    ranges = [wanted for method, name, wanted in hub.requests if method == "GET" and name == "model.safetensors"]
    assert ranges == ["bytes=150000-"]
    assert hub.sent["model.safetensors"] == size  # not a byte twice


def test_a_connection_that_drops_once_is_not_even_noticed(hub, tmp_path, files):
    hub.cut_after["model.safetensors"] = 150_000

    def mended(_: float) -> None:
        hub.cut_after.clear()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("huggingface_hub.file_download.time.sleep", mended)
        folder = download("org/model", cache_dir=tmp_path)
    assert (folder / "model.safetensors").read_bytes() == files["model.safetensors"]
    assert hub.sent["model.safetensors"] == len(files["model.safetensors"])


def test_an_unknown_model(hub, tmp_path):
    with pytest.raises(CheckpointError, match="org/modle: no such model on the hub; check the spelling"):
        download("org/modle", cache_dir=tmp_path)


def test_an_unknown_revision(hub, tmp_path):
    with pytest.raises(CheckpointError, match="org/model: no revision v9; leave it out for the newest"):
        download("org/model", "v9", cache_dir=tmp_path)


def test_a_gated_model(hub, tmp_path):
    hub.gated = True
    with pytest.raises(
        CheckpointError, match="access is restricted; accept the licence on its page, then set HF_TOKEN"
    ):
        download("org/model", cache_dir=tmp_path)


def test_a_hub_in_trouble(hub, tmp_path):
    hub.refuse = 500
    with pytest.raises(CheckpointError, match=r"org/model: the hub .* cannot be reached"):
        download("org/model", cache_dir=tmp_path)


def test_no_network(monkeypatch, tmp_path):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(CheckpointError, match="cannot be reached and the local cache is not complete"):
        download("org/model", cache_dir=tmp_path)


def test_without_a_network_the_cache_is_enough(hub, monkeypatch, tmp_path):
    folder = download("org/model", cache_dir=tmp_path)
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert download("org/model", cache_dir=tmp_path) == folder


def test_the_token_of_the_environment_is_sent(hub, monkeypatch, tmp_path):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    download("org/model", cache_dir=tmp_path)
    assert hub.tokens == {"Bearer hf_secret"}


def opened(hub: Hub, cache, **environment: str) -> subprocess.CompletedProcess:
    """open_checkpoint in a process of its own: huggingface_hub reads its settings once, when imported."""
    code = "from sparing.checkpoint import open_checkpoint; print(open_checkpoint('org/model').config)"
    env = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache)} | environment
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)


def test_a_hub_id_is_a_source_and_offline_means_offline(hub, tmp_path):
    refused = opened(hub, tmp_path, HF_HUB_OFFLINE="1")
    assert "HF_HUB_OFFLINE forbids downloading; unset it once" in refused.stderr
    assert not hub.tokens
    assert opened(hub, tmp_path).stdout.strip() == "{'model_type': 'llama'}"
    hub.tokens.clear()
    assert opened(hub, tmp_path, HF_HUB_OFFLINE="1").stdout.strip() == "{'model_type': 'llama'}"
    assert not hub.tokens


@pytest.fixture
def gguf_hub(hub):
    hub.files = {
        "README.md": b"",
        "m-Q4_K_M.gguf": b"four bits",
        "m-Q4_K_S.gguf": b"four bits, smaller",
        "Q8_0/m-Q8_0-00001-of-00002.gguf": b"eight",
        "Q8_0/m-Q8_0-00002-of-00002.gguf": b"bits",
        "mmproj-m-f16.gguf": b"images",
    }
    return hub


def test_one_of_several_gguf_models_is_named(gguf_hub, tmp_path):
    for tag in ("Q4_K_M", "q4_k_m"):
        assert gguf_names("org/model", tag, cache_dir=tmp_path) == ["m-Q4_K_M.gguf"]
    names = gguf_names("org/model", "Q8_0", cache_dir=tmp_path)
    assert names == ["Q8_0/m-Q8_0-00001-of-00002.gguf", "Q8_0/m-Q8_0-00002-of-00002.gguf"]
    with pytest.raises(CheckpointError, match="is not here, and a GGUF file says what it is only once it is"):
        download("org/model", files=names, cached=True, cache_dir=tmp_path)
    folder = download("org/model", files=names, cache_dir=tmp_path)
    assert [(folder / name).read_bytes() for name in names] == [b"eight", b"bits"]
    assert sorted(path.name for path in folder.rglob("*.gguf")) == [name.rpartition("/")[2] for name in names]
    assert download("org/model", files=names, cached=True, cache_dir=tmp_path) == folder


def test_which_gguf_model_is_meant_is_asked(gguf_hub, tmp_path):
    listed = "holds 3 GGUF models, give one of them: org/model:Q4_K_M, org/model:Q4_K_S, org/model:Q8_0"
    for tag in (None, "Q4_K", "Q5_0"):
        with pytest.raises(CheckpointError, match=listed):
            gguf_names("org/model", tag, cache_dir=tmp_path)


def test_a_model_of_other_weights_has_no_tags(hub, tmp_path):
    assert gguf_names("org/model", cache_dir=tmp_path) is None
    del hub.files["model-Q4.gguf"]
    with pytest.raises(CheckpointError, match="holds no GGUF model, of which 'Q4_0' would be one; leave it out"):
        gguf_names("org/model", "Q4_0", cache_dir=tmp_path)


def test_an_interrupted_gguf_file_goes_on_where_it_stopped(gguf_hub, tmp_path):
    name = "Q8_0/m-Q8_0-00001-of-00002.gguf"
    gguf_hub.files[name] = bytes(range(256)) * 1000
    gguf_hub.cut_after[name] = 150_000
    with pytest.raises(CheckpointError, match="run the same command again to continue"):
        download("org/model", files=[name], cache_dir=tmp_path)
    gguf_hub.cut_after.clear()
    folder = download("org/model", files=[name], cache_dir=tmp_path)
    assert (folder / name).read_bytes() == gguf_hub.files[name]
    assert gguf_hub.sent[name] == len(gguf_hub.files[name])


def test_a_hub_id_with_a_tag_is_a_source(gguf_hub, tmp_path):
    code = "from sparing.checkpoint import open_checkpoint; open_checkpoint('org/model:Q4_K_M')"
    for offline in ("0", "1"):
        env = os.environ | {"HF_ENDPOINT": gguf_hub.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": offline}
        found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
        assert "m-Q4_K_M.gguf: does not begin with GGUF" in found.stderr  # it was fetched, and is what it is
