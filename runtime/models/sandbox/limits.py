"""Limits that a helper process sets itself, and that the system enforces."""

import os
import resource
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

OUT_OF_MEMORY = 77  # exit code
_IS_LINUX = sys.platform == "linux"
_LOOK_S = 0.01


class MemoryLimit:
    """Bounds what this process takes in addition to a level, at first what it has now.

    Linux refuses allocations beyond it (RLIMIT_AS). macOS does not know that limit: there a thread
    ends the process when it sees too much, as soon as the interpreter lets it run.
    """

    def __init__(self) -> None:
        self._level = _taken_bytes()
        self._num_bytes = 0
        if not _IS_LINUX:
            threading.Thread(target=self.watch, name="memory", daemon=True).start()

    def allow(self, num_bytes: int) -> None:
        if num_bytes == self._num_bytes:
            return
        self._num_bytes = num_bytes
        if _IS_LINUX:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            most = self._level + num_bytes
            soft = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(resource.RLIMIT_AS, (soft, hard))

    def rise(self) -> None:
        """What is taken now is the level from here on."""
        self._level = _taken_bytes()
        self._num_bytes = 0

    def watch(self) -> None:
        while not self._num_bytes or _taken_bytes() < self._level + self._num_bytes:
            time.sleep(_LOOK_S)
        os._exit(OUT_OF_MEMORY)


def _taken_bytes() -> int:
    """Address space; where the system does not say, the peak of what was resident."""
    if _IS_LINUX:
        num_pages = int(Path("/proc/self/statm").read_text().split()[0])
        return num_pages * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS


def limit_files() -> None:
    """Write no file, and leave none when killed."""
    for limit in (resource.RLIMIT_CORE, resource.RLIMIT_FSIZE):
        resource.setrlimit(limit, (0, 0))


@contextmanager
def limit_cpu(seconds: float) -> Iterator[None]:
    """Within the block, the system kills this process by SIGPROF after so much CPU time.

    It does so inside any call into C, and whether or not somebody is left to watch. Waiting for a
    core does not count.
    """
    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGPROF})  # a parent may have blocked it
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
