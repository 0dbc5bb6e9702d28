"""Server-sent events out of bytes, as the HTML standard reads them (section 9.2.6)."""

from dataclasses import dataclass

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
