"""Reading input line by line without holding up the event loop."""

from collections.abc import AsyncIterator
from io import FileIO

import trio

CHUNK_BYTES = 1 << 20


async def numbered_lines(file: FileIO) -> AsyncIterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1.

    Reads in a thread, which cancellation leaves behind: a pipe or a terminal may never answer.
    `file` is unbuffered, so that such a thread holds no lock that the end of the process needs.
    """
    number, rest = 1, b""
    while chunk := await trio.to_thread.run_sync(file.read, CHUNK_BYTES, abandon_on_cancel=True):
        *whole, rest = (rest + chunk).split(b"\n")
        for line in whole:
            if shown := _shown(number, line):
                yield number, shown
            number += 1
    if shown := _shown(number, rest):
        yield number, shown


def _shown(number: int, line: bytes) -> bytes:
    """The line without white space around it, and without a byte order mark before the first."""
    return line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
