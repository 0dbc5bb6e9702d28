"""A worker ends with the process that started it, even if that was killed."""

import ctypes
import os
import shutil
import signal
import sys
import threading
from pathlib import Path

_PR_SET_PDEATHSIG = 1


def hold_lifeline(folder: Path | None = None) -> None:
    """Watch standard input, which whoever started us keeps open; at its end, end this process.

    `folder` holds the sockets, where there are any: nobody is left to remove it. A thread watches,
    so that no loop that is busy, or stuck, keeps us alive. Where there is nothing to remove, the
    kernel kills this process even if it was stopped.
    """
    if folder is None:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)

    def watch(descriptor: int) -> None:
        while os.read(descriptor, 1):
            pass
        if folder is not None:
            shutil.rmtree(folder, ignore_errors=True)
        os._exit(1)

    descriptor = os.dup(sys.stdin.fileno())
    threading.Thread(target=watch, args=(descriptor,), name="lifeline", daemon=True).start()
