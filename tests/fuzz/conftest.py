"""One process for all inputs of a test session."""

from collections.abc import Iterator

import pytest

from tests.fuzz.judge import Worker


@pytest.fixture(scope="session")
def worker() -> Iterator[Worker]:
    with Worker() as started:
        yield started
