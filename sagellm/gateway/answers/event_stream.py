"""Server-sent events: the frame of one event, and a stream that lives as long as its client."""

from collections.abc import Awaitable, Callable
from typing import TypeVar

import anyio
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from sagellm.gateway.api_errors import ApiError, note_error
from sagellm.gateway.settings import Streaming

DONE = b"data: [DONE]\n\n"
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_RAW = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
_FAILED = ApiError(500, "internal error; the answer is not whole")
# JSON may hold these as they are, but many clients split a stream at whatever Unicode calls a line.
_LINE_ENDS = {"\x85": b"\\u0085", "\u2028": b"\\u2028", "\u2029": b"\\u2029"}
_ESCAPES = tuple((character.encode(), escape) for character, escape in _LINE_ENDS.items())


def event(content: bytes) -> bytes:
    """One event whose data is a JSON text."""
    return b"data: " + escaped(content) + b"\n\n"


def escaped(content: bytes) -> bytes:
    """The same JSON text, on one line whatever is taken for a line's end."""
    if not content.isascii():
        for character, escape in _ESCAPES:
            content = content.replace(character, escape)
    return content


class EventWriter:
    """Where the events of one stream are written. Bytes that are given together leave together.

    Raises ClientDisconnect where the server says so.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        self._quiet: anyio.Event | None = None  # while a keep-alive comment is on its way
        self.is_started = False
        self.is_sending = False
        self.since_s = anyio.current_time()  # that it sends, or has nothing to send

    async def send(self, content: bytes, *, is_last: bool = False) -> None:
        """Waits for as long as the client does not read."""
        self.is_sending, self.since_s = True, anyio.current_time()
        if self._quiet is not None:
            await self._quiet.wait()
        await self._begin()
        await self._put({"type": "http.response.body", "body": content, "more_body": not is_last})
        self.is_sending = False

    async def keep_alive(self) -> None:
        """A comment; events that come meanwhile wait behind it.

        Before the first event it begins the stream: what waits so long has been admitted, so that a
        refusal with a status of its own is hardly to come any more.
        """
        self.since_s = anyio.current_time()
        quiet = self._quiet = anyio.Event()
        try:
            await self._begin()
            await self._put({"type": "http.response.body", "body": KEEP_ALIVE, "more_body": True})
        finally:
            self._quiet = None
            quiet.set()

    async def _begin(self) -> None:
        if not self.is_started:
            self.is_started = True
            await self._put({"type": "http.response.start", "status": 200, "headers": _RAW})

    async def _put(self, message: Message) -> None:
        try:
            await self._send(message)
        except OSError as error:
            raise ClientDisconnect from error


Tell = Callable[[EventWriter], Awaitable[None]]


class EventStream(Response):
    """Runs `tell`, which writes the events, and ends the stream as the contract has it.

    An ApiError before anything was sent is raised; after that it becomes the last event, and so
    does a fault of our own, which is raised too. Where the client leaves, or does not read for
    `stall_s`, `tell` is cancelled, the stream is left unfinished, and `on_gone` is called.
    What the last event says went wrong is noted in the call's state, for the log.
    """

    def __init__(self, tell: Tell, streaming: Streaming, on_gone: Callable[[], None]) -> None:
        super().__init__(headers=HEADERS)
        self._tell = tell
        self._streaming = streaming
        self._on_gone = on_gone

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        outlet, is_over = EventWriter(send), False
        failure: Exception | None = None
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._attend, receive, outlet, tasks.cancel_scope)
            try:
                await self._finish(outlet, scope)
                is_over = True
            except ClientDisconnect:
                is_over = False
            except Exception as error:
                is_over, failure = True, error
            tasks.cancel_scope.cancel()
        if failure is not None:
            raise failure
        if not is_over:
            self._on_gone()

    async def _finish(self, outlet: EventWriter, scope: Scope) -> None:
        last = DONE
        try:
            return await self._tell(outlet)
        except ClientDisconnect:
            raise
        except ApiError as error:
            if not outlet.is_started:
                raise
            note_error(scope, error)
            last = event(error.encoded) + DONE
        except Exception:
            if outlet.is_started:
                note_error(scope, _FAILED)
                await outlet.send(event(_FAILED.encoded) + DONE, is_last=True)
            raise
        await outlet.send(last, is_last=True)

    async def _attend(
        self, receive: Receive, outlet: EventWriter, whole: anyio.CancelScope
    ) -> None:
        """Wait for the client to leave; meanwhile keep the stream alive, or end it as stalled."""
        while True:
            soon_s = anyio.current_time() + self._streaming.keep_alive_s  # a send may end before
            with anyio.CancelScope(deadline=min(soon_s, self._due_s(outlet))):
                await until_gone(receive)
                break
            if anyio.current_time() < self._due_s(outlet):
                continue  # something was sent meanwhile
            if outlet.is_sending or not await self._is_heard(outlet):
                break
        whole.cancel()

    async def _is_heard(self, outlet: EventWriter) -> bool:
        """Whether a comment could be sent in time."""
        with anyio.move_on_after(self._streaming.stall_s) as limit:
            await outlet.keep_alive()
        return not limit.cancelled_caught

    def _due_s(self, outlet: EventWriter) -> float:
        """When sending has stalled; or when it is time to say that we are still there."""
        limits = self._streaming
        return outlet.since_s + (limits.stall_s if outlet.is_sending else limits.keep_alive_s)


T = TypeVar("T")


async def until_gone(receive: Receive) -> None:
    """Return when the client has left. Its request was read before."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def attended(receive: Receive, work: Callable[[], Awaitable[T]]) -> T | None:
    """What `work` returns; None where the client left first, and `work` was cancelled.

    Raises what `work` raises, as it was raised.
    """
    result: T | None = None
    failure: Exception | None = None

    async def attend() -> None:
        await until_gone(receive)
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(attend)
        try:
            result = await work()
        except Exception as error:
            failure = error
        tasks.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return result
