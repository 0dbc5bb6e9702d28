"""The gateway process's side of its link to the graph: requests, queries and counters."""

import itertools
from collections.abc import Iterable, Mapping

import anyio

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.graph_bridge import NOW, EventInbox, graph_closed
from sagellm.gateway.metrics.meters import CALL_S, EndpointCall, HttpMeters
from sagellm.gateway.processes.link import (
    Abandon,
    BucketCounts,
    CancelCall,
    CancelRequest,
    CounterReport,
    MessageLink,
    QueryAnswer,
    Scrape,
    StreamEvents,
    StreamRefused,
    SubmitRequest,
    ToGatewayMessage,
    TokensRead,
)
from sagellm.gateway.settings import Streaming
from sagellm.gateway.thread_bridge import window_of
from sagellm.runtime.containers import Buckets
from sagellm.runtime.messages import Request
from sagellm.session.requests import Timing


class ProcessBridge:
    """The bridge between the app of a gateway process and the graph. Used on the app's loop.

    The owner of the link must pass its messages to `handle`.
    """

    def __init__(self, link: MessageLink[ToGatewayMessage], streaming: Streaming) -> None:
        self.link = link
        # A report after half a window reaches the graph before the window is full.
        self.report_tokens = max(1, window_of(streaming) // 2)
        self._numbers = itertools.count()
        self._streams: dict[int, EventInbox] = {}
        self._questions: dict[int, _PendingQuery] = {}

    def open_stream(self, request: Request, timing: Timing = NOW) -> "ProcessBatches":
        return ProcessBatches(self, SubmitRequest(next(self._numbers), request, timing))

    async def cancel(self, request_id: str) -> bool:
        return (await self._ask(CancelRequest(next(self._numbers), request_id))).is_known

    async def cancel_elsewhere(self, call_id: str) -> bool:
        return (await self._ask(CancelCall(next(self._numbers), call_id))).is_known

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """Return the metrics of the graph and of all gateways, and their content type."""
        answer = await self._ask(Scrape(next(self._numbers), accept))
        if not answer.is_known:
            raise ApiError(500, "the metrics could not be read; see the log")
        return answer.content, answer.content_type

    def handle(self, message: StreamEvents | StreamRefused | QueryAnswer) -> None:
        """Handle a message of the graph. Messages for closed streams are ignored."""
        if isinstance(message, QueryAnswer):
            question = self._questions.get(message.number)
            if question is not None:
                question.answer = message
                question.came.set()
            return
        inbox = self._streams.get(message.stream)
        if inbox is None:
            return
        if isinstance(message, StreamRefused):
            inbox.put((), message.error)
        else:
            inbox.put(message.events, message.is_end)

    def close(self) -> None:
        """End all streams and queries with an error, after the graph's process has ended."""
        for inbox in tuple(self._streams.values()):
            inbox.put((), graph_closed())
        for question in self._questions.values():
            question.came.set()

    async def _ask(self, message: CancelRequest | CancelCall | Scrape) -> QueryAnswer:
        """Send a query, and return its answer. Raises ApiError if the link is broken."""
        question = self._questions[message.number] = _PendingQuery()
        try:
            if not self.link.is_broken:
                self.link.put(message)
                await question.came.wait()
        finally:
            del self._questions[message.number]
        if question.answer is None:
            raise graph_closed()
        return question.answer

    # ---- called by streams -------------------------------------------------------------------

    def submit(self, message: SubmitRequest, inbox: EventInbox) -> None:
        """Send a request. Its events go to `inbox`. Raises ApiError if the link is broken."""
        if self.link.is_broken:
            raise graph_closed()
        self.link.put(message)
        self._streams[message.stream] = inbox

    def leave(self, stream: int) -> None:
        """Receive no more events of a stream, and cancel its unfinished request."""
        inbox = self._streams.pop(stream, None)
        if inbox is not None and not inbox.end:
            self.link.put(Abandon(stream))


class _PendingQuery:
    def __init__(self) -> None:
        self.came = anyio.Event()
        self.answer: QueryAnswer | None = None


class ProcessBatches:
    """The event batches of one request of this gateway process."""

    def __init__(self, bridge: ProcessBridge, message: SubmitRequest) -> None:
        self._bridge = bridge
        self._message = message
        self._inbox = EventInbox(self._on_read)
        self._num_unreported = 0  # tokens read since the last report

    async def __aenter__(self) -> EventInbox:
        self._bridge.submit(self._message, self._inbox)
        return self._inbox

    async def __aexit__(self, *_: object) -> None:
        self._bridge.leave(self._message.stream)

    def _on_read(self, num_tokens: int) -> None:
        self._num_unreported += num_tokens
        if self._num_unreported >= self._bridge.report_tokens and not self._inbox.end:
            self._bridge.link.put(TokensRead(self._message.stream, self._num_unreported))
            self._num_unreported = 0


class RemoteMeters(HttpMeters):
    """The meters of one gateway process. The exposition is read from the graph's process."""

    def __init__(self, bridge: ProcessBridge, endpoints: Iterable[str]) -> None:
        super().__init__(endpoints)
        self._bridge = bridge

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        return await self._bridge.scrape(accept)


def counter_report(meters: HttpMeters, number: int = 0) -> CounterReport:
    """Return a report of all counts. `number`: that of the `ReportCounters`."""
    return CounterReport(
        number,
        meters.num_active,
        meters.num_disconnects,
        meters.num_dropped_lines,
        [(*call, number) for call, number in meters.requests.items()],
        [(*call, status, number) for (call, status), number in meters.responses.items()],
        [(*call, BucketCounts.of(seconds)) for call, seconds in meters.seconds.items()],
        BucketCounts.of(meters.all_seconds),
        BucketCounts.of(meters.app_lag.seconds),
        meters.batches.num_working,
        meters.batches.batches,
        meters.batches.requests,
    )


class SummedMeters(HttpMeters):
    """The sum of the meters of several gateway processes, computed in the graph's process."""

    def __init__(self, endpoints: Iterable[str]) -> None:
        super().__init__(endpoints)
        self._num_dropped_lines = 0

    @property
    def num_dropped_lines(self) -> int:
        return self._num_dropped_lines

    def add(self, counted: CounterReport, *, is_alive: bool) -> None:
        """Add the report of one gateway. `is_alive`: it has not exited, so its calls are open."""
        self.num_active += counted.num_active if is_alive else 0
        self.num_disconnects += counted.num_disconnects
        self._num_dropped_lines += counted.num_dropped_lines
        for *named, number in counted.requests:
            call = EndpointCall(*named)
            self.requests[call] = self.requests.get(call, 0) + number
        for endpoint, method, status, number in counted.responses:
            key = EndpointCall(endpoint, method), status
            self.responses[key] = self.responses.get(key, 0) + number
        for endpoint, method, seconds in counted.seconds:
            seconds.add_to(self.seconds.setdefault(EndpointCall(endpoint, method), Buckets(CALL_S)))
        counted.all_seconds.add_to(self.all_seconds)
        counted.app_lag.add_to(self.app_lag.seconds)
        self.batches.num_working += counted.num_working_batches if is_alive else 0
        _add(self.batches.batches, counted.batches)
        _add(self.batches.requests, counted.batch_requests)


def _add(sums: dict[str, int], counts: Mapping[str, int]) -> None:
    for name, number in counts.items():
        sums[name] = sums.get(name, 0) + number
