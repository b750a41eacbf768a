"""What a server, a network or an earlier attempt may do to a download: never a wrong file, never one elsewhere."""

import contextlib
import hashlib
import json
import os

import pytest

from sparing.checkpoint.hub import download, read_headers
from sparing.checkpoint.safetensors import open_safetensors
from sparing.errors import CheckpointError
from tests.checkpoint.hub_server import COMMIT
from tests.checkpoint.test_hub import files, hub  # noqa: F401 (fixtures)

WEIGHTS = "model.safetensors"


@pytest.fixture
def digested(hub):  # noqa: F811
    """A hub that names large files by their digest, as the real one does."""
    hub.etags[WEIGHTS] = hashlib.sha256(hub.files[WEIGHTS]).hexdigest()
    return hub


def everything(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def half(hub, cache):  # noqa: F811
    """The partial file that an interrupted download leaves."""
    hub.cut_after[WEIGHTS] = 150_000
    with pytest.raises(CheckpointError, match="run the same command again to continue"):
        download("org/model", cache_dir=cache)
    hub.cut_after.clear()
    (partial,) = cache.rglob("*.partial")
    return partial


def test_a_half_that_was_damaged_is_fetched_anew(digested, tmp_path):
    partial = half(digested, tmp_path)
    partial.write_bytes(bytes(partial.stat().st_size))
    digested.requests.clear()
    folder = download("org/model", cache_dir=tmp_path)
    assert (folder / WEIGHTS).read_bytes() == digested.files[WEIGHTS]
    ranges = [wanted for method, name, wanted in digested.requests if (method, name) == ("GET", WEIGHTS)]
    assert ranges == ["bytes=150000-", None]


@pytest.mark.parametrize("size", [0, 400_000, 10**6])
def test_a_partial_file_of_any_size_and_content(digested, tmp_path, size):
    partial = half(digested, tmp_path)
    partial.write_bytes(bytes(min(size, len(digested.files[WEIGHTS])) or 0) + bytes(max(0, size - 400_000)))
    folder = download("org/model", cache_dir=tmp_path)
    assert (folder / WEIGHTS).read_bytes() == digested.files[WEIGHTS]


def test_bytes_that_are_not_those_announced_are_deleted(digested, tmp_path):
    digested.damaged = 9
    with pytest.raises(CheckpointError, match=r"model\.safetensors: what came is not what the hub announced"):
        download("org/model", cache_dir=tmp_path)
    assert not [name for name in everything(tmp_path) if "partial" in name or WEIGHTS in name]
    digested.damaged = 0
    folder = download("org/model", cache_dir=tmp_path)
    assert open_safetensors(folder).read("w")[-1] == 99_999


def test_the_page_of_a_network_is_not_the_beginning_of_a_file(hub, tmp_path):  # noqa: F811
    """Whether the file has a digest or not."""
    for pages in (1, 2):
        hub.pages = pages
        with pytest.raises(CheckpointError, match="download failed"):
            download("org/model", cache_dir=tmp_path / str(pages))
        hub.pages = 0
        folder = download("org/model", cache_dir=tmp_path / str(pages))
        assert (folder / WEIGHTS).read_bytes() == hub.files[WEIGHTS]


def test_a_page_in_place_of_the_hub(hub, tmp_path):  # noqa: F811
    hub.page = b"<html>please log in</html>"
    for call in (lambda: download("org/model", cache_dir=tmp_path), lambda: read_headers("org/model")):
        with pytest.raises(
            CheckpointError, match=r"is not a hub .*; look for a login page|cannot be reached|are missing or damaged"
        ):
            call()
    hub.page = None
    assert download("org/model", cache_dir=tmp_path).name == COMMIT


@pytest.mark.parametrize("answer", [b"null", b"[]", b"{}", b"3", b'"x"', b'{"id": null, "sha": null}', b"\xff", b""])
@pytest.mark.parametrize("kind", ["info", "tree"])
def test_answers_of_another_form(hub, tmp_path, answer, kind):  # noqa: F811
    hub.answers[kind] = answer
    with pytest.raises(CheckpointError, match=r"is not a hub|cannot be reached|no names of a hub|holds no file"):
        download("org/model", cache_dir=tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS, "config.json"])
@pytest.mark.parametrize("etag", ["../../../../x", "..", "a/b", "", "x" * 300, "a\\b"])
def test_an_etag_that_is_no_name_of_a_file(hub, tmp_path, name, etag):  # noqa: F811
    hub.etags[name] = etag
    before = everything(tmp_path)
    with pytest.raises(CheckpointError, match=r"which is no name of a file; is HF_ENDPOINT right|download failed"):
        download("org/model", cache_dir=tmp_path / "cache")
    assert [path for path in everything(tmp_path) if not path.startswith("cache")] == before
    assert "x" not in os.listdir(tmp_path)


@pytest.mark.parametrize("sha", ["../../../x", "x", "A" * 40, ""])
def test_what_is_not_a_commit(hub, tmp_path, sha):  # noqa: F811
    hub.answers["info"] = json.dumps({"id": "org/model", "sha": sha, "siblings": [], "tags": []}).encode()
    with pytest.raises(CheckpointError, match=r"no names of a hub|is not a hub|no revision|download failed"):
        download("org/model", cache_dir=tmp_path / "cache")
    assert [path for path in everything(tmp_path) if not path.startswith("cache")] == []


@pytest.mark.parametrize("name", ["../model.safetensors", "/tmp/x.json", "a\\..\\x.json", "..\\x.json"])
def test_a_file_name_that_leads_elsewhere(hub, tmp_path, name):  # noqa: F811
    entry = {"type": "file", "path": name, "size": 3, "oid": "0" * 40}
    hub.answers["tree"] = json.dumps([entry]).encode()
    hub.files[name] = b"xyz"
    with contextlib.suppress(CheckpointError):
        download("org/model", cache_dir=tmp_path / "cache")
    assert [path for path in everything(tmp_path) if not path.startswith("cache")] == []


def test_a_server_that_does_not_say_how_long_a_file_is(digested, tmp_path):
    digested.without_length = True
    folder = download("org/model", cache_dir=tmp_path)
    assert (folder / WEIGHTS).read_bytes() == digested.files[WEIGHTS]


def test_a_body_that_ends_early_without_a_length_is_no_file(digested, tmp_path):
    digested.without_length = True
    digested.cut_after[WEIGHTS] = 150_000
    with pytest.raises(CheckpointError, match="what came is not what the hub announced"):
        download("org/model", cache_dir=tmp_path)
    digested.cut_after.clear()
    folder = download("org/model", cache_dir=tmp_path)
    assert (folder / WEIGHTS).read_bytes() == digested.files[WEIGHTS]
