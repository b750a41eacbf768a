"""Tensors in huge pages are tensors like others: apart from each other, aligned, given back."""

import gc
import mmap
import os
import sys

import pytest
import torch

from sparing.kernels import huge_pages
from sparing.kernels.huge_pages import HugePages

LARGE = (1000, 77)  # more than `SMALL` in float32, and no multiple of a line of the cache


def mapped_bytes() -> int:
    with open("/proc/self/statm") as file:
        return int(file.read().split()[0]) * mmap.PAGESIZE


def filled(memory: HugePages, count: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    return [memory.empty(LARGE, dtype=dtype, device="cpu").fill_(i) for i in range(count)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64])
def test_tensors_lie_apart_and_aligned(dtype):
    tensors = filled(HugePages(), 20, dtype)
    for i, tensor in enumerate(tensors):
        assert tensor.shape == LARGE and tensor.dtype == dtype and tensor.is_contiguous()
        assert tensor.data_ptr() % huge_pages.ALIGNMENT == 0
        assert (tensor == i).all()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes  # its own: saving one does not save its neighbours


def test_what_does_not_fit_a_block_gets_one_of_its_own(monkeypatch):
    monkeypatch.setattr(huge_pages, "BLOCK_BYTES", 3 * huge_pages.PAGE)
    memory = HugePages()
    tensors = filled(memory, 30)
    large = memory.empty((5 * huge_pages.PAGE,), dtype=torch.uint8, device="cpu").fill_(7)
    assert all((tensor == i).all() for i, tensor in enumerate(tensors)) and (large == 7).all()


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="the system has no huge pages to ask for")
def test_the_block_is_asked_for_in_huge_pages(monkeypatch):
    asked = []

    class Watched(mmap.mmap):
        def madvise(self, *arguments):
            asked.append(arguments)
            super().madvise(*arguments)

    monkeypatch.setattr(mmap, "mmap", Watched)
    tensors = filled(HugePages(), 20)
    assert asked == [(mmap.MADV_HUGEPAGE,)]
    assert tensors[0].data_ptr() % huge_pages.PAGE == 0


@pytest.mark.skipif(sys.platform != "linux", reason="sizes are read from /proc")
def test_memory_is_given_back_with_the_last_tensor():
    gc.collect()  # what earlier tests left must not be given back in between
    before = mapped_bytes()
    memory = HugePages()
    tensors = filled(memory, 3)
    assert mapped_bytes() >= before + huge_pages.BLOCK_BYTES
    del memory, tensors[1:]
    gc.collect()
    assert mapped_bytes() >= before + huge_pages.BLOCK_BYTES and not tensors[0].any()
    del tensors
    gc.collect()
    assert mapped_bytes() < before + huge_pages.BLOCK_BYTES


def test_small_tensors_and_other_devices_are_torchs(monkeypatch):
    monkeypatch.setattr(mmap, "mmap", lambda *_, **__: pytest.fail("a block was asked for"))
    memory = HugePages()
    assert memory.empty((3, 4), dtype=torch.float32, device="cpu").shape == (3, 4)
    assert memory.empty((), dtype=torch.int64, device="cpu").shape == ()
    assert memory.empty((0, 5), dtype=torch.float32, device="cpu").shape == (0, 5)
    assert memory.empty(LARGE, dtype=torch.float32, device="meta").is_meta


@pytest.mark.parametrize("lacks", ["name", "pages", "addresses"])
def test_a_system_without_them_is_served_by_torch(monkeypatch, lacks):
    class Refuses(mmap.mmap):
        def madvise(self, *arguments):
            raise OSError(22, os.strerror(22))

    def no_addresses(*arguments, **options):
        raise OSError(12, os.strerror(12))

    if lacks == "name":
        monkeypatch.delattr(mmap, "MADV_HUGEPAGE", raising=False)
    else:
        monkeypatch.setattr(mmap, "mmap", Refuses if lacks == "pages" else no_addresses)
    memory = HugePages()
    assert all((tensor == i).all() for i, tensor in enumerate(filled(memory, 3)))
    assert memory._block is None
