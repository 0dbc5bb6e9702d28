"""The contract of a link between two processes, and the one inside a process."""

import math
from collections import deque
from typing import Protocol

import trio

from sagellm.runtime.comm.protocol import Message

ROOM = 1024  # messages that a socket holds, either way
MOST_WAITING = 64 * ROOM  # messages that a channel holds for a peer, or a reader, that is slow


class ChannelClosed(ConnectionError):
    """The link has ended: its peer is gone, or broke the rules; the message says which."""


class Channel(Protocol):
    """Messages in order, each once, or the link breaks: it never loses one silently.

    How much may be under way is the business of those who talk: what asks is answered, and events
    wait for credit. `MOST_WAITING` is the last resort, where a peer does not take what it is sent.
    """

    def put(self, message: Message) -> None:
        """Send without waiting. Raises ChannelClosed, also where the peer leaves no room."""

    async def receive(self) -> Message:
        """The next message. Raises ChannelClosed once all that came before the end was received."""

    @property
    def heard_s(self) -> float:
        """When anything last came, on trio's clock; any message is a sign of life."""

    def close(self, why: str = "it was closed") -> None:
        """End this side; twice does no harm. Nobody tells the other: it hears silence."""


class MemoryChannel:
    """One side of a link inside a process."""

    def __init__(self) -> None:
        self._peer: MemoryChannel = self
        self._inbox: deque[Message] = deque()
        self._stirred = trio.lowlevel.ParkingLot()
        self._ended: str | None = None
        self._heard_s = -math.inf

    def put(self, message: Message) -> None:
        if self._ended is not None:
            raise ChannelClosed(self._ended)
        if len(self._peer._inbox) >= MOST_WAITING:
            self.close("its peer takes no messages")
            raise ChannelClosed("its peer takes no messages")
        if self._peer._ended is None:
            self._peer._take(message)

    async def receive(self) -> Message:
        await trio.lowlevel.checkpoint()
        while not self._inbox:
            if self._ended is not None:
                raise ChannelClosed(self._ended)
            await self._stirred.park()
        return self._inbox.popleft()

    @property
    def heard_s(self) -> float:
        return self._heard_s

    def close(self, why: str = "it was closed") -> None:
        if self._ended is None:
            self._ended = why
        self._stirred.unpark_all()

    def _take(self, message: Message) -> None:
        self._inbox.append(message)
        self._heard_s = trio.current_time()
        self._stirred.unpark()


def memory_channels() -> tuple[MemoryChannel, MemoryChannel]:
    """Both sides of a link."""
    one, other = MemoryChannel(), MemoryChannel()
    one._peer, other._peer = other, one
    return one, other
