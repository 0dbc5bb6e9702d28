"""Weights in large pages have the same numbers, and begin where a large page begins."""

import mmap

import numpy as np
import pytest

from sagellm.backends.cpu.native.library import LARGE_PAGE, in_large_pages


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="not Linux")
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.float16])
def test_a_large_tensor_is_copied_to_the_start_of_a_page(dtype):
    array = np.arange(3 * LARGE_PAGE // 2 + 6).astype(np.int8).reshape(2, -1).astype(dtype)
    copy = in_large_pages(array)
    assert np.array_equal(copy, array)
    assert copy.dtype == dtype
    assert copy.ctypes.data % LARGE_PAGE == 0 != copy.ctypes.data - array.ctypes.data


def test_a_small_tensor_stays_where_it_is():
    array = np.zeros(LARGE_PAGE - 1, dtype=np.uint8)
    assert in_large_pages(array) is array


def test_the_copy_outlives_what_it_was_made_of():
    copies = [in_large_pages(np.full(LARGE_PAGE, n, dtype=np.uint8)) for n in range(5)]
    assert [int(copy.max()) for copy in copies] == [0, 1, 2, 3, 4]


def test_a_kernel_without_large_pages_is_no_error(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)
    array = np.ones(LARGE_PAGE, dtype=np.uint8)
    assert np.array_equal(in_large_pages(array), array)
