"""Conversions of bfloat16, which numpy lacks, are those of torch."""

import ctypes

import numpy as np
import psutil
import pytest
import torch

from sagellm.backends import arrays
from sagellm.backends.arrays import BFLOAT16, dtype_name, to_bfloat16, to_float32
from sagellm.backends.cpu.torch_linear import array, tensor

HAS_TRIM = hasattr(ctypes.CDLL(None), "malloc_trim")
SIZES = torch.logspace(-40, 38, 1000)
NUMBERS = torch.cat(
    [
        torch.randn(1000, generator=torch.Generator().manual_seed(0)) * SIZES,
        torch.tensor([0.0, -0.0, float("inf"), float("-inf"), 3.4e38, 1.00390625, 1.01171875]),
    ]
)


def test_rounding_is_that_of_torch():
    assert torch.equal(tensor(to_bfloat16(NUMBERS.numpy())), NUMBERS.bfloat16())
    halves = NUMBERS.half()
    assert torch.equal(tensor(to_bfloat16(halves.numpy())), halves.bfloat16())


def test_widening_is_exact():
    rounded = NUMBERS.bfloat16()
    assert torch.equal(torch.from_numpy(to_float32(array(rounded))), rounded.float())


@pytest.mark.parametrize("bits", [0x7FC00000, 0x7F800001, 0xFFFFFFFF, 0x7FFFFFFF])
def test_what_is_no_number_stays_none(bits):
    found = to_bfloat16(np.array([bits], dtype=np.uint32).view(np.float32))
    assert np.isnan(to_float32(found)).all()


def test_a_large_array_is_converted_in_parts(monkeypatch):
    monkeypatch.setattr(arrays, "_CONVERTED_AT_ONCE", 7)
    given = NUMBERS[:600].view(20, 30)
    assert torch.equal(tensor(to_bfloat16(given.numpy())), given.bfloat16())
    across = given.T
    assert torch.equal(tensor(to_bfloat16(across.numpy())), across.bfloat16())


def test_an_array_of_the_dtype_is_not_copied():
    wide, narrow = np.zeros(3, np.float32), np.zeros(3, BFLOAT16)
    assert to_float32(wide) is wide or np.shares_memory(to_float32(wide), wide)
    assert to_bfloat16(narrow) is narrow


def test_dtypes_have_the_names_of_the_kernel_dialect():
    assert [dtype_name(dtype) for dtype in (BFLOAT16, np.dtype(np.float32))] == [
        "bfloat16",
        "float32",
    ]


@pytest.mark.skipif(not HAS_TRIM, reason="the C library keeps what is freed")
def test_freed_memory_returns_to_the_system():
    blocks = [np.ones(100_000, np.uint8) for _ in range(1000)]  # too small for maps of their own
    kept = blocks[-1]  # the end of the heap is in use
    before = psutil.Process().memory_info().rss
    del blocks
    arrays.release_freed_memory()
    assert before - psutil.Process().memory_info().rss > 60e6
    assert kept.sum() == 100_000


def test_a_c_library_that_keeps_what_is_freed_is_no_error(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    arrays.release_freed_memory()
