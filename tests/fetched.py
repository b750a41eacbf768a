"""The real models that `make models` fetches; tests of group `real` that need one are skipped where it is not there."""

from pathlib import Path

import pytest

from sparing.checkpoint.fetched import fetched_file

__all__ = ["fetched"]


def fetched(name: str) -> Path:
    """The file of a real model. Skips the test that asks, and those after it that share its fixture, without one."""
    path = fetched_file(name)
    if not path.is_file():
        pytest.skip(f"no {path}: `make models` fetches it")
    return path
