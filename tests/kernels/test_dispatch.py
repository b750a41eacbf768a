"""Which kernels run, and that native regions survive threads, forks and other callers."""

import multiprocessing
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from sparing import kernels
from sparing.kernels import dispatch
from tests.kernel_sets import using

NATIVE = dispatch.available()[1:]


def run(name: str) -> subprocess.CompletedProcess[str]:
    script = "from sparing.kernels import dispatch; print(dispatch.active())"
    environment = {**os.environ, "SPARING_KERNELS": name}
    return subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False)


def test_the_environment_chooses():
    assert run("reference").stdout == "reference\n"
    assert run("").stdout == f"{dispatch.available()[-1]}\n"
    refused = run("sse9")
    assert refused.returncode != 0 and "no kernels named 'sse9'" in refused.stderr and "reference" in refused.stderr


def test_using_restores():
    before = dispatch.active()
    with using("reference"):
        assert dispatch.active() == "reference"
        assert not dispatch.takes(torch.ones(2))
    assert dispatch.active() == before


@pytest.mark.skipif(not NATIVE, reason="built without native kernels")
def test_what_native_kernels_take():
    x = torch.ones(2)
    assert dispatch.takes(x, None, x) and dispatch.takes(x.bfloat16())
    assert not dispatch.takes(x, x.bfloat16())
    assert not dispatch.takes(x.half()) and not dispatch.takes(x.double())
    assert not dispatch.takes(x, torch.ones(2, requires_grad=True))
    assert not dispatch.takes(torch.empty(2, device="meta"))
    with torch.no_grad():
        assert dispatch.takes(x, torch.ones(2, requires_grad=True))


@pytest.fixture
def product():
    """A product large enough to be shared between threads, and what it gives with one, to the bit."""
    if not NATIVE:
        pytest.skip("built without native kernels: products of torch depend on its threads")
    x, weight = torch.randn(1, 512), torch.randn(2048, 512)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    alone = kernels.linear(x, weight)
    torch.set_num_threads(3)
    yield lambda: torch.equal(kernels.linear(x, weight), alone)
    torch.set_num_threads(threads)


def test_threads_change_nothing(product):
    assert all(product() for _ in range(200))


def test_several_callers_at_once(product):
    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(lambda _: product(), range(200)))


def test_a_forked_child_has_threads_of_its_own(product):
    assert product()
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(pool.map(_in_child, range(4)))


def _in_child(_: int) -> bool:
    torch.set_num_threads(1)  # torch's own threads did not survive the fork
    x, weight = torch.randn(1, 512), torch.randn(2048, 512)
    expected = torch.nn.functional.linear(x, weight)
    torch.set_num_threads(3)
    return torch.allclose(kernels.linear(x, weight), expected, atol=1e-3)
