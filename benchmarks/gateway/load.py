"""A closed loop over raw connections: a client that costs less than the measured servers.

    python -m benchmarks.gateway.load PORT CONNECTIONS SECONDS BODY

Prints one JSON line: requests, events, failures, connections that ended unanswered, seconds,
latencies in ms.
"""

import json
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field

import trio


@dataclass(slots=True)
class Tally:
    """The counts of all connections together."""

    num_events: int = 0
    num_failed: int = 0
    num_unanswered: int = 0
    latencies_s: list[float] = field(default_factory=list)


class Unanswered(ConnectionError):
    """The connection ended before the first byte of an answer, which keep-alive allows."""


async def converse(port: int, request: bytes, until: float, tally: Tally) -> None:
    """Send request after request until `until`; reconnect when the server closes the connection."""
    while time.perf_counter() < until:
        async with await trio.open_tcp_stream("127.0.0.1", port) as stream:
            with suppress(Unanswered):
                while time.perf_counter() < until:
                    await ask(stream, request, tally)


async def ask(stream: trio.abc.Stream, request: bytes, tally: Tally) -> None:
    """Send one request and read its whole answer. Raises Unanswered, ConnectionError."""
    started = time.perf_counter()
    try:
        await stream.send_all(request)
        read = await _part(stream)
    except (ConnectionError, trio.BrokenResourceError):
        tally.num_unanswered += 1
        raise Unanswered from None
    answer = await _answer(stream, read)
    tally.latencies_s.append(time.perf_counter() - started)
    tally.num_events += answer.count(b"data: ")
    tally.num_failed += not answer.startswith(b"HTTP/1.1 200")


async def _answer(stream: trio.abc.Stream, read: bytes) -> bytes:
    """The bytes of one answer, chunked or with a length; `read` holds the bytes read so far.

    Raises ConnectionError if the connection ends early.
    """
    while b"\r\n\r\n" not in read:
        read += await _part(stream)
    head, _, body = read.partition(b"\r\n\r\n")
    length = next(
        (int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"),
        None,
    )
    parts, total = [read], len(body)
    tail = body[-5:]  # without the head, which may end with the same bytes, for example "max=100"
    while (total < length) if length is not None else (tail != b"0\r\n\r\n"):
        part = await _part(stream)
        parts.append(part)
        total += len(part)
        tail = (tail + part)[-5:]
    return b"".join(parts)


async def _part(stream: trio.abc.Stream) -> bytes:
    part = await stream.receive_some(65536)
    if not part:
        raise ConnectionError("the server ended the connection")
    return bytes(part)


async def main() -> None:
    port, connections, seconds, body = sys.argv[1:5]
    request = (
        f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n{body}"
    ).encode()
    tally, started = Tally(), time.perf_counter()
    async with trio.open_nursery() as nursery:
        for _ in range(int(connections)):
            nursery.start_soon(converse, int(port), request, started + float(seconds), tally)
    taken, ordered = time.perf_counter() - started, sorted(tally.latencies_s)
    print(
        json.dumps(
            {
                "requests": len(ordered),
                "events": tally.num_events,
                "failed": tally.num_failed,
                "unanswered": tally.num_unanswered,
                "seconds": taken,
                "p50_ms": 1e3 * ordered[len(ordered) // 2],
                "p99_ms": 1e3 * ordered[int(0.99 * (len(ordered) - 1))],
            }
        )
    )


if __name__ == "__main__":
    trio.run(main)
