"""Processes that spin: other programs that want the cores that an engine uses."""

import subprocess
import sys
from types import TracebackType

END_S = 10.0
# A thread waits for the end of stdin. The process ends with its parent, however the parent ends.
_SPIN = """
import os, sys, threading
def end_with_parent():
    sys.stdin.buffer.read()
    os._exit(0)
threading.Thread(target=end_with_parent, daemon=True).start()
os.write(1, b"s")
while True:
    pass
"""


class Spinning:
    """A context manager: `number` processes of normal priority spin inside the block."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> "Spinning":
        """Return when every process spins."""
        command = [sys.executable, "-I", "-S", "-c", _SPIN]
        pipe = subprocess.PIPE
        self._processes = [
            subprocess.Popen(command, stdin=pipe, stdout=pipe) for _ in range(self._number)
        ]
        for process in self._processes:
            assert process.stdout is not None
            process.stdout.read(1)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.communicate(timeout=END_S)
        self._processes = []
