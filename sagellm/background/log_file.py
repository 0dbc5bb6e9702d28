"""The log file of a background process: kept small, and read from its end."""

import os
import shutil
import threading
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from time import sleep

MAX_BYTES = 10 << 20
NUM_FILES = 3  # older files beside the current one
_CHECK_S = 1.0
_POLL_S = 0.2


def keep_small(path: Path, max_bytes: int = MAX_BYTES, num_files: int = NUM_FILES) -> None:
    """Rotate a log file, from a thread of its own, until this process ends.

    All processes that write to the file must append. A full disk ends nothing: the check is made
    again.
    """

    def watch() -> None:
        while True:
            sleep(_CHECK_S)
            with suppress(OSError):
                if path.stat().st_size > max_bytes:
                    rotate(path, num_files)

    threading.Thread(target=watch, name="sagellm-log-file", daemon=True).start()


def rotate(path: Path, num_files: int) -> None:
    """Copy a log file to `path`.1, older copies one number up, and empty the file itself.

    The file is not renamed: other processes have it open. A line that is written between the copy
    and the truncation is lost, as with `copytruncate` of logrotate. Raises OSError.
    """
    if num_files < 1:
        os.truncate(path, 0)
        return
    for number in range(num_files - 1, 0, -1):
        older = _numbered(path, number)
        if older.exists():
            older.replace(_numbered(path, number + 1))
    shutil.copy2(path, _numbered(path, 1))
    os.truncate(path, 0)


def last_lines(path: Path, number: int) -> list[str]:
    """The last lines of a log file, without their ends. Raises OSError."""
    with open(path, encoding="utf-8", errors="replace") as file:
        return [line.rstrip("\n") for line in deque(file, maxlen=number)]


def follow(path: Path, is_over: Callable[[], bool]) -> Iterator[str]:
    """The text that is appended to a log file from now on, until `is_over` and all is read.

    A file that was rotated is read on from its beginning. Raises OSError.
    """
    with open(path, encoding="utf-8", errors="replace") as file:
        file.seek(0, os.SEEK_END)
        while True:
            will_end = is_over()  # asked first: what was written before the end is read, too
            text = file.read()
            if text:
                yield text
            elif will_end:
                return
            elif os.fstat(file.fileno()).st_size < file.tell():
                file.seek(0)
            else:
                sleep(_POLL_S)


def _numbered(path: Path, number: int) -> Path:
    return path.with_name(f"{path.name}.{number}")
