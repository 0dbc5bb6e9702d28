"""A program that calls the threads of a team by ctypes, and prints the CPU time that it took.

Arguments: the library of team.c, what to run, and the number of threads.
"""

import ctypes
import os
import sys
import time
from collections.abc import Callable

ROUNDS = 400
LATE_S = 0.1
Share = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)
library = ctypes.CDLL(sys.argv[1])
barrier = ctypes.create_string_buffer(256)


def meet(count: int, threads: int) -> None:
    for _ in range(count):
        library.barrier_wait(barrier, threads)


def one_core(threads: int) -> None:
    """Meet at barriers on a core that all threads share."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    run(lambda number: meet(ROUNDS, threads), threads)


def many_rounds(threads: int) -> None:
    """Run short rounds on a core that all threads share."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    for _ in range(ROUNDS):
        run(lambda number: None, threads)


def late_at_barrier(threads: int) -> None:
    """Wait at a barrier for a thread that comes late."""
    run(lambda number: (late(number), meet(1, threads)), threads)


def late_at_end(threads: int) -> None:
    """Wait for a helper that ends late."""
    run(late, threads)


def late(number: int) -> None:
    if number == 1:
        time.sleep(LATE_S)


def run(work: Callable[[int], object], threads: int) -> None:
    seen = []

    def share(job: object, number: int, count: int) -> None:
        seen.append(number)
        work(number)

    library.team_run(Share(share), None, threads)
    assert sorted(seen) == list(range(threads)), seen


WAYS = {way.__name__: way for way in (one_core, many_rounds, late_at_barrier, late_at_end)}

if __name__ == "__main__":
    began_s = time.process_time()
    WAYS[sys.argv[2]](int(sys.argv[3]))
    print(time.process_time() - began_s)
