"""Who is writing: a lock on a file, which the kernel lets go of when its process ends, however it ends."""

import os
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sparing.errors import CheckpointError

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

__all__ = ["LOCK", "holding", "is_at", "locked"]

LOCK = ".sparing.lock"
PATIENCE = 20  # hundredths of a second until a holder has written down who it is


@contextmanager
def holding(folder: Path | str) -> Iterator[None]:
    """Makes this the only writer of a folder until the block ends; `folder/.sparing.lock` exists meanwhile.

    Raises CheckpointError naming the process that writes there, another thread of this one included, and where the
    folder cannot be written. Warns where the file system has no locks.
    """
    path = Path(folder) / LOCK
    descriptor = _take(path)
    try:
        yield
    finally:
        try:
            with suppress(OSError):
                path.unlink()  # while it is held: whoever has opened it looks whether it is still there
        finally:
            os.close(descriptor)


def _take(path: Path) -> int:
    """The open file of a lock that is ours."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        except OSError as error:
            reason = error.strerror or error
            raise CheckpointError(f"{path.parent}: cannot be written: {reason}; choose another folder") from error
        try:
            is_ours = locked(descriptor)
            if is_ours is None:
                warnings.warn(
                    f"{path.parent}: its file system has no locks; let only one process write there", stacklevel=4
                )
            elif not is_ours:
                raise CheckpointError(
                    f"{path.parent}: {_holder(descriptor)} is writing there; wait for it or choose another folder"
                )
            if is_at(descriptor, path):
                with suppress(OSError):  # a full disk has no room for the name, and the lock is ours without it
                    os.ftruncate(descriptor, 0)
                    os.write(descriptor, f"{os.getpid()} {os.uname().nodename}\n".encode())
                return descriptor
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # who held it has left and taken it along: once more


def _holder(descriptor: int) -> str:
    for _ in range(PATIENCE):
        pid, _, host = os.pread(descriptor, 300, 0).decode("utf-8", "replace").strip().partition(" ")
        if pid.isdecimal():
            return f"process {pid}" if host == os.uname().nodename else f"process {pid} on {host}"
        time.sleep(0.01)
    return "another process"


def locked(descriptor: int) -> bool | None:
    """Whether an open file is ours alone from now on, until it is closed; None where files cannot be locked."""
    if fcntl is None:
        return None
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one at a path."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path, follow_symlinks=False))
    except OSError:
        return False
