"""A link between two processes of this machine: a socket pair, messages framed by their length."""

from collections.abc import AsyncGenerator
from socket import socket
from typing import Any, Generic, TypeVar

import anyio
import msgspec
from anyio.abc import ByteStream

from sagellm.gateway.processes.messages import dec_hook, enc_hook
from sagellm.graphs.log import get_logger

LOG = get_logger("sagellm.gateway")

T = TypeVar("T")

_HEAD_BYTES = 4
_MOST_BYTES = 256 << 20  # of one message; bodies of calls are bounded long before
_READ_BYTES = 1 << 18


class Link(Generic[T]):
    """Both sides of one have one; `hears` is the union of the messages that come, of type T.

    What is put during one turn of the loop leaves together. What may wait is bounded by those who
    put: streams by their windows, calls by their budgets.
    """

    def __init__(self, stream: ByteStream, hears: Any) -> None:
        self._stream = stream
        self._encoder = msgspec.msgpack.Encoder(enc_hook=enc_hook)
        self._decoder: msgspec.msgpack.Decoder[T] = msgspec.msgpack.Decoder(
            hears, dec_hook=dec_hook
        )
        self._waiting = bytearray()
        self._stirred = anyio.Event()
        self._is_sending = False
        self.is_broken = False

    def put(self, message: msgspec.Struct) -> None:
        """Send it soon; nothing happens where nobody hears any more."""
        if not self.is_broken:
            body = self._encoder.encode(message)
            self._waiting += len(body).to_bytes(_HEAD_BYTES, "little")
            self._waiting += body
            self._stirred.set()

    async def send(self) -> None:
        """What is put, until cancelled or the other side is gone."""
        try:
            while True:
                await self._stirred.wait()
                self._stirred = anyio.Event()
                leaving, self._waiting = self._waiting, bytearray()
                self._is_sending = True
                await self._stream.send(bytes(leaving))
                self._is_sending = False
        except (anyio.BrokenResourceError, anyio.ClosedResourceError):
            self.is_broken = True
            self._waiting.clear()

    async def flush(self) -> None:
        """Wait until `send` has sent all that was put."""
        while (self._waiting or self._is_sending) and not self.is_broken:  # noqa: ASYNC110
            await anyio.sleep(0.001)

    async def messages(self) -> AsyncGenerator[T]:
        """Until the other side is gone, or says what nobody understands."""
        unread = bytearray()
        try:
            while True:
                unread += await self._stream.receive(_READ_BYTES)
                for body in _frames(unread):
                    yield self._decoder.decode(body)
        except (anyio.EndOfStream, anyio.BrokenResourceError, anyio.ClosedResourceError):
            pass
        except (msgspec.DecodeError, ValueError) as error:
            LOG.error("link_garbled", error=type(error).__name__)
        finally:
            self.is_broken = True


def read_first(sock: socket, kind: type[T]) -> T:
    """The first message, before any loop runs. Raises OSError where the other side is gone."""
    size = int.from_bytes(_exactly(sock, _HEAD_BYTES), "little")
    return msgspec.msgpack.decode(_exactly(sock, size), type=kind, dec_hook=dec_hook)


def _exactly(sock: socket, size: int) -> bytes:
    read = bytearray()
    while len(read) < size:
        part = sock.recv(size - len(read))
        if not part:
            raise ConnectionError("the graph's process is gone")
        read += part
    return bytes(read)


def _frames(unread: bytearray) -> list[bytes]:
    """The bodies of all whole frames, which are taken away. Raises ValueError."""
    found, start = [], 0
    while len(unread) - start >= _HEAD_BYTES:
        size = int.from_bytes(unread[start : start + _HEAD_BYTES], "little")
        if size > _MOST_BYTES:
            raise ValueError("a message that is too long")
        end = start + _HEAD_BYTES + size
        if len(unread) < end:
            break
        found.append(bytes(unread[start + _HEAD_BYTES : end]))
        start = end
    del unread[:start]
    return found
