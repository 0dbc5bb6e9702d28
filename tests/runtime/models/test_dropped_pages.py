"""Pages of mapped files are dropped, and no other pages."""

import mmap
import sys

import numpy as np
import psutil
import pytest

from sagellm.runtime.models.stored_weights import drop_pages

SIZE = 64 << 20  # bytes


def resident():
    return psutil.Process().memory_info().rss


@pytest.fixture
def mapped(tmp_path):
    """Two mapped files."""
    maps = []
    for number in range(2):
        path = tmp_path / f"model {number}.safetensors"
        np.arange(number, SIZE // 8 + number).tofile(path)
        with path.open("rb") as opened:
            maps.append(mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_COPY))
    return maps


def numbers_of(file):
    return np.frombuffer(file, np.int64)


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux drops pages")
def test_pages_of_a_file_are_given_back_and_come_again(mapped):
    numbers = numbers_of(mapped[0])
    total, before = numbers.sum(), resident()
    drop_pages(mapped[:1])
    assert before - resident() > 0.9 * SIZE
    assert numbers.sum() == total


def test_other_files_and_other_memory_are_left_alone(mapped):
    first, other = map(numbers_of, mapped)
    held = np.ones(SIZE // 4, np.uint8)
    totals = first.sum(), other.sum()
    before = resident()
    drop_pages(mapped[1:])
    assert before - resident() < 1.1 * SIZE
    assert held.sum() == SIZE // 4
    assert (first.sum(), other.sum()) == totals


def test_another_system_keeps_all(mapped, monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    numbers = numbers_of(mapped[0])
    total, before = numbers.sum(), resident()
    drop_pages(mapped)
    assert before - resident() < 0.1 * SIZE
    assert numbers.sum() == total
