"""The folder of a running graph's sockets: of this user alone, and removed with its graph.

Where all processes of a graph were killed at once nobody is left to remove it: the next graph does.
The process of the graph holds a lock in it, which the kernel lets go of at its end.
"""

import fcntl
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

PREFIX = "sagellm-"
_LOCK = "graph.lock"


class Folder:
    """Made at once, for as long as this process lives or until `remove`. Raises OSError."""

    def __init__(self) -> None:
        remove_abandoned()
        fresh = Path(tempfile.mkdtemp(prefix=f".{PREFIX}"))  # hidden until locked
        self._lock = os.open(fresh / _LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self.path = fresh.rename(fresh.with_name(fresh.name.removeprefix(".")))

    def remove(self) -> None:
        shutil.rmtree(self.path, ignore_errors=True)
        os.close(self._lock)


def remove_abandoned() -> None:
    """Remove the folders of this user's graphs of which no process is left."""
    for lock in Path(tempfile.gettempdir()).glob(f"{PREFIX}*/{_LOCK}"):
        with suppress(OSError), _held(lock):
            shutil.rmtree(lock.parent, ignore_errors=True)


@contextmanager
def _held(lock: Path) -> Iterator[None]:
    """Raises OSError where the graph lives, or is another user's."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.getuid():
            raise PermissionError(lock)
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)
