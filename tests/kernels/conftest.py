"""Sets of kernels to run a test with."""

import pytest

from sparing.kernels import dispatch

NOT_BUILT = pytest.param("", marks=pytest.mark.skip(reason="no native kernels: built without a C++ compiler"))


@pytest.fixture(params=dispatch.available(), scope="module")
def each_kernel_set(request):
    with dispatch.using(request.param):
        yield request.param


@pytest.fixture(params=dispatch.available()[1:] or [NOT_BUILT])
def native_kernel_set(request):
    with dispatch.using(request.param):
        yield request.param
