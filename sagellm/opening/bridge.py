"""The bridge from asyncio and plain threads to a session that runs in a separate trio thread."""

import asyncio
import atexit
import queue
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from contextlib import AbstractAsyncContextManager, AbstractContextManager, ExitStack
from typing import Any, Generic, TypeVar

from anyio import to_thread
from anyio.from_thread import BlockingPortal, start_blocking_portal

from sagellm.errors import misused, refuse_in_loop
from sagellm.runtime.executors.tasks import ExecutorStopped
from sagellm.runtime.messages import Answer
from sagellm.runtime.models.tokenizer import Tokenizer
from sagellm.session import Output, Prompt, RequestError, Session
from sagellm.session.requests import Encoded
from sagellm.statistics import Health, Statistics

OpenSession = Callable[[], AbstractAsyncContextManager[Session]]
T = TypeVar("T")
_ASYNC = "`async with graph.open()`, whose session is awaited"


class StreamEnd:
    """The last item of a stream's queue. `error` is the error that ended the stream, if any."""

    def __init__(self, error: BaseException | None) -> None:
        self.error = error


class _SessionThread:
    """A trio thread that holds one open session."""

    def __init__(self, open_session: OpenSession) -> None:
        self._open = open_session
        self._stack = ExitStack()
        self._is_open = False
        self.portal: BlockingPortal
        self.session: Session

    def open(self) -> None:
        with ExitStack() as stack:
            self.portal = stack.enter_context(start_blocking_portal(backend="trio"))
            manager: AbstractContextManager[Session] = self.portal.wrap_async_context_manager(
                self._open()
            )
            self.session = stack.enter_context(manager)
            self._stack = stack.pop_all()  # an error before this line also closes the portal
        self._is_open = True
        # C threads that run at the interpreter's exit would abort it, if the program never closes.
        atexit.register(self.close)

    def close(self) -> None:
        atexit.unregister(self.close)
        self._is_open = False  # first: later calls must fail, not wait for a thread that ends
        self._stack.close()

    def start(
        self, put: Callable[[Any], None], prompt: Prompt, fields: dict[str, Any]
    ) -> "Future[None]":
        """Stream one request into `put`, which the trio thread calls and which must not block.

        The last item is a `StreamEnd`. Cancelling the future cancels the request.
        """

        async def pump() -> None:
            async with self.session.stream(prompt, **fields) as stream:
                async for item in stream:
                    put(item)

        self._check_open()
        future = self.portal.start_task_soon(pump)
        # Not in `pump`: a future that is cancelled early never runs it, but the reader must end.
        future.add_done_callback(lambda done: put(StreamEnd(_error_of(done))))
        return future

    def call(self, function: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> "Future[T]":
        async def run() -> T:
            return await function(*args, **kwargs)

        self._check_open()
        return self.portal.start_task_soon(run)

    def ask(self, function: Callable[..., T], *args: Any) -> T:
        """Call a function in the trio thread, and return its result. It must not block."""
        self._check_open()
        return self.portal.call(function, *args)

    def _check_open(self) -> None:
        """Raise RequestError if the graph is closed: the error of a session inside trio."""
        if not self._is_open:
            raise RequestError(str(ExecutorStopped()))


def _error_of(done: "Future[None]") -> BaseException | None:
    return None if done.cancelled() else done.exception()


class _BridgedStream(Generic[T]):
    """The base of both kinds of stream: detects the end, and cancels the request."""

    _future: "Future[None] | None" = None
    _is_over = False

    def _close(self) -> None:
        if self._future is not None:
            self._future.cancel()

    def _is_end(self, item: object) -> bool:
        self._is_over = isinstance(item, StreamEnd)
        if isinstance(item, StreamEnd) and item.error is not None:
            raise item.error
        return self._is_over


@misused(
    __aiter__="a stream of a blocking session is read with `for`",
    __aenter__="a stream of a blocking session is entered with `with`",
)
class BlockingStream(_BridgedStream[Output]):
    """The outputs of one request, for a plain thread: an iterator and a context manager.

    Leaving the `with` block cancels the request.
    """

    def __init__(self, thread: _SessionThread, prompt: Prompt, fields: dict[str, Any]) -> None:
        # Unbounded: the trio thread puts items here, and must never block.
        self._queue: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._future = thread.start(self._queue.put, prompt, fields)

    def __enter__(self) -> "BlockingStream":
        return self

    def __exit__(self, *_: object) -> None:
        self._close()

    def __iter__(self) -> "BlockingStream":
        return self

    def __next__(self) -> Output:
        if self._is_over:
            raise StopIteration
        refuse_in_loop("reading a blocking stream", _ASYNC)
        item = self._queue.get()
        if self._is_end(item):
            raise StopIteration
        output: Output = item
        return output


class BlockingSession:
    """An open graph for plain threads; any number of threads may use it at once.

    Blocking methods raise UsageError if they are called in a trio or asyncio loop.
    """

    def __init__(self, thread: _SessionThread) -> None:
        self._thread = thread

    def stream(self, prompt: Prompt, **fields: Any) -> BlockingStream:
        """Stream like `Session.stream`, but start the request at once."""
        refuse_in_loop("session.stream of a blocking session", _ASYNC)
        return BlockingStream(self._thread, prompt, fields)

    def start(self, put: Callable[[Any], None], prompt: Prompt, **fields: Any) -> "Future[None]":
        """Start a request, and return at once. The trio thread calls `put` with each output and at
        last with a `StreamEnd`; it must not block. Cancelling the future cancels the request.
        """
        return self._thread.start(put, prompt, fields)

    def generate(self, prompt: Prompt, **fields: Any) -> Answer:
        return self._wait("generate", self._thread.session.generate, prompt, **fields)

    def generate_all(self, prompt: Prompt, **fields: Any) -> list[Answer]:
        return self._wait("generate_all", self._thread.session.generate_all, prompt, **fields)

    def embed(self, texts: Sequence[Prompt], **fields: Any) -> list[list[float]]:
        return self._wait("embed", self._thread.session.embed, texts, **fields)

    def idle(self) -> None:
        """Block the thread until every request has ended."""
        self._wait("idle", self._thread.session.idle)

    def cancel(self, request_id: str) -> bool:
        """Cancel a request; False if its id is unknown."""
        return self._thread.ask(self._thread.session.cancel, request_id)

    @property
    def max_model_len(self) -> int:
        return self._thread.session.max_model_len

    @property
    def tokenizer(self) -> Tokenizer:
        return self._thread.session.tokenizer

    def is_able(self, capability: str) -> bool:
        """Whether all engines of the default model have a capability, like `Session.is_able`."""
        return self._thread.session.is_able(capability)

    def statistics(self) -> Statistics:
        return self._thread.ask(self._thread.session.statistics)

    def health(self) -> Health:
        return self._thread.ask(self._thread.session.health)

    def encode(self, prompt: Prompt) -> Encoded:
        """Encode like `Session.encode`."""
        return self._thread.session.encode(prompt)

    def _wait(self, name: str, call: Callable[..., Awaitable[T]], *args: Any, **kwargs: Any) -> T:
        refuse_in_loop(f"session.{name} of a blocking session", _ASYNC)
        return self._thread.call(call, *args, **kwargs).result()


@misused(
    __iter__="a stream of an asyncio session is read with `async for`",
    __enter__="a stream of an asyncio session is entered with `async with`",
    __await__="a stream is not awaited: read it with `async for`, or await session.generate(...)",
)
class AsyncioStream(_BridgedStream[Output]):
    """The outputs of one request, for an asyncio task."""

    def __init__(self, thread: _SessionThread, prompt: Prompt, fields: dict[str, Any]) -> None:
        loop = asyncio.get_running_loop()
        self._queue: asyncio.Queue[Any] = asyncio.Queue()

        def put(item: object) -> None:
            if not loop.is_closed():  # the caller's loop may end before the trio thread
                loop.call_soon_threadsafe(self._queue.put_nowait, item)

        self._future = thread.start(put, prompt, fields)

    async def __aenter__(self) -> "AsyncioStream":
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        self._close()

    def __aiter__(self) -> "AsyncioStream":
        return self

    async def __anext__(self) -> Output:
        if self._is_over:
            raise StopAsyncIteration
        item = await self._queue.get()
        if self._is_end(item):
            raise StopAsyncIteration
        output: Output = item
        return output


class AsyncioSession:
    """An open graph for the asyncio tasks of one event loop."""

    def __init__(self, thread: _SessionThread) -> None:
        self._thread = thread

    def stream(self, prompt: Prompt, **fields: Any) -> AsyncioStream:
        """Stream like `Session.stream`, but start the request at once."""
        return AsyncioStream(self._thread, prompt, fields)

    async def generate(self, prompt: Prompt, **fields: Any) -> Answer:
        return await asyncio.wrap_future(
            self._thread.call(self._thread.session.generate, prompt, **fields)
        )

    async def generate_all(self, prompt: Prompt, **fields: Any) -> list[Answer]:
        return await asyncio.wrap_future(
            self._thread.call(self._thread.session.generate_all, prompt, **fields)
        )

    async def embed(self, texts: Sequence[Prompt], **fields: Any) -> list[list[float]]:
        return await asyncio.wrap_future(
            self._thread.call(self._thread.session.embed, texts, **fields)
        )

    async def idle(self) -> None:
        """Wait until every request has ended."""
        await asyncio.wrap_future(self._thread.call(self._thread.session.idle))

    def cancel(self, request_id: str) -> None:
        """Cancel a request. Returns before the cancellation, so an unknown id is not reported."""
        self._thread.portal.start_task_soon(self._thread.session.cancel, request_id)

    @property
    def max_model_len(self) -> int:
        return self._thread.session.max_model_len

    @property
    def tokenizer(self) -> Tokenizer:
        return self._thread.session.tokenizer

    def is_able(self, capability: str) -> bool:
        """Whether all engines of the default model have a capability, like `Session.is_able`."""
        return self._thread.session.is_able(capability)

    def statistics(self) -> Statistics:
        return self._thread.ask(self._thread.session.statistics)

    def health(self) -> Health:
        return self._thread.ask(self._thread.session.health)

    def encode(self, prompt: Prompt) -> Encoded:
        """Encode like `Session.encode`."""
        return self._thread.session.encode(prompt)


class Bridge:
    """Opens and closes a session in a trio thread, for code outside trio."""

    def __init__(self, open_session: OpenSession) -> None:
        self._thread = _SessionThread(open_session)

    def open_blocking(self) -> BlockingSession:
        self._thread.open()
        return BlockingSession(self._thread)

    async def open_asyncio(self) -> AsyncioSession:
        await to_thread.run_sync(self._thread.open)  # loading weights takes seconds
        return AsyncioSession(self._thread)

    def close_blocking(self) -> None:
        self._thread.close()

    async def close_asyncio(self) -> None:
        await to_thread.run_sync(self._thread.close)
