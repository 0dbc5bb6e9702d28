"""A program that calls the threads of a team by ctypes, and prints the CPU time that it took.

Arguments: the library of team.c, what to run, and the number of threads.
"""

import ctypes
import os
import sys
import threading
import time
from collections.abc import Callable

ROUNDS = 400
LATE_S = 0.1
Share = ctypes.CFUNCTYPE(None, ctypes.c_void_p, ctypes.c_int, ctypes.c_int)


class Meeting(ctypes.Structure):
    """The Meeting of team.h."""

    _fields_ = (
        ("end", ctypes.c_char * 128),
        ("threads", ctypes.c_int),
        ("helpers", ctypes.c_int),
        ("is_over", ctypes.c_int),
        ("at", ctypes.c_long * 2),
    )


library = ctypes.CDLL(sys.argv[1])
library.meet.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_long, ctypes.c_long)
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


def late_joins(threads: int) -> None:
    """Run sections that helpers join when the first three are over."""
    meeting, came, places = ctypes.create_string_buffer(512), threading.Event(), []
    library.begin_meeting(meeting)

    def share(number: int) -> None:
        at, members, last = 0, 1, None
        if number:
            came.wait()
            member, joined = library.join_meeting(meeting), Meeting.from_buffer(meeting)
            at, members = joined.at[0], joined.threads
        else:
            member = 0
        while at != last:
            places.append((at, member, members))
            if at == 2:
                came.set()
            if members == threads and last is None:
                last = at + 3
            at += 1
            if at != last:
                members = library.meet(meeting, members, at, 0)
        if not member:
            library.end_meeting(meeting)

    run(share, threads, library.team_run_open)
    sections = {}
    for at, member, members in places:
        sections.setdefault((at, members), []).append(member)
    assert len({at for at, _ in sections}) == len(sections)  # all members count alike
    assert all(sorted(sections[key]) == list(range(key[1])) for key in sections)
    assert [members for at, members in sorted(sections)][:3] == [1, 1, 1]
    assert [members for at, members in sorted(sections)][-3:] == [threads] * 3


def over_meeting(threads: int) -> None:
    """Come to a meeting whose last section is over."""
    meeting, numbers = ctypes.create_string_buffer(512), []
    library.begin_meeting(meeting)

    def share(number: int) -> None:
        if not number:
            time.sleep(LATE_S)
            library.end_meeting(meeting)
        else:
            numbers.append(library.join_meeting(meeting))

    run(share, threads, library.team_run_open)
    assert numbers == [0] * (threads - 1)


def missed_rounds(threads: int) -> None:
    """Run open rounds that end before a helper gets the core. No helper begins after the end."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    is_open, seen, strays = False, [], []

    def share(job: object, number: int, count: int) -> None:
        (seen if is_open else strays).append(number)

    kept = Share(share)
    for _ in range(ROUNDS):
        is_open = True
        library.team_run_open(kept, None, threads)
        is_open = False
    time.sleep(LATE_S / 10)
    assert seen.count(0) == ROUNDS > seen.count(1)
    assert not strays


def late(number: int) -> None:
    if number == 1:
        time.sleep(LATE_S)


def run(
    work: Callable[[int], object], threads: int, how: Callable[..., None] | None = None
) -> None:
    seen = []

    def share(job: object, number: int, count: int) -> None:
        seen.append(number)
        work(number)

    (how or library.team_run)(Share(share), None, threads)
    assert sorted(seen) == list(range(threads)), seen


ALONE = (one_core, many_rounds, late_at_barrier, late_at_end)
WAYS = {way.__name__: way for way in (*ALONE, late_joins, over_meeting, missed_rounds)}

if __name__ == "__main__":
    began_s = time.process_time()
    WAYS[sys.argv[2]](int(sys.argv[3]))
    print(time.process_time() - began_s)
