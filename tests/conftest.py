"""Settings for the whole suite."""

import os
import signal

# Before torch is imported anywhere: tiny tensors gain nothing from threads, and spinning ones slow their neighbours.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TRITON_INTERPRET", "1")  # before Triton is imported: its kernels then run on the CPU

import pytest
from hypothesis import HealthCheck, settings

# A shell starts background jobs with Ctrl-C ignored, and children inherit that: tests interrupt themselves and others.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Same examples on every run; a first example may import torch, so there is no deadline.
settings.register_profile(
    "suite", derandomize=True, deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seeded():
    import torch

    torch.manual_seed(0)
