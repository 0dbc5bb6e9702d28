"""The graph's side of one gateway process: its start, its requests, its health and its end."""

import socket
from collections.abc import Callable, Sequence
from contextlib import aclosing
from typing import Protocol

import msgspec
import trio
from anyio.abc import UNIXSocketStream

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.gateway import call_of
from sagellm.gateway.graph_bridge import event_of
from sagellm.gateway.processes.link import (
    Abandon,
    CounterReport,
    Drained,
    GatewayMessage,
    GatewaySetup,
    MessageLink,
    ReportCounters,
    RetireRequested,
    Started,
    StreamEvents,
    StreamRefused,
    SubmitRequest,
    TokensRead,
)
from sagellm.gateway.processes.main import GatewayStart
from sagellm.gateway.settings import Streaming
from sagellm.gateway.thread_bridge import StreamForwarder, forward_stream
from sagellm.runtime.cluster.child_process import ChildProcess
from sagellm.runtime.messages import Request
from sagellm.session import Output, Session

_NUM_ROUNDS = 3  # counter reports without a `TokensRead`, after which the client counts as slow


class PolledGateway(Protocol):
    """A gateway process that sends counter reports on request."""

    def ask_once(self) -> int:
        """Request a counter report, unless a requested one is missing. Return its number."""

    def has_answered(self, number: int) -> bool:
        """Whether the report with this number, or a later report, has arrived."""
        ...


class GatewayEndpoint:
    """Submits the requests of one gateway process to the session, in tasks of `nursery`.

    If a request's id is in use, usually by another gateway, the request gets an id with a suffix.
    Clients do not see the suffix, because their gateway answers under its own id. `claimed`: the
    session's request ids of all gateways.
    """

    def __init__(
        self,
        session: Session,
        streaming: Streaming,
        claimed: set[str],
        link: MessageLink[GatewayMessage],
        nursery: trio.Nursery,
        gateway: PolledGateway,
    ) -> None:
        self._session = session
        self._streaming = streaming
        self._link = link
        self._nursery = nursery
        self._gateway = gateway
        self._readers: dict[int, _LinkReader] = {}
        self._claimed = claimed

    def handle(self, message: SubmitRequest | TokensRead | Abandon) -> None:
        """Handle a message of the gateway. Messages for closed streams are ignored."""
        if isinstance(message, SubmitRequest):
            self._begin(message)
            return
        reader = self._readers.get(message.stream)
        if reader is None:
            return
        if isinstance(message, TokensRead):
            reader.take(message.num_tokens)
        else:
            reader.leave()

    def cancel(self, request_id: str) -> bool:
        """Cancel a request. `request_id`: its id in the gateway. Return False if unknown."""
        return self._cancel(lambda asked_id: asked_id == request_id)

    # A call may have several requests in the graph, each with an id that starts with the call's.
    def cancel_call(self, call_id: str) -> bool:
        """Cancel the requests of a call. Return False if this gateway has no such call."""
        return self._cancel(lambda asked_id: call_of(asked_id) == call_id)

    def _cancel(self, is_meant: Callable[[str], bool]) -> bool:
        meant = [
            reader.request.request_id
            for reader in self._readers.values()
            if is_meant(reader.asked_id)
        ]
        return any([self._session.cancel(request_id) for request_id in meant])  # noqa: C419 (all)

    def _begin(self, message: SubmitRequest) -> None:
        asked_id, stream = message.request.request_id, message.stream
        request = msgspec.structs.replace(message.request, request_id=self._free_id(asked_id))
        reader = _LinkReader(message, request, self._link.put, self._forget, self._gateway)
        self._readers[stream] = reader
        self._claimed.add(request.request_id)
        self._nursery.start_soon(forward_stream, self._session, self._streaming, reader)

    def _free_id(self, asked_id: str) -> str:
        found, number = asked_id, 1
        while found in self._claimed or self._session.is_in_use(found):
            number += 1
            found = f"{asked_id}~{number}"
        return found

    def _forget(self, stream: int) -> None:
        reader = self._readers.pop(stream, None)
        if reader is not None:
            self._claimed.discard(reader.request.request_id)


class _LinkReader:
    """The reader of one request: sends its events to the gateway over the link."""

    def __init__(
        self,
        message: SubmitRequest,
        request: Request,
        put: Callable[[msgspec.Struct], None],
        forget: Callable[[int], None],
        gateway: PolledGateway,
    ) -> None:
        """`request` is the request of `message`, with an id that is free in the session."""
        self.asked_id = message.request.request_id
        self.request = request
        self.timing = message.timing
        self.forwarder: StreamForwarder | None = None
        self.num_taken = 0
        self.is_left = False
        self._stream = message.stream
        self._put = put
        self._forget = forget
        self._gateway = gateway
        self._num_rounds = 0  # counter reports since the last `TokensRead`
        self._asked: int | None = None

    def send(self, outputs: Sequence[Output], end: ApiError | bool) -> None:
        if end:
            self._forget(self._stream)
        if self.is_left:
            return
        if isinstance(end, ApiError):
            self._put(StreamRefused.of(self._stream, end))
        else:
            events = [event_of(output) for output in outputs]
            self._put(StreamEvents(self._stream, events, end))

    def take(self, num_tokens: int) -> None:
        """Record that the client has read `num_tokens` more tokens."""
        self.num_taken += num_tokens
        self._num_rounds, self._asked = 0, None
        if self.forwarder is not None and self.forwarder.is_held:
            self.forwarder.flush()

    def hold(self) -> None:
        """Request a counter report, to find out whether the gateway or the client is slow."""
        if self.is_excused() and (self._asked is None or self._gateway.has_answered(self._asked)):
            self._num_rounds += self._asked is not None
            self._asked = self._gateway.ask_once()

    def is_excused(self) -> bool:
        """Whether the gateway may be slow, instead of the client.

        False after `_NUM_ROUNDS` counter reports without a `TokensRead`: the gateway works, so the
        client does not read.
        """
        return self._num_rounds < _NUM_ROUNDS

    def leave(self) -> None:
        """Cancel the request after the client has left."""
        self.is_left = True
        if self.forwarder is not None:
            self.forwarder.scope.cancel()


MODULE = "sagellm.gateway.processes.main"
START_S = 60.0  # the most time until a new process accepts connections
POLL_S = 1.0  # the interval of requests for counter reports, which show that the process lives
SILENT_S = 10.0  # a process without messages for this time, and without CPU time, counts as dead
BUSY_S = 60.0  # the same for a process that uses CPU time: parsing many large bodies takes long
EXIT_S = 1.0  # the most time from the last message of a process to its exit


class GatewayProcess:
    """A gateway process and the link to it.

    `counted`: its last counter report. `is_up`: it accepts connections. `is_idle`: it has drained.
    `is_over`: it has exited or is retiring, so another process may replace it.
    """

    def __init__(self, process: ChildProcess, stream: UNIXSocketStream) -> None:
        self.link: MessageLink[GatewayMessage] = MessageLink(stream, GatewayMessage)
        self.endpoint: GatewayEndpoint | None = None
        self.counted: CounterReport | None = None
        self.is_up = self.is_idle = self.is_over = False
        self.why = ""  # the cause of the exit; "" before the exit
        self._process = process
        self._stream = stream
        self._num_asked = 0
        self._last_received_s = trio.current_time()
        self._cpu_s = 0.0

    @classmethod
    async def begin(
        cls, start: Callable[[int], GatewayStart], setup: Callable[[], GatewaySetup]
    ) -> "GatewayProcess":
        """Start a process, and send it its setup. Raises OSError.

        `start` is called with the file descriptor of the process's end of the link. `setup` is
        called after the start, so that it returns the current state.
        """
        here, there = socket.socketpair()
        with there:
            begun = start(there.fileno())
            try:
                process = ChildProcess(MODULE, begun.env, begun.files)
            except OSError:
                here.close()
                raise
        started = cls(process, await UNIXSocketStream.from_socket(here))
        started.link.put(setup())  # must be the first message: see `read_first`
        return started

    async def run(
        self,
        session: Session,
        streaming: Streaming,
        claimed: set[str],
        handle: Callable[[GatewayMessage], None],
    ) -> None:
        """Submit the process's requests, and pass other messages to `handle`, until it exits.

        The exit of the process cancels its requests. Cancelling `run` kills the process. `claimed`:
        see `GatewayEndpoint`.
        """
        has_left = False
        try:
            async with trio.open_nursery() as nursery:
                self.endpoint = GatewayEndpoint(
                    session, streaming, claimed, self.link, nursery, self
                )
                nursery.start_soon(self.link.send)
                nursery.start_soon(self._watch, nursery.cancel_scope)
                async with aclosing(self.link.messages()) as messages:
                    async for message in messages:
                        self._handle(message, handle)
                has_left = True
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._end(EXIT_S if has_left else 0.0)

    def ask(self) -> int:
        """Request a counter report. Return its number; `counted` will have this or a later one."""
        self._num_asked += 1
        self.link.put(ReportCounters(self._num_asked))
        return self._num_asked

    def ask_once(self) -> int:
        """As `ask`, unless a requested report is still missing. Return the report's number."""
        return self._num_asked if not self.has_answered(self._num_asked) else self.ask()

    def has_answered(self, number: int) -> bool:
        return self.counted is not None and self.counted.number >= number

    def _handle(self, message: GatewayMessage, handle: Callable[[GatewayMessage], None]) -> None:
        self._last_received_s = trio.current_time()
        match message:
            case SubmitRequest() | TokensRead() | Abandon():
                assert self.endpoint is not None
                self.endpoint.handle(message)
                return
            case CounterReport():
                self.counted = message
            case Started():
                self.is_up = True
            case Drained():
                self.is_idle = True
            case RetireRequested():
                self.is_over = True
        handle(message)

    async def _watch(self, scope: trio.CancelScope) -> None:
        """Poll the process. If it is silent for too long, cancel `scope`, which kills it."""
        while True:
            asked_s = trio.current_time()
            self.ask()
            await trio.sleep(POLL_S)
            now = trio.current_time()
            if now - asked_s > 2 * POLL_S:  # this loop was late, and may have unread messages
                self._last_received_s = now
            before, self._cpu_s = self._cpu_s, self._process.cpu_s
            patience_s = BUSY_S if self._cpu_s > before else SILENT_S
            if now - self._last_received_s > (patience_s if self.is_up else START_S):
                self.why = f"no sign of life for {now - self._last_received_s:.0f} s"
                scope.cancel()

    async def _end(self, patience_s: float) -> None:
        """Wait up to `patience_s` seconds for the exit of the process, then kill it."""
        with trio.move_on_after(patience_s):  # the code of its own exit is the better cause
            await self._process.wait()
        self._process.kill()
        code = await self._process.wait()
        self.why = self.why or (f"signal {-code}" if code < 0 else f"exit code {code}")
        self.is_over = True
        self._process.close()
        await self._stream.aclose()
