"""Sets of kernels to run a test with."""

import pytest

from sparing.kernels import dispatch
from tests.kernel_sets import using

NOT_BUILT = pytest.param("", marks=pytest.mark.skip(reason="no native kernels: built without a C++ compiler"))


@pytest.fixture(params=dispatch.available(), scope="module")
def each_kernel_set(request):
    with using(request.param):
        yield request.param


@pytest.fixture(params=dispatch.available()[1:] or [NOT_BUILT])
def native_kernel_set(request):
    with using(request.param):
        yield request.param
