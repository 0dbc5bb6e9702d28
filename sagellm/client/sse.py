"""Server-sent events out of bytes, as the HTML standard reads them (section 9.2.6)."""

from contextlib import suppress
from dataclasses import dataclass

import anyio
import httpx2

from sagellm.client.failure import TRANSPORT, translation

LARGEST_EVENT = 16 << 20  # bytes
_BOM = b"\xef\xbb\xbf"


class EventTooLong(ValueError):
    """An event that does not end."""


@dataclass(frozen=True, slots=True)
class Event:
    """One event; its data lines are joined by line feeds."""

    data: bytes
    name: str = "message"


class EventReader:
    """Turns the bytes of a body, cut anywhere, into events.

    Lines end with LF, CR or CRLF and with nothing else: text that holds U+2028 or U+0085 stays
    whole, which a reader built on `str.splitlines` cuts. Comments, ids and retry times are skipped.
    httpx2.EventSource does the same for a Response alone, at three times the cost an event.
    """

    def __init__(self, largest: int = LARGEST_EVENT) -> None:
        self._largest = largest
        self._rest = b""  # of a line that has not ended
        self._is_first = True
        self._ended_with_cr = False
        self._data: list[bytes] = []
        self._name = ""
        self._size = 0

    def feed(self, chunk: bytes) -> list[Event]:
        """The events that are whole now. Raises EventTooLong."""
        lines = (self._rest + self._without_cr(chunk)).split(b"\n")
        if self._is_first:
            if len(lines) == 1 and _BOM.startswith(lines[0]):
                self._rest = lines[0]  # may be a part of the mark
                return []
            lines[0] = lines[0].removeprefix(_BOM)
            self._is_first = False
        self._rest = lines.pop()
        events = [event for line in lines if (event := self._line(line)) is not None]
        if self._size + len(self._rest) > self._largest:
            raise EventTooLong(f"an event of more than {self._largest} bytes")
        return events

    def _without_cr(self, chunk: bytes) -> bytes:
        """The chunk with LF for CR and CRLF, also for a CRLF that two chunks share."""
        if self._ended_with_cr and chunk:
            chunk = chunk.removeprefix(b"\n")
            self._ended_with_cr = False
        if b"\r" not in chunk:
            return chunk
        self._ended_with_cr = chunk.endswith(b"\r")
        return chunk.replace(b"\r\n", b"\n").replace(b"\r", b"\n")

    def _line(self, line: bytes) -> Event | None:
        """Take one line; an empty one ends the event."""
        if not line:
            return self._dispatch()
        self._size += len(line)
        field, _, value = line.partition(b":")
        value = value[1:] if value[:1] == b" " else value
        if field == b"data":
            self._data.append(value)
        elif field == b"event":
            self._name = value.decode(errors="replace")
        return None

    def _dispatch(self) -> Event | None:
        data, name = self._data, self._name
        self._data, self._name, self._size = [], "", 0
        return Event(b"\n".join(data), name or "message") if data else None


LINGER_S = 1.0  # for a server that has said all, and does not end its answer


class BodyBytes:
    """Read with `next` until None, then `finish`; `aclose` hangs up unless all was read."""

    def __init__(self, response: httpx2.Response, url: str) -> None:
        self._response = response
        self._chunks = response.aiter_bytes()
        self._url = url

    async def next(self) -> bytes | None:
        """What the network brings; None at the end. Raises ClientError."""
        try:  # no context manager: this runs for every event
            return await anext(self._chunks, None)
        except TRANSPORT as error:
            raise translation(error, self._url) from error

    async def finish(self) -> None:
        """Read the little that is left, so that the connection serves another call."""
        with anyio.move_on_after(LINGER_S), suppress(httpx2.HTTPError):
            async for _ in self._chunks:
                pass

    async def aclose(self) -> None:
        """Close the connection first; reading on then ends every generator inside httpx2, of which
        it leaves one to the garbage collector, where trio warns of it.
        """
        await self._response.aclose()
        with suppress(httpx2.HTTPError, httpx2.StreamError):
            async for _ in self._chunks:
                pass

    async def __aenter__(self) -> "BodyBytes":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()
