"""The number of threads of the kernels, and which functions pick tokens."""

import os

import pytest

from sagellm.backends.cpu.native.library import default_threads, native_kernels
from sagellm.backends.cpu.program import pickers
from sagellm.backends.sampler import PICKERS
from sagellm.backends.token_masks import largest_allowed

KERNELS = native_kernels()
USABLE = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


@pytest.mark.parametrize(("given", "threads"), [("3", 3), ("4,2", 4), ("0", 1), (" 2 ", 2)])
def test_the_environment_gives_the_number(monkeypatch, given, threads):
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert default_threads() == threads


@pytest.mark.parametrize("given", ["", "many", None])
def test_else_there_is_one_for_each_usable_core(monkeypatch, given):
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert default_threads() == USABLE


@pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine")
def test_tokens_are_picked_in_c_on_the_threads_of_the_queue():
    found = pickers(KERNELS, 3)
    assert found.largest == KERNELS.largest_allowed
    assert found.random.func == KERNELS.sample_random
    assert found.random.keywords == {"threads": 3}


def test_without_a_library_tokens_are_picked_in_numpy():
    assert pickers(None, 3) == PICKERS
    assert PICKERS.largest is largest_allowed
