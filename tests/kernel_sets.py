"""Running a part of a test with another set of kernels."""

from collections.abc import Iterator
from contextlib import contextmanager

from sparing.kernels import dispatch

__all__ = ["using"]


@contextmanager
def using(name: str) -> Iterator[None]:
    before = dispatch.active()
    dispatch.use(name)
    try:
        yield
    finally:
        dispatch.use(before)
