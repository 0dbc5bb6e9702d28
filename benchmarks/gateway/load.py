"""A closed loop of raw connections: as cheap a client as Python has, so that servers are measured.

    python -m benchmarks.gateway.load PORT CONNECTIONS SECONDS BODY

Prints one JSON line: requests, events, failures, seconds, latencies in ms.
"""

import json
import sys
import time
from dataclasses import dataclass, field

import trio


@dataclass(slots=True)
class Tally:
    """What all connections saw together."""

    num_events: int = 0
    num_failed: int = 0
    latencies_s: list[float] = field(default_factory=list)


async def converse(port: int, request: bytes, until: float, tally: Tally) -> None:
    """One connection: ask, read the whole answer, ask again."""
    stream = await trio.open_tcp_stream("127.0.0.1", port)
    async with stream:
        while time.perf_counter() < until:
            started = time.perf_counter()
            await stream.send_all(request)
            answer = await _answer(stream)
            tally.latencies_s.append(time.perf_counter() - started)
            tally.num_events += answer.count(b"data: ")
            tally.num_failed += not answer.startswith(b"HTTP/1.1 200")


async def _answer(stream: trio.SocketStream) -> bytes:
    """The bytes of one answer: chunked, or with a length."""
    read = await stream.receive_some(65536)
    while b"\r\n\r\n" not in read:
        read += await stream.receive_some(65536)
    head, _, _ = read.partition(b"\r\n\r\n")
    length = next(
        (int(line[15:]) for line in head.lower().split(b"\r\n") if line[:15] == b"content-length:"),
        None,
    )
    parts = [read]
    total, wanted = len(read), None if length is None else len(head) + 4 + length
    tail = read[-5:]
    while (total < wanted) if wanted is not None else (tail != b"0\r\n\r\n"):
        part = await stream.receive_some(65536)
        if not part:
            raise ConnectionError("the server ended the connection")
        parts.append(part)
        total += len(part)
        tail = (tail + part)[-5:]
    return b"".join(parts)


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
                "seconds": taken,
                "p50_ms": 1e3 * ordered[len(ordered) // 2],
                "p99_ms": 1e3 * ordered[int(0.99 * (len(ordered) - 1))],
            }
        )
    )


if __name__ == "__main__":
    trio.run(main)
