"""The bridge from an app on an asyncio loop to a session on a trio loop in another thread."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

import trio

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.graph_bridge import (
    NOW,
    EventInbox,
    graph_closed,
    num_tokens,
    start_stream,
)
from sagellm.gateway.settings import Streaming
from sagellm.runtime.messages import Request
from sagellm.session import Output, Session, Stream
from sagellm.session.requests import RequestError, Timing
from sagellm.session.stream import UnreadLimits

_WINDOW = 4  # 1/4 of the unread tokens may be in transit to the reader, 3/4 in the stream


class BatchReader(Protocol):
    """The reader of one request on another loop. The trio loop calls these methods."""

    forwarder: "StreamForwarder | None"  # set by `forward_stream`

    @property
    def request(self) -> Request: ...

    @property
    def timing(self) -> Timing: ...

    @property
    def num_taken(self) -> int:
        """The number of tokens that the reader has read. May be slightly out of date."""

    @property
    def is_left(self) -> bool:
        """Whether the reader has left."""

    def hold(self) -> None:
        """Called if an event arrives while the window is full. The event stays in the stream."""

    def is_excused(self) -> bool:
        """Whether the transport may be slow instead of the client. See `Stream.is_excused`."""

    def send(self, outputs: Sequence[Output], end: ApiError | bool) -> None:
        """Send events. `end` is True for the last events, or the error that ends the request."""


class StreamForwarder:
    """Sends the events of a stream to a reader, up to `window` tokens that it has not read.

    Further events stay in the stream and count against the limits of the stream.
    """

    def __init__(self, stream: Stream, to: BatchReader, window: int) -> None:
        self.stream = stream
        self.scope = trio.CancelScope()  # cancelled after the last event, or if the reader leaves
        self.is_held = False
        self.is_finished = False
        self._to = to
        self._window = window
        self._num_sent = 0  # tokens; written in the trio loop only
        stream.on_arrival = self.flush

    def flush(self) -> None:
        """Send all events of the stream, unless the window is full.

        If the window is full, set `is_held`: the reader must call `flush` after its next read.
        """
        if self._is_full:
            self.is_held = True
            # Check again: a read between the check and `is_held` does not call `flush`.
            if self._is_full:
                self._to.hold()
                return
        self.is_held = False
        outputs, self.is_finished = self.stream.take_nowait(), self.stream.is_over
        self._num_sent += num_tokens(outputs)
        self._to.send(outputs, self.is_finished)
        if self.is_finished:
            self.scope.cancel()

    @property
    def _is_full(self) -> bool:
        return self._num_sent - self._to.num_taken >= self._window


async def forward_stream(session: Session, streaming: Streaming, to: BatchReader) -> None:
    """Run the stream of one request in the trio loop, until it ends or the reader leaves."""
    window = window_of(streaming)
    limits = UnreadLimits(
        streaming.num_buffered_tokens - window,
        streaming.num_buffered_bytes - streaming.num_buffered_bytes // _WINDOW,
    )
    end = graph_closed()
    try:
        stream = start_stream(session, to.request, to.timing, limits)
        forwarder = to.forwarder = StreamForwarder(stream, to, window)
        stream.is_excused = to.is_excused
        if to.is_left:
            return
        with forwarder.scope:
            async with stream:
                await trio.sleep_forever()
    except ApiError as error:
        end = error
    except RequestError:
        end = graph_closed()
    finally:
        if to.forwarder is None or not to.forwarder.is_finished:
            to.send((), end)


def window_of(streaming: Streaming) -> int:
    """Return the window of a stream: the most tokens sent to the reader and not yet read."""
    return max(1, streaming.num_buffered_tokens // _WINDOW)


@asynccontextmanager
async def open_thread_bridge(
    session: Session, streaming: Streaming
) -> AsyncIterator["ThreadBridge"]:
    """Open the bridge from the session of this trio loop to one asyncio loop.

    Leaving the context cancels the unfinished requests, and their readers get an ApiError with the
    code "shutting_down".
    """
    async with trio.open_nursery() as nursery:
        bridge = ThreadBridge(session, streaming, nursery)
        try:
            yield bridge
        finally:
            bridge.is_closed = True
            nursery.cancel_scope.cancel()


class ThreadBridge:
    """The bridge between an asyncio app and a session in the trio thread.

    It is constructed in the trio thread. `open_stream` and `cancel` are called on the app's loop.
    """

    def __init__(self, session: Session, streaming: Streaming, nursery: trio.Nursery) -> None:
        self.session = session
        self.streaming = streaming
        self.is_closed = False
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._batcher: _LoopBatcher | None = None

    def open_stream(self, request: Request, timing: Timing = NOW) -> "ThreadBatches":
        if self._batcher is None:
            self._batcher = _LoopBatcher(asyncio.get_running_loop())
        return ThreadBatches(self, self._batcher, request, timing)

    async def cancel(self, request_id: str) -> bool:
        loop = asyncio.get_running_loop()
        known: asyncio.Future[bool] = loop.create_future()

        def answer(is_known: bool) -> None:
            if not known.done():
                known.set_result(is_known)

        def ask() -> None:
            is_known = self.session.cancel(request_id)
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(answer, is_known)

        self.call(ask)
        return await known

    async def cancel_elsewhere(self, call_id: str) -> bool:
        return False

    def call(self, function: Any, *args: Any) -> None:
        """Schedule a function in the trio thread. Raises ApiError if the trio run has ended."""
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError as error:
            raise graph_closed() from error

    def start(self, batches: "ThreadBatches") -> None:
        """Start a request. Called in the trio thread."""
        batcher = batches.batcher
        if self.is_closed:
            batcher.send(batches, (), graph_closed())
            return
        if batcher.wakeup is None:
            batcher.wakeup = trio.Event()
            self._nursery.start_soon(batcher.run)
        self._nursery.start_soon(forward_stream, self.session, self.streaming, batches)


class _LoopBatcher:
    """Passes batches to the asyncio loop, with one wake-up for each turn of the trio loop.

    With a wake-up for each batch, the two threads would switch at every event.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.wakeup: trio.Event | None = None  # set when batches wait; None: `run` is not active
        self._loop = loop
        self._waiting: deque[tuple[ThreadBatches, Sequence[Output], ApiError | bool]] = deque()

    def send(self, to: "ThreadBatches", outputs: Sequence[Output], end: ApiError | bool) -> None:
        """Queue a batch for a reader. Called in the trio thread."""
        self._waiting.append((to, outputs, end))
        if self.wakeup is not None:
            self.wakeup.set()
        else:
            self._wake()

    async def run(self) -> None:
        """Wake the asyncio loop for queued batches, until cancelled.

        After this task has ended, `send` wakes the loop itself for each batch.
        """
        try:
            while True:
                assert self.wakeup is not None
                await self.wakeup.wait()
                self.wakeup = trio.Event()
                self._wake()
        finally:
            self.wakeup = None
            self._wake()

    def _wake(self) -> None:
        with suppress(RuntimeError):  # the loop is closed, and has no readers
            self._loop.call_soon_threadsafe(self._hand_over)

    def _hand_over(self) -> None:
        while self._waiting:
            to, outputs, end = self._waiting.popleft()
            to.inbox.put(outputs, end)


class ThreadBatches:
    """The reader of one request, used by both loops: see `BatchReader`."""

    def __init__(
        self, bridge: ThreadBridge, batcher: _LoopBatcher, request: Request, timing: Timing
    ) -> None:
        self.batcher = batcher
        self.request = request
        self.timing = timing
        self.inbox = EventInbox(self._on_read)
        self.forwarder: StreamForwarder | None = None  # written in the trio loop only
        self.is_left = False
        self.num_taken = 0  # tokens read; written in the asyncio loop only
        self._bridge = bridge

    async def __aenter__(self) -> EventInbox:
        self._bridge.call(self._bridge.start, self)
        return self.inbox

    async def __aexit__(self, *_: object) -> None:
        self.is_left = True
        if not self.inbox.end:
            with suppress(ApiError):
                self._bridge.call(_cancel, self)

    def hold(self) -> None:
        """Do nothing: `_on_read` calls `flush`. Called in the trio thread."""

    def is_excused(self) -> bool:
        """Return False: the transport within a process is not slow. Called in the trio thread."""
        return False

    def send(self, outputs: Sequence[Output], end: ApiError | bool) -> None:
        """Send events to the app's loop. Called in the trio thread."""
        self.batcher.send(self, outputs, end)

    def _on_read(self, num_tokens: int) -> None:
        self.num_taken += num_tokens
        forwarder = self.forwarder
        if forwarder is not None and forwarder.is_held:
            with suppress(ApiError):
                self._bridge.call(forwarder.flush)


def _cancel(batches: ThreadBatches) -> None:
    """Cancel the request after its reader has left. Called in the trio thread."""
    if batches.forwarder is not None:
        batches.forwarder.scope.cancel()
