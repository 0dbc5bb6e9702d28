"""A copy with a checksum: the same bytes, and the checksum of the xxhash library."""

import numpy as np
import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from sagellm.backends.cpu.native.library import native_kernels

KERNELS = native_kernels()
pytestmark = pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=5).filter(lambda sizes: sum(sizes) >= 4),
    st.integers(0, 9),
)
def test_runs_are_copied_and_summed_as_one(sizes, seed):
    source = np.random.default_rng(seed).integers(0, 256, 64 * sum(sizes), dtype=np.uint8)
    landed = np.zeros(len(source) + 64 * len(sizes), np.uint8)
    runs, sent, start = [], 0, 0
    for size in (64 * size for size in sizes):
        runs.append((source.ctypes.data + sent, landed.ctypes.data + start, size))
        sent, start = sent + size, start + size + 64  # a gap that nobody may write to
    assert KERNELS.copy_sum(runs) == xxhash.xxh3_64_intdigest(source.data)
    pieces = [landed[to - landed.ctypes.data :][:size] for _, to, size in runs]
    assert (np.concatenate(pieces) == source).all()
    assert landed.sum(dtype=np.int64) == source.sum(dtype=np.int64)


def test_a_bit_changes_the_sum():
    source = np.zeros(4096, np.uint8)
    landed = np.zeros_like(source)
    run = (source.ctypes.data, landed.ctypes.data, len(source))
    sums = {KERNELS.copy_sum([run])}
    for at in range(0, 4096, 61):
        source[:] = 0
        source[at] = 1 << at % 8
        sums.add(KERNELS.copy_sum([run]))
    assert len(sums) == 1 + len(range(0, 4096, 61))
