"""Weights in large pages have the same numbers, and begin where a large page begins."""

import mmap

import pytest
import torch

from sagellm.backends.cpu.native.library import LARGE_PAGE, in_large_pages


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="not Linux")
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int8, torch.float16])
def test_a_large_tensor_is_copied_to_the_start_of_a_page(dtype):
    tensor = torch.arange(3 * LARGE_PAGE // 2 + 6).to(torch.int8).view(2, -1).to(dtype)
    copy = in_large_pages(tensor)
    assert torch.equal(copy, tensor)
    assert copy.dtype == dtype
    assert copy.data_ptr() % LARGE_PAGE == 0 != copy.data_ptr() - tensor.data_ptr()


def test_a_small_tensor_stays_where_it_is():
    tensor = torch.zeros(LARGE_PAGE - 1, dtype=torch.uint8)
    assert in_large_pages(tensor) is tensor


def test_the_copy_outlives_what_it_was_made_of():
    copies = [in_large_pages(torch.full((LARGE_PAGE,), n, dtype=torch.uint8)) for n in range(5)]
    assert [int(copy.max()) for copy in copies] == [0, 1, 2, 3, 4]


def test_a_kernel_without_large_pages_is_no_error(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)
    tensor = torch.ones(LARGE_PAGE, dtype=torch.uint8)
    assert torch.equal(in_large_pages(tensor), tensor)
