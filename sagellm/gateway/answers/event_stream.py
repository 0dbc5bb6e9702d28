"""Server-sent events: the bytes of one event, and a stream that ends if its client leaves."""

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass

import anyio
from starlette.requests import ClientDisconnect
from starlette.types import Message, Receive, Scope, Send

from sagellm.gateway.api_errors import ApiError, note_error
from sagellm.gateway.settings import Streaming

DONE = b"data: [DONE]\n\n"  # ends every stream of the OpenAI API
KEEP_ALIVE = b": keep-alive\n\n"
HEADERS = {
    "content-type": "text/event-stream",
    "cache-control": "no-cache",
    "x-accel-buffering": "no",
}
_RAW = [(name.encode(), value.encode()) for name, value in HEADERS.items()]
_FAILED = ApiError(500, "internal error; the answer is not whole")
# JSON allows these characters, but many clients split a stream at every Unicode line end.
_LINE_ENDS = {"\x85": b"\\u0085", "\u2028": b"\\u2028", "\u2029": b"\\u2029"}
_ESCAPES = tuple((character.encode(), escape) for character, escape in _LINE_ENDS.items())


def event(content: bytes) -> bytes:
    """Return the bytes of one event. `content`: its data, a JSON text."""
    return b"data: " + escaped(content) + b"\n\n"


def named_event(name: str, content: bytes) -> bytes:
    """Return the bytes of one event with a name, for APIs whose clients read events by name."""
    return b"event: " + name.encode() + b"\n" + event(content)


def failure(error: ApiError) -> bytes:
    """Return the events that end a failed stream of the OpenAI API."""
    return event(error.encoded) + DONE


def escaped(content: bytes) -> bytes:
    """Return a JSON text with all Unicode line ends escaped."""
    if not content.isascii():
        for character, escape in _ESCAPES:
            content = content.replace(character, escape)
    return content


class EventWriter:
    """Writes the events of one stream. Sending raises ClientDisconnect if the client has left.

    `failure_of` makes the last events of an error, in the form of the call's API.
    """

    def __init__(self, send: Send) -> None:
        self._send = send
        # While a keep-alive comment is being sent: the event that its end sets.
        self._quiet: anyio.Event | None = None
        self.failure_of: Callable[[ApiError], bytes] = failure
        self.is_started = False
        self.is_sending = False
        self.since_s = anyio.current_time()  # start of the current send, or end of the last comment

    async def send(self, content: bytes, *, is_last: bool = False) -> None:
        """Send the bytes of one or more events together. Blocks while the client does not read."""
        self.is_sending, self.since_s = True, anyio.current_time()
        if self._quiet is not None:
            await self._quiet.wait()
        await self._begin()
        await self._put({"type": "http.response.body", "body": content, "more_body": not is_last})
        self.is_sending = False

    async def keep_alive(self) -> None:
        """Send a comment. Events wait until it is sent.

        If no event was sent yet, the comment starts the response with status 200.
        """
        # A request that has waited so long was admitted, so a refusal is unlikely to follow.
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


@asynccontextmanager
async def event_stream(
    scope: Scope,
    receive: Receive,
    send: Send,
    streaming: Streaming,
    on_gone: Callable[[], None],
) -> AsyncIterator[EventWriter]:
    """Open a stream of events, which the `async with` block writes.

    An ApiError of the block is raised if no event was sent, and otherwise becomes the last events.
    Any other exception is raised, after it has become the last events of a started stream. Errors
    that become events are stored in `scope` for the log line.

    If the client leaves, or reads nothing for `stall_s` seconds, the block is cancelled, the stream
    stays unfinished, and `on_gone` is called.
    """
    events, is_over = EventWriter(send), False
    raised: Exception | None = None
    async with anyio.create_task_group() as tasks:
        tasks.start_soon(_attend, receive, events, streaming, tasks.cancel_scope)
        try:
            async with _ending(events, scope):
                yield events
            is_over = True
        except ClientDisconnect:
            is_over = False
        except Exception as error:  # raised outside the group, which would wrap it
            is_over, raised = True, error
        tasks.cancel_scope.cancel()
    if raised is not None:
        raise raised
    if not is_over:
        on_gone()


@asynccontextmanager
async def _ending(events: EventWriter, scope: Scope) -> AsyncIterator[None]:
    """Write an exception of the block as the last events, if the stream has started."""
    try:
        yield
    except ClientDisconnect:
        raise
    except ApiError as error:
        if not events.is_started:
            raise
        note_error(scope, error)
        await events.send(events.failure_of(error), is_last=True)
    except Exception:
        if events.is_started:
            note_error(scope, _FAILED)
            await events.send(events.failure_of(_FAILED), is_last=True)
        raise


async def _attend(
    receive: Receive, events: EventWriter, streaming: Streaming, whole: anyio.CancelScope
) -> None:
    """Send keep-alive comments. Cancel `whole` if the client leaves or reads nothing."""
    while True:
        # The state may change before `_due_s`, so look again after `keep_alive_s` at the latest.
        soon_s = anyio.current_time() + streaming.keep_alive_s
        with anyio.CancelScope(deadline=min(soon_s, _due_s(events, streaming))):
            await until_gone(receive)
            break
        if anyio.current_time() < _due_s(events, streaming):
            continue  # an event was sent in the meantime
        if events.is_sending or not await _is_heard(events, streaming):
            break
    whole.cancel()


async def _is_heard(events: EventWriter, streaming: Streaming) -> bool:
    """Send a comment. Return whether the client read it within `stall_s` seconds."""
    with anyio.move_on_after(streaming.stall_s) as limit:
        await events.keep_alive()
    return not limit.cancelled_caught


def _due_s(events: EventWriter, streaming: Streaming) -> float:
    """Return when the current send will have stalled, or else when the next comment is due."""
    return events.since_s + (streaming.stall_s if events.is_sending else streaming.keep_alive_s)


async def until_gone(receive: Receive) -> None:
    """Wait until the client has left. The whole request body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


@dataclass(slots=True)
class AttendedClient:
    """The client of a whole answer. `has_left`: it left before the end of the block."""

    has_left: bool = False


@asynccontextmanager
async def attended(receive: Receive) -> AsyncIterator[AttendedClient]:
    """Cancel the `async with` block if the client leaves. Exceptions are raised without a group."""
    client = AttendedClient(has_left=True)
    raised: Exception | None = None

    async def attend() -> None:
        await until_gone(receive)
        tasks.cancel_scope.cancel()

    async with anyio.create_task_group() as tasks:
        tasks.start_soon(attend)
        try:
            yield client
            client.has_left = False
        except Exception as error:  # raised outside the group, which would wrap it
            client.has_left, raised = False, error
        tasks.cancel_scope.cancel()
    if raised is not None:
        raise raised
