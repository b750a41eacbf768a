"""Files are replaced as a whole, whoever else writes, whatever lies there, and wherever the writer dies."""

import errno
import itertools
import os
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from sparing.checkpoint import write as module
from sparing.checkpoint.lock import LOCK, holding
from sparing.checkpoint.safetensors import open_safetensors
from sparing.checkpoint.write import remove_leftovers, replacing, save_safetensors, save_weights
from sparing.errors import CheckpointError
from tests.tiny import LLAMA


def put(path: Path, content: bytes = b"new") -> None:
    with replacing(path) as file:
        file.write(content)


def refused(path: Path, message: str) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        put(path)
    assert "\n" not in str(caught.value)


def test_threads_that_write_one_file_leave_one_of_theirs(tmp_path):
    """Their temporary files are not one another's, and no running one is taken for a leftover."""
    failures = []

    def write(number: int) -> None:
        try:
            for _ in range(20):
                put(tmp_path / "x", bytes([number]) * 200_000)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=write, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    content = (tmp_path / "x").read_bytes()
    assert not failures
    assert len(content) == 200_000
    assert len(set(content)) == 1
    assert os.listdir(tmp_path) == ["x"]


def test_a_file_that_another_is_about_to_remove_is_left_to_it(tmp_path, monkeypatch):
    """In the instant before it is locked, who clears up may have locked it to remove it."""
    answers = [False, False]
    monkeypatch.setattr("sparing.checkpoint.write.locked", lambda descriptor: answers.pop() if answers else True)
    with replacing(tmp_path / "x") as file:
        assert not answers
        file.write(b"whole")
    assert (tmp_path / "x").read_bytes() == b"whole"


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o755])
def test_the_mode_of_a_file_is_kept(tmp_path, mode):
    (tmp_path / "x").touch()
    (tmp_path / "x").chmod(mode)
    put(tmp_path / "x")
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == mode
    assert (tmp_path / "x").read_bytes() == b"new"


def test_a_new_file_obeys_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        put(tmp_path / "x")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "x").stat().st_mode) == 0o640


@pytest.mark.parametrize("there", ["file", "nothing"])
def test_of_a_link_the_target_is_written(tmp_path, there):
    (tmp_path / "folder").mkdir()
    target = tmp_path / "folder" / "y"
    if there == "file":
        target.write_bytes(b"old")
    (tmp_path / "x").symlink_to("folder/y")
    put(tmp_path / "x")
    assert (tmp_path / "x").is_symlink()
    assert target.read_bytes() == b"new"
    assert sorted(os.listdir(tmp_path)) == ["folder", "x"]
    assert os.listdir(tmp_path / "folder") == ["y"]


def test_what_is_no_file_is_refused_and_stays(tmp_path):
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "null").symlink_to(os.devnull)
    refused(tmp_path / "folder", "folder: is a folder, not a file; nothing was changed. Choose another name")
    refused(tmp_path / "pipe", "is a pipe, not a file")
    refused(tmp_path / "null", "is a device, not a file")
    refused(tmp_path / "loop", "cannot be written: Too many levels of symbolic links")
    refused(Path(os.devnull), "is a device, not a file")
    assert stat.S_ISCHR(os.stat(os.devnull).st_mode)
    assert sorted(os.listdir(tmp_path)) == ["folder", "loop", "null", "pipe"]


def test_a_file_that_may_not_be_written_stays(tmp_path, monkeypatch):
    (tmp_path / "x").write_bytes(b"old")
    monkeypatch.setattr(module.os, "access", lambda path, mode: False)  # as for anyone but root
    refused(tmp_path / "x", "cannot be written: it is write-protected")
    assert (tmp_path / "x").read_bytes() == b"old"


@pytest.mark.parametrize("name", ["x" * 255, "ä" * 127])
def test_the_longest_names_can_be_written_and_longer_ones_are_named(tmp_path, name):
    put(tmp_path / name)
    assert os.listdir(tmp_path) == [name]
    refused(tmp_path / (name + "xx"), "cannot be written: File name too long")
    refused(tmp_path / "/".join(["x" * 200] * 30), "cannot be written: File name too long")


def test_the_error_that_counts_is_the_first(tmp_path, monkeypatch):
    """Not one of cleaning up after it; and what others say about their files is not put down to ours."""

    def broken(*arguments: object, **options: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    def fail(error: BaseException) -> None:
        with replacing(tmp_path / "x") as file:
            file.write(b"x" * 100)
            monkeypatch.setattr(Path, "unlink", broken)
            raise error

    with pytest.raises(KeyError, match="first"):
        fail(KeyError("first"))
    with pytest.raises(FileNotFoundError, match="another"):
        fail(FileNotFoundError(errno.ENOENT, "No such file", "another"))
    with pytest.raises(BrokenPipeError):
        fail(BrokenPipeError(errno.EPIPE, "Broken pipe"))
    with pytest.raises(CheckpointError, match="x: cannot be written: Input/output error; nothing was changed"):
        fail(OSError(errno.EIO, "Input/output error"))


def test_a_file_too_large_for_the_disk_is_an_error_of_one_line(tmp_path):
    script = f"""
import resource, signal, torch
from sparing.checkpoint import save_safetensors
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
save_safetensors({str(tmp_path / "x")!r}, {{"x": torch.zeros(100_000)}})
"""
    (tmp_path / "x").write_bytes(b"old")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stderr.splitlines()[-1].endswith(
        "x: cannot be written: File too large; nothing was changed. Free some space or choose another folder"
    )
    assert os.listdir(tmp_path) == ["x"]
    assert (tmp_path / "x").read_bytes() == b"old"


def test_leftovers_of_killed_writers_go_and_those_of_running_ones_stay(tmp_path):
    script = """
import os, signal, sys
from sparing.checkpoint.write import replacing
with replacing(sys.argv[1]) as file:
    file.write(b"half")
    file.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""
    (tmp_path / "x").write_bytes(b"old")
    (tmp_path / ".x.part").mkdir()  # not ours
    (tmp_path / ".y.0123456789abcdef.part").touch()  # of another file
    for name in ("x", "z"):
        done = subprocess.run([sys.executable, "-c", script, str(tmp_path / name)])
        assert done.returncode == -signal.SIGKILL
    assert len(os.listdir(tmp_path)) == 5
    assert (tmp_path / "x").read_bytes() == b"old"
    with replacing(tmp_path / "x") as first:
        first.write(b"first")
        put(tmp_path / "x", b"second")
        assert (tmp_path / "x").read_bytes() == b"second"
    assert (tmp_path / "x").read_bytes() == b"first"
    assert len(os.listdir(tmp_path)) == 4
    remove_leftovers(tmp_path)
    assert sorted(os.listdir(tmp_path)) == [".x.part", "x"]


class Killed(BaseException):
    """Stands in for kill -9: nothing after it touches the disk."""


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 2), (1, 1)])
def test_a_save_that_is_killed_leaves_one_model_or_none(tmp_path, monkeypatch, before, after):
    """At any change of a name, from any number of shards to any other; never weights of both."""
    for step in itertools.count():
        folder = tmp_path / str(step)
        counts = enumerate((before, after))
        models = [{f"layer.{i}": torch.full((10, 10), float(k)) for i in range(count)} for k, count in counts]
        save_weights(folder, models[0], max_shard_bytes=400, beside={"config.json": b"0"})
        if done_before(
            step, partial(save_weights, folder, models[1], max_shard_bytes=400, beside={"config.json": b"1"})
        ):
            break
        if (folder / "config.json").exists():  # else it does not load, and nobody takes it for whole
            number = int((folder / "config.json").read_bytes())
            found = open_safetensors(folder)
            assert found.names() == list(models[number])
            assert all((found.read(name) == number).all() for name in found.names())
        save_weights(folder, models[1], max_shard_bytes=400)  # and what is left is no obstacle
        found = open_safetensors(folder)
        assert {found.read(name).unique().item() for name in found.names()} == {1.0}
        assert len(list(folder.glob("*.safetensors"))) == after
    assert step > after


def done_before(step: int, save: Callable[[], None]) -> bool:
    """Whether a save comes to its end before that many names were changed; if not, it stops there."""
    left = itertools.count(step, -1)

    def counted(call: Callable[..., None]) -> Callable[..., None]:
        def called(*arguments: object, **options: object) -> None:
            if next(left) <= 0:
                raise Killed
            call(*arguments, **options)

        return called

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module.os, "replace", counted(os.replace))
        patch.setattr(module.os, "unlink", counted(os.unlink))
        try:
            save()
        except Killed:
            return False
    return True


def test_shards_in_use_keep_their_names_until_the_index_is_another(tmp_path):
    tensors = {f"layer.{i}": torch.randn(10, 10) for i in range(4)}
    save_weights(tmp_path, tensors, max_shard_bytes=400)
    first = {path.name for path in tmp_path.glob("*.safetensors")}
    save_weights(tmp_path, tensors, max_shard_bytes=400)
    assert not first & {path.name for path in tmp_path.glob("*.safetensors")}
    save_weights(tmp_path, tensors, max_shard_bytes=400)
    assert first == {path.name for path in tmp_path.glob("*.safetensors")}


def test_transformers_reads_shards_of_either_name(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    model.config.save_pretrained(tmp_path)
    for _ in range(2):
        save_weights(tmp_path, model.state_dict(), max_shard_bytes=4000)
    assert len(list(tmp_path.glob("model-v1-*.safetensors"))) > 1
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_a_folder_has_one_writer_who_is_named(tmp_path):
    with holding(tmp_path):
        assert os.listdir(tmp_path) == [LOCK]
        for attempt in (holding(tmp_path).__enter__, lambda: save_weights(tmp_path, {"x": torch.zeros(2)})):
            with pytest.raises(
                CheckpointError, match=rf"process {os.getpid()} is writing there; wait for it or choose"
            ):
                attempt()
    assert os.listdir(tmp_path) == []
    save_weights(tmp_path, {"x": torch.zeros(2)})
    assert os.listdir(tmp_path) == ["model.safetensors"]


def test_a_lock_ends_with_its_process(tmp_path):
    script = f"""
import os, signal
from sparing.checkpoint.lock import holding
with holding({str(tmp_path)!r}):
    os.kill(os.getpid(), signal.SIGKILL)
"""
    subprocess.run([sys.executable, "-c", script])
    assert os.listdir(tmp_path) == [LOCK]
    with holding(tmp_path):
        pass
    assert os.listdir(tmp_path) == []


def test_a_full_disk_has_no_room_for_the_name_of_the_holder(tmp_path, monkeypatch):
    def full(descriptor: int, content: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("sparing.checkpoint.lock.os.write", full)
    with holding(tmp_path), pytest.raises(CheckpointError, match="another process is writing there"):
        holding(tmp_path).__enter__()
    assert os.listdir(tmp_path) == []


def test_a_file_system_without_locks_is_named(tmp_path, monkeypatch):
    def unsupported(descriptor: int, operation: int) -> None:
        raise OSError(errno.EOPNOTSUPP, "Operation not supported")

    monkeypatch.setattr("sparing.checkpoint.lock.fcntl.flock", unsupported)
    with pytest.warns(UserWarning, match="its file system has no locks; let only one process write there"):
        save_weights(tmp_path, {"x": torch.zeros(2)})
    assert load_file(tmp_path / "model.safetensors")["x"].tolist() == [0, 0]


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "x").touch()
    for folder in (tmp_path / "x", tmp_path / "x" / "y", tmp_path / ("x" * 300)):
        with pytest.raises(CheckpointError, match=r"cannot be made: (File exists|Not a directory|File name too long)"):
            save_weights(folder, {"x": torch.zeros(2)})
    with pytest.raises(CheckpointError, match="cannot be written: Not a directory"):
        save_safetensors(tmp_path / "x" / "y", {})
    assert os.listdir(tmp_path) == ["x"]
