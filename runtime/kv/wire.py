"""A tcp connection that sends from memory, and receives into it, without copies in between."""

import socket
from collections import deque
from collections.abc import Callable, Sequence
from itertools import islice

import trio

_MOST_VIEWS = 512  # in one call; the kernel takes 1,024
_WORTHWHILE_BYTES = 2**19  # to be woken for, unless fewer are to come
_STALL_S = 3.0  # for that much, or to make room: else the other side is gone
_BUFFER_BYTES = 4 * 2**20  # asked of the kernel, which may give less


class Broken(ConnectionError):
    """The connection has ended, or says what it should not."""


class Stalled(Broken):
    """The other side is silent, or takes nothing."""


def anything() -> None:
    """A check of memory that nobody takes away."""


class Wire:
    """One connected socket. `check` is called right before memory is touched: see Transport.

    All methods raise Broken; a socket whose call was cancelled is fit for nothing but `close`.
    """

    def __init__(self, connected: socket.socket) -> None:
        connected.setblocking(False)
        connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        for option in (socket.SO_SNDBUF, socket.SO_RCVBUF):
            connected.setsockopt(socket.SOL_SOCKET, option, _BUFFER_BYTES)
        self._socket = connected

    async def send(
        self, views: Sequence[bytes | memoryview], check: Callable[[], None] = anything
    ) -> None:
        await self._move(views, check, lambda some: self._socket.sendmsg(some), is_sending=True)

    async def fill(self, views: Sequence[memoryview], check: Callable[[], None] = anything) -> None:
        def receive(some: list[memoryview]) -> int:
            return self._socket.recvmsg_into(some)[0]

        await self._move(views, check, receive, is_sending=False)

    async def take(self, size: int) -> bytes:
        """So many bytes, which must be few."""
        taken = bytearray(size)
        await self.fill([memoryview(taken)])
        return bytes(taken)

    def close(self) -> None:
        self._socket.close()

    async def _move(
        self,
        views: Sequence[bytes | memoryview],
        check: Callable[[], None],
        call: Callable[[list[memoryview]], int],
        *,
        is_sending: bool,
    ) -> None:
        wait = trio.lowlevel.wait_writable if is_sending else trio.lowlevel.wait_readable
        rest = deque(memoryview(view) for view in views if len(view))
        if not rest:
            await trio.lowlevel.checkpoint()
        while rest:
            check()
            try:
                num_moved = call(list(islice(rest, _MOST_VIEWS)))
            except BlockingIOError:
                if not is_sending:
                    least = min(sum(map(len, rest)), _WORTHWHILE_BYTES)
                    self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, least)
                with trio.move_on_after(_STALL_S) as stalling:
                    await wait(self._socket)
                if stalling.cancelled_caught:
                    raise Stalled(f"next to nothing passed in {_STALL_S:g} s") from None
                continue
            except OSError as error:
                raise Broken(f"the connection ended: {error.strerror}") from None
            if num_moved == 0:
                raise Broken("the connection was closed")
            _advance(rest, num_moved)
            await trio.lowlevel.checkpoint()


def _advance(rest: deque[memoryview], num_bytes: int) -> None:
    """Drop what was moved from the front."""
    while num_bytes:
        first = rest.popleft()
        if len(first) > num_bytes:
            rest.appendleft(first[num_bytes:])
            return
        num_bytes -= len(first)


def pieces_of(views: Sequence[memoryview], size: int) -> list[list[memoryview]]:
    """The views, cut where they are longer, in lists of `size` bytes each; the last may be less.

    There is always a last one, if an empty one.
    """
    pieces: list[list[memoryview]] = [[]]
    room = size
    for view in views:
        while view:
            if not room:
                pieces.append([])
                room = size
            pieces[-1].append(view[:room])
            view, room = view[room:], room - len(view[:room])
    return pieces
