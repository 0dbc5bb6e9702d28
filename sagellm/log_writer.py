"""Log lines to stderr, written by a thread: whoever logs never waits for whoever reads."""

import os
import sys
import threading
from collections import deque
from collections.abc import Callable

_MOST_BYTES = 1 << 20  # that wait
_ERASE = b"\r\x1b[2K"
_CLOSE_S = 1.0  # for what waits, at the end


def _dropped(num: int) -> str:
    return f'{{"event": "logs_dropped", "num": {num}}}'


class LogWriter:
    """What finds no room, or cannot be written (a full disk), is dropped and counted; once there is
    room again, a line says how much it was.
    """

    def __init__(self, dropped: Callable[[int], str] = _dropped) -> None:
        """`dropped` makes the line that says how many lines were dropped."""
        self.num_dropped = 0
        self.takes_line = False  # that of the terminal, which a bar may be drawn in
        self._dropped = dropped
        self._num_told = 0
        self._lines: deque[bytes] = deque()
        self._num_bytes = 0
        self._changed = threading.Condition()
        self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="log-writer", daemon=True)
        self._thread.start()

    def write(self, text: str) -> int:
        line = text.encode("utf-8", "replace")
        with self._changed:
            if self._is_closed or self._num_bytes + len(line) > _MOST_BYTES:
                self.num_dropped += 1
            else:
                self._lines.append(line)
                self._num_bytes += len(line)
                self._changed.notify()
        return len(text)

    def flush(self) -> None:
        """Lines are on their way."""

    def close(self) -> None:
        """Write what waits, as far as it goes within a second."""
        with self._changed:
            self._is_closed = True
            self._changed.notify()
        self._thread.join(_CLOSE_S)

    def _work(self) -> None:
        while True:
            with self._changed:
                while not self._lines and not self._is_closed:
                    self._changed.wait()
                if not self._lines:
                    return
                line = self._lines.popleft()
                self._num_bytes -= len(line)
            is_written = write_line(_ERASE + line if self.takes_line else line)
            with self._changed:
                self.num_dropped += not is_written
                num_new = self.num_dropped - self._num_told
            if is_written and num_new and write_line(f"{self._dropped(num_new)}\n".encode()):
                self._num_told += num_new


def write_line(line: bytes) -> bool:
    """Whether all of it was written. To the descriptor, if there is one: what others print waits
    for nothing that is held here.
    """
    try:
        descriptor = sys.stderr.fileno()
    except (AttributeError, OSError, ValueError):
        descriptor = None
    try:
        if descriptor is None:
            sys.stderr.write(line.decode("utf-8"))
        else:
            while line:
                line = line[os.write(descriptor, line) :]
    except (AttributeError, OSError, ValueError):
        return False
    return True
