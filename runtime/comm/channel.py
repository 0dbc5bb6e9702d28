"""The contract of a channel between two processes, its frames, and a channel inside one process."""

import math
import struct
import zlib
from collections import deque
from typing import NamedTuple, Protocol

import trio

from sagellm.runtime.comm.protocol import Message

SOCKET_CAPACITY = 1024  # messages that a socket holds in each direction
MAX_PENDING = 64 * SOCKET_CAPACITY  # messages that a channel holds for a slow peer or reader


class ChannelClosed(ConnectionError):
    """The channel has ended. The message is the reason: its peer ended, or broke the protocol."""


class Channel(Protocol):
    """Delivers messages in order, each exactly once. If it cannot, the channel ends: it never loses
    a message silently.

    The protocol bounds the number of pending messages: calls are answered, and events wait for
    grants. `MAX_PENDING` is the last resort against a peer that does not read.
    """

    def put(self, message: Message) -> None:
        """Send a message without waiting. Raises ChannelClosed, also if the peer does not read."""

    async def receive(self) -> Message:
        """Wait for the next message. Raises ChannelClosed if the channel has ended and all received
        messages have been taken.
        """

    @property
    def last_received_s(self) -> float:
        """The time at which the last message arrived, on trio's clock, in seconds. Any message is a
        sign of life.
        """

    def close(self, why: str = "it was closed") -> None:
        """End this side. Safe to call again. The peer is not notified: it only gets no more
        messages.
        """


class MemoryChannel:
    """One side of a channel inside one process. Implements Channel."""

    def __init__(self) -> None:
        self._peer: MemoryChannel = self
        self._inbox: deque[Message] = deque()
        self._changed = trio.lowlevel.ParkingLot()
        self._ended: str | None = None
        self._last_received_s = -math.inf

    def put(self, message: Message) -> None:
        if self._ended is not None:
            raise ChannelClosed(self._ended)
        if len(self._peer._inbox) >= MAX_PENDING:
            self.close("its peer takes no messages")
            raise ChannelClosed("its peer takes no messages")
        if self._peer._ended is None:  # a message to a closed side is lost, as on a socket
            self._peer._take(message)

    async def receive(self) -> Message:
        await trio.lowlevel.checkpoint()
        while not self._inbox:
            if self._ended is not None:
                raise ChannelClosed(self._ended)
            await self._changed.park()
        return self._inbox.popleft()

    @property
    def last_received_s(self) -> float:
        return self._last_received_s

    def close(self, why: str = "it was closed") -> None:
        if self._ended is None:
            self._ended = why
        self._changed.unpark_all()

    def _take(self, message: Message) -> None:
        self._inbox.append(message)
        self._last_received_s = trio.current_time()
        self._changed.unpark()


def memory_channels() -> tuple[MemoryChannel, MemoryChannel]:
    """Make both sides of a channel."""
    one, other = MemoryChannel(), MemoryChannel()
    one._peer, other._peer = other, one
    return one, other


MAX_FRAME_BYTES = 16 * 2**20  # a prompt of a million tokens fits; KV blocks use a transport

_HEADER = struct.Struct(">2sBxIQ")
_CHECKSUM = struct.Struct(">I")
_MAGIC, _VERSION = b"SG", 3
_OVERHEAD = _HEADER.size + _CHECKSUM.size


class FrameError(ValueError):
    """Bytes that are no frame. The message is the reason, and contains none of the bytes."""


class Frame(NamedTuple):
    """The bytes of one message, with an epoch, a number and a checksum:

        magic 2 | version 1 | reserved 1 | epoch 4 | number 8 | checksum 4 | body

    The sizes are in bytes. All numbers are big-endian. The checksum is the CRC-32 of all other
    bytes. `epoch` is the number of the worker's life: frames of an earlier life are dropped.
    `number` rises by one with each frame, so that a lost or repeated frame is noticed.
    """

    epoch: int
    number: int
    body: bytes


def encode(frame: Frame) -> bytes:
    """The bytes of a frame. Raises FrameError if the body is too long."""
    size = _OVERHEAD + len(frame.body)
    if size > MAX_FRAME_BYTES:
        raise FrameError(f"a message of {size} bytes exceeds {MAX_FRAME_BYTES}")
    header = _HEADER.pack(_MAGIC, _VERSION, frame.epoch, frame.number)
    return b"".join((header, _CHECKSUM.pack(_sum(header, frame.body)), frame.body))


def decode(data: bytes) -> Frame:
    """The frame of these bytes; its body is not decoded. Raises FrameError."""
    if not _OVERHEAD <= len(data) <= MAX_FRAME_BYTES:
        raise FrameError(f"{len(data)} bytes are too few, or too many, for a frame")
    header, body = data[: _HEADER.size], data[_OVERHEAD:]
    magic, version, epoch, number = _HEADER.unpack(header)
    if magic != _MAGIC:
        raise FrameError("it is no frame")
    if version != _VERSION:
        raise FrameError(f"version {version} is not {_VERSION}: both sides must run one release")
    (checksum,) = _CHECKSUM.unpack_from(data, _HEADER.size)
    if checksum != _sum(header, body):
        raise FrameError("its checksum is wrong")
    return Frame(epoch, number, body)


def _sum(header: bytes, body: bytes) -> int:
    return zlib.crc32(body, zlib.crc32(header))
