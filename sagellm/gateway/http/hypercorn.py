"""Serves the app on trio with Hypercorn's protocols, and with limits that Hypercorn lacks."""

import errno
import select
from collections.abc import Iterator
from socket import socket
from typing import Any

import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.events import Event, Updated
from hypercorn.protocol import ProtocolWrapper
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import ConnectionState

from sagellm.gateway.http.app import App, Overflow
from sagellm.gateway.http.hypercorn_protocols import Connection, HypercornConfig, Protocols
from sagellm.gateway.settings import BACKLOG, Settings, max_connections
from sagellm.graphs.log import get_logger

LOG = get_logger("sagellm.gateway")
FULL_S = 0.1  # the pause of accepting if the system has no free file descriptor
_AT_ONCE = 64  # connections accepted in one turn of the loop, after the first
_AT_ONCE_BOUNDED = 4  # the same if calls can be refused: each call delays engines by milliseconds
_MOST_REFUSED = 256  # calls refused in one turn
_FULL = {errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM}


class HypercornServer:
    """Serves from `run` until `stop`, and then until the last connection has ended.

    This class accepts connections itself, because Hypercorn's own `serve` ends at one broken
    connection, waits for ever in a send to a client that does not read, and accepts connections
    until no file descriptor is left.
    """

    def __init__(self, app: App, settings: Settings, sock: socket) -> None:
        self._app = ASGIWrapper(app)  # type: ignore[arg-type]
        self._config = configure(settings)
        self._tls = self._config.create_ssl_context()
        self._stall_s = settings.streaming.stall_s
        self._sock = sock
        self._accepting = trio.CancelScope()
        self._context = WorkerContext(None)
        self._open: set[Connection] = set()
        self._closed = trio.lowlevel.ParkingLot()
        self._free = trio.Semaphore(max_connections())
        self._overflow = Overflow(app)
        self._polled = select.poll()  # polls the listening socket for waiting connections

    def stop(self) -> None:
        """Accept no more connections, and close idle connections."""
        self._accepting.cancel()

    def call_soon(self, function: Any, *args: Any) -> None:
        """Call a function on the app's loop, which is this loop."""
        function(*args)

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Serve. Cancellation closes every connection at once."""
        self._sock.listen(BACKLOG)
        self._polled.register(self._sock, select.POLLIN)
        listener = trio.SocketListener(trio.socket.from_stdlib_socket(self._sock))
        async with trio.open_nursery() as connections:
            try:
                task_status.started()
                with self._accepting:
                    await self._accept(listener, connections)
                listener.socket.close()
                await self._context.terminated.set()
                await self._none_open()
            finally:
                listener.socket.close()
                self._kill()  # some sends are shielded from cancellation: closing ends them

    async def _accept(self, listener: trio.SocketListener, connections: trio.Nursery) -> None:
        """Accept connections. While too many are open, further ones wait in the kernel's queue.

        If the graph has a TTFT objective, each turn of the loop accepts only a few connections, and
        refuses calls that have waited too long.
        """
        # trio accepts one connection in each turn. When turns are late, calls would wait in the
        # queue unnoticed, and even their refusal would be late. Accepting all of them at once would
        # instead delay the engines and the open streams.
        while True:
            await self._free.acquire()
            try:
                stream = await listener.accept()
            except OSError as error:
                self._free.release()
                if error.errno not in _FULL:
                    raise
                LOG.warning("accept_paused", reason=error.strerror)
                await trio.sleep(FULL_S)
            except BaseException:
                self._free.release()
                raise
            else:
                for each in (stream, *self._waiting()):
                    connections.start_soon(self._serve, Connection(each, self._stall_s))

    def _waiting(self) -> Iterator[trio.SocketStream]:
        """Yield waiting connections to serve, up to the bound for one turn; refuse late calls.

        Each connection holds a place of `_free`.
        """
        can_refuse = self._overflow.is_bounded and self._tls is None
        few = 0 if self._overflow.is_strained(trio.current_time()) else _AT_ONCE_BOUNDED
        for _ in range(few if can_refuse else _AT_ONCE):
            sock = self._next()
            if sock is None:
                return
            yield _stream(sock)
        if not can_refuse:
            return
        if not self._polled.poll(0):
            self._overflow.none_waits()
        elif self._overflow.is_over(trio.current_time()):
            yield from self._not_refused()

    def _not_refused(self) -> Iterator[trio.SocketStream]:
        """Refuse the waiting calls. Yield connections that cannot be refused yet, to serve them."""
        num_refused = 0
        for _ in range(_MOST_REFUSED):
            sock = self._next()
            if sock is None:
                break
            if self._overflow.refuse(sock):
                num_refused += 1
                self._free.release()
            else:
                yield _stream(sock)
        if num_refused:
            LOG.warning("calls_refused", num_calls=num_refused, reason="the loop is too late")

    def _next(self) -> socket | None:
        """Accept a waiting connection, and take a place of `_free`. Return None if none waits."""
        try:
            self._free.acquire_nowait()
        except trio.WouldBlock:
            return None
        try:
            sock, _ = self._sock.accept()
        except OSError:  # none waits; other errors recur in the waiting accept, which handles them
            self._overflow.none_waits()
            self._free.release()
            return None
        sock.setblocking(False)
        return sock

    async def _serve(self, connection: Connection) -> None:
        """Serve one connection. An exception is logged, and ends only this connection."""
        self._open.add(connection)
        stream: Any = connection
        if self._tls is not None:
            stream = trio.SSLStream(connection, self._tls, server_side=True, https_compatible=True)
        try:
            state = ConnectionState({})
            await _Server(self._app, self._config, self._context, state, stream).run()
        except* Exception as group:
            LOG.warning("connection_failed", exc_info=group)
        finally:
            connection.kill()
            self._open.discard(connection)
            self._free.release()
            self._closed.unpark_all()

    async def _none_open(self) -> None:
        """Wait until no connection is open."""
        while self._open:
            await self._closed.park()

    def _kill(self) -> None:
        """Close all connections at once."""
        for connection in self._open:
            connection.kill()


def _stream(sock: socket) -> trio.SocketStream:
    return trio.SocketStream(trio.socket.from_stdlib_socket(sock))


def configure(settings: Settings) -> HypercornConfig:
    """Return Hypercorn's settings for a gateway."""
    # No read timeout: a client sends nothing while it waits for an answer. `keep_alive_timeout`
    # bounds the time of headers, and `RequestBody` the time of bodies.
    config = HypercornConfig()
    config.stall_s = settings.streaming.stall_s
    config.accesslog = config.errorlog = None
    config.include_server_header = False
    config.keep_alive_timeout = settings.limits.header_s
    config.ssl_handshake_timeout = settings.limits.header_s
    config.h11_max_incomplete_size = settings.limits.header_bytes
    config.h2_max_header_list_size = settings.limits.header_bytes
    config.h2_max_concurrent_streams = 100
    if settings.tls_certificate is not None and settings.tls_key is not None:
        config.certfile, config.keyfile = str(settings.tls_certificate), str(settings.tls_key)
    return config


class _Server(TCPServer):
    """Hypercorn's connection, with the protocols of `hypercorn_protocols`.

    After the client has left, the connection is closed at once instead of after the idle time.
    """

    _has_left = False

    async def _read_data(self) -> None:
        await super()._read_data()
        self._has_left = True
        await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        if not (self._has_left and isinstance(event, Updated)):
            await super().protocol_send(event)

    @property
    def protocol(self) -> ProtocolWrapper:
        return self._protocol

    @protocol.setter
    def protocol(self, made: ProtocolWrapper) -> None:
        self._protocol = Protocols(made)
