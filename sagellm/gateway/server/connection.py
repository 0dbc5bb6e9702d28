"""A client's TCP stream that gives up on who does not read, and closes without losing an answer."""

from contextlib import suppress

import trio

LINGER_S = 1.0  # how long a closed connection waits for what the client still sends
_GONE = (trio.BrokenResourceError, trio.ClosedResourceError)


class Connection(trio.abc.HalfCloseableStream):
    """Wraps a socket stream.

    A client that does not take one send in `stall_s` is cut off, also where the sender is shielded
    from cancellation. After `send_eof` what still comes is read and thrown away until the client
    closes too: to close with unread bytes would make the kernel drop the answer (RFC 9112, 9.6).
    """

    def __init__(self, stream: trio.SocketStream, stall_s: float) -> None:
        self._stream = stream
        self._stall_s = stall_s
        self._is_leaving = False
        self._is_reading = False
        self._ended = trio.Event()

    @property
    def socket(self) -> trio.socket.SocketType:
        return self._stream.socket

    def kill(self) -> None:
        """Close at once; whoever sends or receives gets ClosedResourceError."""
        self._ended.set()
        self._stream.socket.close()

    async def send_all(self, data: bytes | bytearray | memoryview) -> None:
        with trio.move_on_after(self._stall_s):
            await self._stream.send_all(data)
            return
        self.kill()
        raise trio.BrokenResourceError("the client does not read")

    async def wait_send_all_might_not_block(self) -> None:
        await self._stream.wait_send_all_might_not_block()

    async def send_eof(self) -> None:
        self._is_leaving = True
        await self._stream.send_eof()

    async def receive_some(self, max_bytes: int | None = None) -> bytes:
        """Nothing, as at the end, once this side has closed."""
        if self._is_reading:  # the one who closes reads the rest
            await self._ended.wait()
            return b""
        self._is_reading = True
        try:
            return await self._receive(max_bytes)
        finally:
            self._is_reading = False

    async def aclose(self) -> None:
        if self._is_leaving and not self._ended.is_set():
            with trio.move_on_after(LINGER_S), suppress(*_GONE):
                await self.receive_some(1 << 16)
        self.kill()
        await trio.lowlevel.checkpoint()

    async def _receive(self, max_bytes: int | None) -> bytes:
        while True:
            try:
                data = bytes(await self._stream.receive_some(max_bytes))
            except _GONE:
                self._ended.set()
                raise
            if not data:
                self._ended.set()
            if not data or not self._is_leaving:
                return data
