"""Vectors in large pages hold their numbers, and begin where a large page begins."""

import mmap
import re
from pathlib import Path

import numpy as np
import pytest

from sagellm.backends.arrays import LARGE_PAGE, LargePages, empty_in_large_pages

THERE = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def filled(numbers):
    """A vector in large pages with these numbers."""
    vector = empty_in_large_pages(numbers.size, numbers.dtype)
    vector[...] = numbers
    return vector


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="not Linux")
@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.float16])
def test_a_large_vector_begins_where_a_page_begins(dtype):
    numbers = np.arange(3 * LARGE_PAGE // 2 + 6).astype(np.int8).astype(dtype)
    vector = filled(numbers)
    assert np.array_equal(vector, numbers)
    assert vector.dtype == dtype
    assert vector.ctypes.data % LARGE_PAGE == 0


@pytest.mark.skipif(not THERE.exists(), reason="a Linux without large pages")
def test_the_system_may_use_large_pages():
    vector = filled(np.zeros(3 * LARGE_PAGE, dtype=np.uint8))
    mapping = mapping_at(vector.ctypes.data)
    assert mapping["mode"] == "rw-p"  # shared memory has large pages only where an admin allows it
    assert "hg" in mapping["VmFlags"].split()


def mapping_at(address):
    """The fields of this process's mapping that contains the address."""
    found = {}
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) (\S+)", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
            found = {"mode": bounds[3]} if inside else {}
        elif found:
            name, value = line.split(":", 1)
            found[name] = value
            if name == "VmFlags":
                return found
    raise LookupError(hex(address))


def test_a_small_vector_has_no_mapping_of_its_own():
    vector = empty_in_large_pages(LARGE_PAGE - 1, np.dtype(np.uint8))
    assert (len(vector), vector.base) == (LARGE_PAGE - 1, None)


def test_a_vector_keeps_its_mapping():
    vectors = [filled(np.full(LARGE_PAGE, n, dtype=np.uint8)) for n in range(5)]
    assert [int(vector.max()) for vector in vectors] == [0, 1, 2, 3, 4]


def test_a_kernel_without_large_pages_is_no_error(monkeypatch):
    monkeypatch.setattr(mmap, "MADV_HUGEPAGE", -1, raising=False)
    numbers = np.ones(LARGE_PAGE, dtype=np.uint8)
    assert np.array_equal(filled(numbers), numbers)


@pytest.mark.skipif(not hasattr(mmap, "MADV_HUGEPAGE"), reason="not Linux")
def test_the_memory_is_private():
    """Of shared memory, Linux makes large pages only where it was told so."""
    array = empty_in_large_pages(3 * LARGE_PAGE, np.dtype(np.uint8))
    for line in Path("/proc/self/maps").read_text().splitlines():
        places, access, *_ = line.split()
        low, _, high = places.partition("-")
        if int(low, 16) <= array.ctypes.data < int(high, 16):
            assert access == "rw-p"
            return
    raise AssertionError("no mapping has the array")


SIZES = (1, LARGE_PAGE + 3, 5000, 70 << 20, 4096, 30 << 20, 40 << 20)


def test_vectors_of_one_memory_keep_their_numbers():
    memory = LargePages()
    vectors = [memory.empty(size, np.dtype(np.uint8)) for size in SIZES]
    for number, vector in enumerate(vectors):
        vector[...] = number
    for number, (vector, size) in enumerate(zip(vectors, SIZES, strict=True)):
        assert (len(vector), vector.min(), vector.max()) == (size, number, number)
        assert vector.ctypes.data % 4096 == 0


def test_a_vector_keeps_the_region_that_its_memory_has_left():
    memory = LargePages()
    first = memory.empty(1000, np.dtype(np.float32))
    first[...] = 7
    memory.empty(70 << 20, np.dtype(np.uint8))
    del memory
    assert first.dtype == np.float32
    assert set(first) == {7}


@pytest.mark.skipif(not THERE.exists(), reason="a Linux without large pages")
@pytest.mark.parametrize("size", [1000, 3 * LARGE_PAGE // 2, 70 << 20])
def test_the_end_of_a_vector_may_be_in_a_large_page(size):
    vector = LargePages().empty(size, np.dtype(np.uint8))
    for address in (vector.ctypes.data, vector.ctypes.data + size - 1):
        page = address // LARGE_PAGE * LARGE_PAGE
        assert "hg" in mapping_at(page)["VmFlags"].split()
        assert "hg" in mapping_at(page + LARGE_PAGE - 1)["VmFlags"].split()
