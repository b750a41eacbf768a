"""What an interrupted quantisation goes on from, and what it must not be mixed with."""

import json
import os
import shutil

import pytest
from safetensors.torch import load_file

import sparing
from sparing.checkpoint import save_weights, write_json
from sparing.checkpoint.lock import LOCK
from sparing.weights import convert as module
from sparing.weights.convert import quantize
from sparing.weights.resume import REPORT
from tests.tiny import saved
from tests.weights.test_convert import LLAMA, TOKENS, files


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return saved(LLAMA, tmp_path_factory.mktemp("llama") / "m")


def half_done(folder, out, monkeypatch):
    """A quantisation in small shards that stopped in the middle."""
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)

    def log(progress):
        if progress.done > progress.total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantize(folder, out, "int8", log=log)
    return out


@pytest.mark.parametrize("stopped", [True, False])
@pytest.mark.parametrize("name", ["lm_head.weight", "model.layers.0.mlp.down_proj.weight"])
def test_a_folder_of_another_source_is_refused_and_of_a_copy_goes_on(folder, tmp_path, monkeypatch, stopped, name):
    """Of the same names, sizes and times, and with one number that is another."""
    out = half_done(folder, tmp_path / "out", monkeypatch)
    if not stopped:
        quantize(folder, out, "int8")
    before = files(out)
    shutil.copytree(folder, tmp_path / "other")
    tensors = load_file(tmp_path / "other" / "model.safetensors")
    tensors[name].view(-1)[-1] += 1
    save_weights(tmp_path / "other", tensors)
    times = (folder / "model.safetensors").stat()
    os.utime(tmp_path / "other" / "model.safetensors", ns=(times.st_atime_ns, times.st_mtime_ns))
    with pytest.raises(sparing.CheckpointError, match=r"holds a quantisation of another source.*delete it or choose"):
        quantize(tmp_path / "other", out, "int8")
    assert files(out) == before
    shutil.copytree(folder, tmp_path / "copy")
    quantize(tmp_path / "copy", out, "int8")
    quantize(folder, tmp_path / "whole", "int8")
    assert files(out) == files(tmp_path / "whole")


def test_what_joins_a_matrix_in_another_shard_counts_with_it(folder, tmp_path, monkeypatch):
    """Queries take the scale of keys and values: those are part of what a shard was made of."""
    monkeypatch.setattr(module, "SHARD_BYTES", 1)
    quantize(folder, tmp_path / "out", "fp8", scales="tensor")
    changed = shutil.copytree(folder, tmp_path / "changed")
    tensors = load_file(changed / "model.safetensors")
    tensors["model.layers.0.self_attn.v_proj.weight"][0, 0] = 100
    save_weights(changed, tensors)
    report = json.loads((tmp_path / "out" / REPORT).read_text())
    shard = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    only = shard["model.layers.0.self_attn.q_proj.weight"]
    report["shards"] = {only: report["shards"][only]}
    report["errors"] = {n: e for n, e in report["errors"].items() if shard[n] == only}
    write_json(tmp_path / "out" / REPORT, report)
    with pytest.raises(sparing.CheckpointError, match=f"{only} was made of other weights"):
        quantize(changed, tmp_path / "out", "fp8", scales="tensor")


def test_a_shard_that_was_damaged_is_written_anew(folder, tmp_path, monkeypatch):
    """And the folder does not load before it is."""
    monkeypatch.setattr(module, "SHARD_BYTES", 20_000)
    quantize(folder, tmp_path / "out", "int8")
    before = files(tmp_path / "out")
    shard = sorted((tmp_path / "out").glob("model-*"))[1]
    shard.write_bytes(bytes(len(before[shard.name])))
    seen = []

    def log(progress):
        seen.append(progress.name)
        assert not (tmp_path / "out" / "config.json").exists()

    quantize(folder, tmp_path / "out", "int8", log=log)
    assert 0 < len(seen) < 10
    assert files(tmp_path / "out") == before


def each(entries, **value):
    return dict.fromkeys(entries, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: [], "must have exactly settings, shards and errors"),
        (lambda r: r | {"more": 1}, "must have exactly settings, shards and errors"),
        (lambda r: r | {"shards": []}, "holds another quantisation"),
        (lambda r: r | {"shards": {"../x": next(iter(r["shards"].values()))}}, "holds another quantisation"),
        (lambda r: r | {"shards": dict.fromkeys(r["shards"], 3)}, "must have exactly sha256 and source"),
        (lambda r: r | {"shards": each(r["shards"], sha256="x", source="y")}, "has digests that are no SHA-256"),
        (lambda r: r | {"errors": []}, "errors must name the matrices of its shards"),
        (lambda r: r | {"errors": {}}, "errors must name the matrices of its shards"),
        (lambda r: r | {"errors": dict.fromkeys(r["errors"], 1)}, "must have exactly shape, sqnr_db and cosine"),
        (lambda r: r | {"errors": each(r["errors"], shape=[-1, 2], sqnr_db=1.0, cosine=1.0)}, "has shape"),
        (lambda r: r | {"errors": each(r["errors"], shape=[2, 2], sqnr_db="1", cosine=1.0)}, "has sqnr_db '1'"),
        (lambda r: r | {"errors": each(r["errors"], shape=[2, 2], sqnr_db=None, cosine=9)}, "cosine 9"),
    ],
)
def test_a_damaged_report_is_named_and_changes_nothing(folder, tmp_path, monkeypatch, change, message):
    out = half_done(folder, tmp_path / "out", monkeypatch)
    (out / REPORT).write_text(json.dumps(change(json.loads((out / REPORT).read_text()))))
    before = files(out)
    with pytest.raises(sparing.CheckpointError, match=message):
        quantize(folder, out, "int8")
    assert files(out) == before


def test_folders_where_files_are_expected(folder, tmp_path, monkeypatch):
    out = half_done(folder, tmp_path / "out", monkeypatch)
    (out / ".x.part").mkdir()
    (out / ".x.0123456789abcdef.part").mkdir()
    (out / "config.json").mkdir()
    with pytest.raises(sparing.CheckpointError, match=r"config\.json: is a folder, not a file"):
        quantize(folder, out, "int8")
    (out / "config.json").rmdir()
    quantize(folder, out, "int8")
    assert (out / ".x.part").is_dir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / REPORT).mkdir()
    with pytest.raises(sparing.CheckpointError, match=r"is not empty \(quantization\.json\)"):
        quantize(folder, tmp_path / "other", "int8")


def test_one_process_writes_a_folder(folder, tmp_path):
    def log(progress):
        if not refused:
            with pytest.raises(sparing.CheckpointError, match=f"process {os.getpid()} is writing there"):
                quantize(folder, tmp_path / "out", "int8")
            refused.append(progress)

    refused = []
    quantize(folder, tmp_path / "out", "int8", log=log)
    assert refused
    assert not (tmp_path / "out" / LOCK).exists()
    assert sparing.load(tmp_path / "out").logits(TOKENS).isfinite().all()
