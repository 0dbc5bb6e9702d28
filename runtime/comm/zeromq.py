"""Channels over ZeroMQ: a hub in the graph's process, a dealer in each worker, over ipc or tcp.

The hub is a ROUTER socket. It identifies each peer by a random name, which only this peer received;
frames of other peers are dropped and counted. Over tcp all bytes are encrypted, and a peer without
the key is not admitted (CURVE, see `keys`). Sockets are bounded (`SOCKET_CAPACITY`,
`MAX_FRAME_BYTES`) and do not linger. A link whose peer takes no messages, or breaks the protocol,
is closed: messages never wait without bound.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Any

import msgspec
import trio
import zmq

from sagellm.graphs.log import get_logger
from sagellm.runtime.comm.channel import (
    MAX_FRAME_BYTES,
    MAX_PENDING,
    SOCKET_CAPACITY,
    ChannelClosed,
    Frame,
    FrameError,
    decode,
    encode,
)
from sagellm.runtime.comm.keys import CurveAuthenticator, CurveKeys
from sagellm.runtime.comm.protocol import GraphMessage, Message, WorkerMessage

log = get_logger("sagellm.comm")

_BUNDLE = 256  # frames received at a time; other tasks run between two bundles
_RETRY_S = 0.005  # before a frame that found no peer, or no room, is sent again
_OPTIONS = {
    zmq.LINGER: 0,  # unsent frames must not delay the end of the process
    zmq.SNDHWM: SOCKET_CAPACITY,
    zmq.RCVHWM: SOCKET_CAPACITY,
    zmq.IMMEDIATE: 1,  # queue nothing for a peer that has not connected: `send` returns False
    zmq.CONNECT_TIMEOUT: 1000,  # ms: the kernel waits longer and longer for a network that is down
    zmq.MAXMSGSIZE: MAX_FRAME_BYTES,
}
_GRAPH_DECODER = msgspec.msgpack.Decoder(GraphMessage)
_WORKER_DECODER = msgspec.msgpack.Decoder(WorkerMessage)


class Link:
    """One end of a channel over a socket, which several links may share. Implements Channel.

    `post` passes a frame to the socket, and returns whether the socket had room for it.
    """

    def __init__(
        self, post: Callable[[bytes], bool], decoder: "msgspec.msgpack.Decoder[Any]", epoch: int
    ) -> None:
        self.epoch = epoch
        self.on_close: Callable[[], None] = lambda: None
        self._post = post
        self._decoder = decoder
        self._encoder = msgspec.msgpack.Encoder()
        self._inbox: deque[Message] = deque()
        self._outbox: deque[bytes] = deque()
        self._num_sent = 0
        self._num_received = 0
        self._changed = trio.lowlevel.ParkingLot()
        self._ended: str | None = None
        self._last_received_s = -math.inf

    def put(self, message: Message) -> None:
        if self._ended is not None:
            raise ChannelClosed(self._ended)
        frame = encode(Frame(self.epoch, self._num_sent, self._encoder.encode(message)))
        self._num_sent += 1
        self._outbox.append(frame)
        self.flush()
        if len(self._outbox) > MAX_PENDING:
            self.close("its peer takes no messages")
            raise ChannelClosed("its peer takes no messages")

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

    @property
    def is_flushed(self) -> bool:
        return not self._outbox

    def close(self, why: str = "it was closed") -> None:
        if self._ended is None:
            self._ended = why
            self._outbox.clear()
            self.on_close()
        self._changed.unpark_all()

    def flush(self) -> None:
        """Send waiting frames while the socket has room."""
        while self._outbox:
            frame = self._outbox.popleft()
            if not self._post(frame):
                if self._ended is None:  # `post` also receives frames, which may end the link
                    self._outbox.appendleft(frame)
                return

    def take(self, data: bytes) -> bool:
        """Process a frame from the peer. Returns False if the frame was dropped, because it is
        broken or comes from another life of the worker.
        """
        try:
            frame = decode(data)
        except FrameError as error:
            log.warning("frame_dropped", error=str(error))
            return False
        if frame.epoch != self.epoch or self._ended is not None:
            return False
        if frame.number != self._num_received:
            # ZeroMQ loses frames when a connection breaks. A link with a gap must not go on.
            self.close(f"frame {frame.number} came where {self._num_received} was due")
            return False
        self._num_received += 1
        try:
            message = self._decoder.decode(frame.body)
        except (msgspec.DecodeError, ValueError) as error:
            self.close(f"its peer said what nobody understands: {type(error).__name__}")
            return False
        if len(self._inbox) >= MAX_PENDING:  # grants bound the messages, so the peer is at fault
            self.close("its peer says more than was asked for")
            return False
        self._inbox.append(message)
        self._last_received_s = trio.current_time()
        self._changed.unpark()
        return True


class _TrioSocket:
    """A ZeroMQ socket under trio. A send succeeds at once, or not at all.

    Hazard: the descriptor becomes readable only for changes after the last call on the socket, and
    a send is such a call. Each send must therefore also receive the frames that have arrived.
    """

    def __init__(
        self,
        kind: int,
        take: Callable[[list[bytes]], None],
        context: "zmq.Context[zmq.Socket[bytes]] | None" = None,
    ) -> None:
        self.socket = (context or zmq.Context.instance()).socket(kind)
        for option, value in _OPTIONS.items():
            self.socket.setsockopt(option, value)
        self._take = take
        self._wait = trio.CancelScope()  # the wait of `pump`

    def allow(self, endpoint: str) -> None:
        """Allow IPv6 if the endpoint needs it. Call this before the socket binds or connects."""
        if "[" in endpoint:  # an IPv6 address
            self.socket.setsockopt(zmq.IPV6, 1)

    def send(self, parts: list[bytes]) -> bool:
        """Send a message if the peer has room. Returns whether it was sent; if not, `pump` wakes
        soon, so that the caller can try again.
        """
        try:
            self.socket.send_multipart(parts, zmq.NOBLOCK)
        except zmq.ZMQError as error:
            if error.errno not in (zmq.EAGAIN, zmq.EHOSTUNREACH):
                raise
            # `_drain` below may consume the change that shows room, which then never wakes `pump`.
            self._wake_at(trio.current_time() + _RETRY_S)
            return False
        finally:
            if not self._drain():  # more frames have arrived, and the descriptor does not show it
                self._wake_at(trio.current_time())
        return True

    def _wake_at(self, time_s: float) -> None:
        """Wake `pump` at `time_s` at the latest."""
        self._wait.deadline = min(self._wait.deadline, time_s)

    async def pump(self, flush: Callable[[], bool]) -> None:
        """Receive frames until cancelled. `flush` sends waiting frames, and returns whether all
        were sent. If not, `flush` is called again at intervals, because the descriptor may not show
        that the peer has room.
        """
        descriptor = self.socket.fileno()
        while True:
            is_dry = self._drain()
            is_flushed = flush()
            if not is_dry or self.socket.poll(0):
                await trio.lowlevel.checkpoint()
                continue
            with trio.move_on_after(math.inf if is_flushed else _RETRY_S) as self._wait:
                await trio.lowlevel.wait_readable(descriptor)

    def close(self) -> None:
        self.socket.close(linger=0)

    def _drain(self) -> bool:
        """Receive the frames that have arrived, at most `_BUNDLE`. Returns whether none is left."""
        for _ in range(_BUNDLE):
            try:
                parts = self.socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return True
            self._take(parts)
        return False


class Hub:
    """The graph's end of the links to its workers, on one bound socket. `keys`: needed over tcp.

    `num_rejected` counts frames of unknown peers, broken frames, and frames of another life.
    """

    def __init__(self, keys: CurveKeys | None = None) -> None:
        self.num_rejected = 0
        self._links: dict[bytes, Link] = {}
        self._gate = CurveAuthenticator(keys) if keys is not None else None
        self._port = _TrioSocket(zmq.ROUTER, self._take, self._gate.context if self._gate else None)
        # Without this option a ROUTER silently drops frames for a peer that has not connected.
        self._port.socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        if keys is not None:
            keys.secure_server(self._port.socket)

    def bind(self, endpoint: str) -> str:
        """Bind the socket, and return the endpoint to connect to. Raises OSError; the hub is then
        closed.
        """
        self._port.allow(endpoint)
        try:
            self._port.socket.bind(endpoint)
        except zmq.ZMQError as error:
            self._close()
            raise OSError(error.errno, f"{error.strerror}: {endpoint}") from None
        return self._port.socket.getsockopt_string(zmq.LAST_ENDPOINT)

    def link(self, name: bytes, epoch: int) -> Link:
        """Make a link to the peer that will connect under `name`. Messages wait until then."""
        link = Link(lambda data: self._port.send([name, data]), _WORKER_DECODER, epoch)
        link.on_close = lambda: self._forget(name)
        self._links[name] = link
        return link

    async def run(self) -> None:
        """Send and receive frames until cancelled, and then close all links and the socket."""
        try:
            await self._port.pump(self._flush)
        finally:
            self._close()

    def _close(self) -> None:
        for link in tuple(self._links.values()):
            link.close()
        self._port.close()
        if self._gate is not None:
            self._gate.close()

    def _take(self, parts: list[bytes]) -> None:
        link = self._links.get(parts[0])
        if link is None or len(parts) != 2 or not link.take(parts[1]):
            self.num_rejected += 1

    def _forget(self, name: bytes) -> None:
        self._links.pop(name, None)

    def _flush(self) -> bool:
        links = tuple(self._links.values())
        for link in links:
            link.flush()
        return all(link.is_flushed for link in links)


class Dealer:
    """A worker's end: one link to the hub at `endpoint`, under the name that the hub expects."""

    def __init__(
        self, endpoint: str, name: bytes, epoch: int, keys: CurveKeys | None = None
    ) -> None:
        self._port = _TrioSocket(zmq.DEALER, self._take)
        if keys is not None:
            keys.secure_client(self._port.socket)
        self._port.socket.setsockopt(zmq.ROUTING_ID, name)
        self.link = Link(lambda data: self._port.send([data]), _GRAPH_DECODER, epoch)
        self._port.allow(endpoint)
        self._port.socket.connect(endpoint)

    async def run(self) -> None:
        """Send and receive frames until cancelled, and then close the link and the socket."""
        try:
            await self._port.pump(self._flush)
        finally:
            self.link.close()
            self._port.close()

    def _take(self, parts: list[bytes]) -> None:
        if len(parts) == 1:
            self.link.take(parts[0])

    def _flush(self) -> bool:
        self.link.flush()
        return self.link.is_flushed
