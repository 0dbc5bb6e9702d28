"""The door of an app on an asyncio loop to a session whose trio loop is in another thread."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Any, Protocol

import trio

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.graph_bridge import GraphRequest, event_of, graph_closed, stream_of
from sagellm.gateway.settings import Streaming
from sagellm.runtime.messages import TokenEvent
from sagellm.session import Output, Session
from sagellm.session.requests import RequestError
from sagellm.session.stream import Stream

_WINDOW = 4  # this part of what may wait unread waits at the reader, the rest in the stream


class BatchReader(Protocol):
    """Whoever asked, as the trio loop sees it."""

    forwarder: "StreamForwarder | None"  # set once its stream is there

    @property
    def num_taken(self) -> int:
        """Tokens that were read, as far as known here."""

    @property
    def is_left(self) -> bool:
        """Whether it wants no more."""

    def hold(self) -> None:
        """Something waits, for which there is no room; called again while that is so."""

    def is_excused(self) -> bool:
        """Whether something between here and whoever asked may be what does not read."""

    def send(self, outputs: Sequence[Output], end: ApiError | bool) -> None:
        """`end`: whether, or with which error, nothing comes after."""


class StreamForwarder:
    """Sends a stream's events over as they come, while there is room.

    What finds no room stays in the stream, and counts against its limits.
    """

    def __init__(self, stream: Stream, to: BatchReader, window: int) -> None:
        self.stream = stream
        self.scope = trio.CancelScope()  # over when all was sent, or the reader has left
        self.is_held = False
        self.is_finished = False
        self._to = to
        self._window = window
        self._num_sent = 0  # tokens; written in the trio loop only
        stream.on_arrival = self.flush

    def flush(self) -> None:
        """Send what waits. While the window is full nothing is sent: reading calls this again."""
        if self._is_full:
            self.is_held = True
            if self._is_full:  # still: it may have been read before `is_held` could be seen
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


async def forward_stream(
    session: Session, streaming: Streaming, entry: GraphRequest, to: BatchReader
) -> None:
    """One request's task in the trio loop, which sleeps but for its start and its end."""
    window = window_of(streaming)
    tokens = streaming.num_buffered_tokens - window
    size = streaming.num_buffered_bytes - streaming.num_buffered_bytes // _WINDOW
    end = graph_closed()
    try:
        stream = stream_of(session, entry, tokens, size)
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
    """The tokens that may be on their way to a reader, or wait there."""
    return max(1, streaming.num_buffered_tokens // _WINDOW)


def num_tokens(outputs: Sequence[Output]) -> int:
    return sum(output.num_tokens for output in outputs)


@asynccontextmanager
async def open_thread_bridge(
    session: Session, streaming: Streaming
) -> AsyncIterator["ThreadBridge"]:
    """A door for one asyncio loop, open for as long as this trio context is.

    Leaving it cancels what is unfinished; its readers are told that the server shuts down.
    """
    async with trio.open_nursery() as nursery:
        bridge = ThreadBridge(session, streaming, nursery)
        try:
            yield bridge
        finally:
            bridge.is_closed = True
            nursery.cancel_scope.cancel()


class ThreadBridge:
    """Made in the trio thread; `enter` and `cancel` are called in the loop of the app."""

    def __init__(self, session: Session, streaming: Streaming, nursery: trio.Nursery) -> None:
        self.session = session
        self.streaming = streaming
        self.is_closed = False
        self._nursery = nursery
        self._token = trio.lowlevel.current_trio_token()
        self._ferry: _LoopBatcher | None = None

    def enter(self, entry: GraphRequest) -> "ThreadBatches":
        if self._ferry is None:
            self._ferry = _LoopBatcher(asyncio.get_running_loop())
        return ThreadBatches(self, entry, self._ferry)

    async def cancel(self, request_id: str) -> bool:
        loop = asyncio.get_running_loop()
        known: asyncio.Future[bool] = loop.create_future()

        def tell(is_known: bool) -> None:
            if not known.done():
                known.set_result(is_known)

        def ask() -> None:
            is_known = self.session.cancel(request_id)
            with suppress(RuntimeError):  # the loop was closed meanwhile
                loop.call_soon_threadsafe(tell, is_known)

        self.call(ask)
        return await known

    async def cancel_elsewhere(self, call_id: str) -> bool:
        return False

    def call(self, function: Any, *args: Any) -> None:
        """Run a function in the trio thread, soon. Raises ApiError where that has ended."""
        try:
            self._token.run_sync_soon(function, *args)
        except trio.RunFinishedError as error:
            raise graph_closed() from error

    def start(self, entered: "ThreadBatches", entry: GraphRequest) -> None:
        """In the trio thread."""
        if self.is_closed:
            entered.batcher.send(entered, (), graph_closed())
            return
        if entered.batcher.departure is None:
            entered.batcher.departure = trio.Event()
            self._nursery.start_soon(entered.batcher.run)
        self._nursery.start_soon(forward_stream, self.session, self.streaming, entry, entered)


class _LoopBatcher:
    """Brings batches to the asyncio loop. All that one turn of the trio loop yields goes over with
    one wake-up: a wake-up in the middle would make the threads take turns at every event.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.departure: trio.Event | None = None  # set when something waits; None: it does not run
        self._loop = loop
        self._waiting: deque[tuple[ThreadBatches, Sequence[Output], ApiError | bool]] = deque()

    def send(self, to: "ThreadBatches", outputs: Sequence[Output], end: ApiError | bool) -> None:
        """In the trio thread. `end`: whether, or with which error, nothing comes after."""
        self._waiting.append((to, outputs, end))
        if self.departure is not None:
            self.departure.set()
        else:
            self._depart()

    async def run(self) -> None:
        """Until cancelled; what is sent after that goes over one by one."""
        try:
            while True:
                assert self.departure is not None
                await self.departure.wait()
                self.departure = trio.Event()
                self._depart()
        finally:
            self.departure = None
            self._depart()

    def _depart(self) -> None:
        with suppress(RuntimeError):  # the loop was closed: nobody reads any more
            self._loop.call_soon_threadsafe(self._land)

    def _land(self) -> None:
        while self._waiting:
            to, outputs, end = self._waiting.popleft()
            to.put(outputs, end)


class ThreadBatches:
    """One request that was let in, seen from the asyncio loop."""

    def __init__(self, bridge: ThreadBridge, entry: GraphRequest, batcher: _LoopBatcher) -> None:
        self.batcher = batcher
        self.forwarder: StreamForwarder | None = None  # set in the trio thread
        self.is_left = False
        self.num_taken = 0  # tokens; written in the asyncio loop only
        self._door = bridge
        self._entry = entry
        self._unread: list[Output] = []
        self._end: ApiError | bool = False
        self._arrival: asyncio.Future[None] | None = None  # what a reader waits for

    async def __aenter__(self) -> "ThreadBatches":
        self._door.call(self._door.start, self, self._entry)
        return self

    async def __aexit__(self, *_: object) -> None:
        self.is_left = True
        if not self._end:
            with suppress(ApiError):
                self._door.call(_cancel, self)

    def __aiter__(self) -> "ThreadBatches":
        return self

    async def __anext__(self) -> Sequence[TokenEvent]:
        while not self._unread:
            if isinstance(self._end, ApiError):
                raise self._end
            if self._end:
                raise StopAsyncIteration
            self._arrival = asyncio.get_running_loop().create_future()
            await self._arrival
        return self._take()

    def hold(self) -> None:
        """In the trio thread."""

    def is_excused(self) -> bool:
        """In the trio thread: the other one is of the same process."""
        return False

    def send(self, outputs: Sequence[Output], end: ApiError | bool) -> None:
        """In the trio thread."""
        self.batcher.send(self, outputs, end)

    def put(self, outputs: Sequence[Output], end: ApiError | bool) -> None:
        """Called by the ferry."""
        self._unread.extend(outputs)
        self._end = self._end or end
        if self._arrival is not None and not self._arrival.done():
            self._arrival.set_result(None)

    def _take(self) -> list[TokenEvent]:
        taken, self._unread = self._unread, []
        self.num_taken += num_tokens(taken)
        forwarder = self.forwarder
        if forwarder is not None and forwarder.is_held:
            with suppress(ApiError):
                self._door.call(forwarder.flush)
        return [event_of(output) for output in taken]


def _cancel(entered: ThreadBatches) -> None:
    """In the trio thread: the reader has gone."""
    if entered.forwarder is not None:
        entered.forwarder.scope.cancel()
