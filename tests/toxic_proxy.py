"""A proxy between two ends of tcp connections, that does to their bytes what it is told."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeAlias

import trio

# Given how many bytes of one direction of a connection have passed, and those that come next: what
# to pass on.
Toxic: TypeAlias = Callable[[int, bytes], bytes]


class Cut(Exception):
    """The connection ends, once `passed` has gone through."""

    def __init__(self, passed: bytes) -> None:
        self.passed = passed


def clean(so_far: int, data: bytes) -> bytes:
    return data


def flipping(at: int) -> Toxic:
    """One bit of the byte at that place is flipped."""

    def flip(so_far: int, data: bytes) -> bytes:
        if so_far <= at < so_far + len(data):
            changed = bytearray(data)
            changed[at - so_far] ^= 0x10
            return bytes(changed)
        return data

    return flip


def cutting(at: int) -> Toxic:
    """It ends before the byte at that place."""

    def cut(so_far: int, data: bytes) -> bytes:
        if so_far + len(data) >= at:
            raise Cut(data[: at - so_far])
        return data

    return cut


@dataclass
class ToxicProxy:
    """`answers` are toxics of what the server says, one for each connection, the first first; what
    comes later is passed on. `seen`: what each server said.
    """

    host: str
    port: int
    answers: list[Toxic] = field(default_factory=list)
    seen: list[bytearray] = field(default_factory=list)
    listens_at: int = 0

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        self.listens_at = listeners[0].socket.getsockname()[1]
        task_status.started()
        await trio.serve_listeners(self._serve, listeners)

    async def _serve(self, client: trio.SocketStream) -> None:
        toxic = self.answers.pop(0) if self.answers else clean
        seen = bytearray()
        self.seen.append(seen)
        server = await trio.open_tcp_stream(self.host, self.port)
        async with client, server, trio.open_nursery() as nursery:
            nursery.start_soon(_pass, client, server, clean, bytearray(), nursery)
            nursery.start_soon(_pass, server, client, toxic, seen, nursery)


async def _pass(
    source: trio.SocketStream,
    sink: trio.SocketStream,
    toxic: Toxic,
    seen: bytearray,
    both: trio.Nursery,
) -> None:
    try:
        async for data in source:
            so_far = len(seen)
            seen.extend(data)
            await sink.send_all(toxic(so_far, bytes(data)))
    except Cut as cut:
        await sink.send_all(cut.passed)
    except trio.BrokenResourceError:
        pass
    both.cancel_scope.cancel()
