"""The helper threads of the C kernels: as many as asked for, one team a calling thread, none after
that thread has ended.
"""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from sagellm.backends.cpu.linear import pack
from sagellm.backends.cpu.native.library import native_kernels

KERNELS = native_kernels()
TASKS = Path("/proc/self/task")
pytestmark = [
    pytest.mark.skipif(KERNELS is None, reason="no C compiler on this machine"),
    pytest.mark.skipif(not TASKS.exists(), reason="threads are counted in /proc"),
]


def num_threads():
    """The threads of this process, those of the kernels included."""
    return len(os.listdir(TASKS))


def product(threads, depth=64):
    """Whether a product on so many threads is right."""
    x, numbers = np.ones((1, depth), np.float32), np.arange(7, dtype=np.float32)
    weight = np.repeat(numbers[:, None], depth, 1)
    product = pack(KERNELS, weight, None, threads=threads)(x, threads)
    return np.array_equal(product, depth * numbers[None])


def in_a_thread(function):
    """The result of `function` on a thread of its own, which ends after the call."""
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join(60.0)
    return found[0]


def settled(number):
    """Whether the process comes down to `number` threads: ended ones are listed for a moment."""
    until = time.monotonic() + 10.0
    while num_threads() > number and time.monotonic() < until:
        time.sleep(0.01)
    return num_threads() <= number


def test_helpers_come_as_they_are_needed_and_stay_for_the_next_kernel():
    def run():
        before, counts = num_threads(), []
        for threads in (1, 3, 2, 5, 3, 1):
            assert all(product(threads) for _ in range(20))
            counts.append(num_threads() - before)
        return counts

    assert in_a_thread(run) == [0, 2, 2, 4, 4, 4]


def test_helpers_end_with_the_thread_that_they_helped():
    before = num_threads()
    for _ in range(5):
        assert in_a_thread(lambda: product(4))
    assert settled(before)


def test_helpers_that_fell_asleep_wake_for_the_next_kernel():
    def run():
        right = []
        for _ in range(10):
            right.append(product(3))
            time.sleep(0.002)  # they look out for a tenth of that
        return all(right)

    assert in_a_thread(run)


def test_threads_that_run_kernels_at_once_do_not_disturb_each_other():
    weight = np.random.default_rng(0).standard_normal((300, 64), np.float32)
    linear = pack(KERNELS, weight, None)

    def run(number):
        x = np.full((1, 64), number, np.float32)
        wanted = linear(x, 2)
        return all(np.array_equal(linear(x, 2), wanted) for _ in range(300))

    with ThreadPoolExecutor(6) as pool:
        assert all(pool.map(run, range(24)))
