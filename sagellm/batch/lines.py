"""Reading input line by line without holding up the event loop."""

from collections.abc import AsyncIterator
from io import FileIO

import trio

from sagellm.batch.line import MAX_LINE_BYTES

CHUNK_BYTES = 1 << 20


async def numbered_lines(file: FileIO) -> AsyncIterator[tuple[int, bytes]]:
    """The lines that are not blank, with their numbers from 1. Of one that is longer than
    MAX_LINE_BYTES only so much comes that it is seen to be.

    Reads in a thread, which cancellation leaves behind: a pipe or a terminal may never answer.
    `file` is unbuffered, so that such a thread holds no lock that the end of the process needs.
    """
    number, line = 1, bytearray()
    while chunk := await trio.to_thread.run_sync(file.read, CHUNK_BYTES, abandon_on_cancel=True):
        *ends, rest = chunk.split(b"\n")
        for end in ends:
            _extend(line, end)
            if shown := _shown(number, bytes(line)):
                yield number, shown
            number += 1
            line.clear()
        _extend(line, rest)
    if shown := _shown(number, bytes(line)):
        yield number, shown


def _extend(line: bytearray, part: bytes) -> None:
    """In place: copying the line for each chunk would make long ones quadratic."""
    line += part[: MAX_LINE_BYTES + 1 - len(line)]


def _shown(number: int, line: bytes) -> bytes:
    """The line without white space around it, and without a byte order mark before the first."""
    if len(line) > MAX_LINE_BYTES:
        return line
    return line.removeprefix(b"\xef\xbb\xbf").strip() if number == 1 else line.strip()
