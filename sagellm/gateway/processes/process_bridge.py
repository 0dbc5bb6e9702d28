"""The gateway process's side of its link: requests, queries and counters."""

import itertools
from collections.abc import Iterable, Sequence

import anyio

from sagellm.gateway.api_errors import ApiError
from sagellm.gateway.graph_bridge import GraphRequest, graph_closed
from sagellm.gateway.metrics.meters import CALL_S, EndpointCall, HttpMeters
from sagellm.gateway.processes.link import (
    Abandon,
    BucketCounts,
    CancelCall,
    CancelRequest,
    CounterReport,
    GraphMessage,
    MessageLink,
    QueryAnswer,
    Scrape,
    StreamEvents,
    StreamRefused,
    SubmitRequest,
    TokensRead,
)
from sagellm.gateway.settings import Streaming
from sagellm.gateway.thread_bridge import num_tokens, window_of
from sagellm.runtime.histograms import Buckets
from sagellm.runtime.messages import TokenEvent


class ProcessBridge:
    """Lives on the app's loop, as its link does; whoever reads the link tells it by `handle`."""

    def __init__(self, link: MessageLink[GraphMessage], streaming: Streaming) -> None:
        self.link = link
        self.report_tokens = max(
            1, window_of(streaming) // 2
        )  # tokens that are read between two words
        self._numbers = itertools.count()
        self._streams: dict[int, ProcessBatches] = {}
        self._questions: dict[int, _PendingQuery] = {}

    def enter(self, entry: GraphRequest) -> "ProcessBatches":
        return ProcessBatches(self, next(self._numbers), entry)

    async def cancel(self, request_id: str) -> bool:
        return (await self._ask(CancelRequest(next(self._numbers), request_id))).is_known

    async def cancel_elsewhere(self, call_id: str) -> bool:
        return (await self._ask(CancelCall(next(self._numbers), call_id))).is_known

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """The metrics of all, and their content type."""
        answer = await self._ask(Scrape(next(self._numbers), accept))
        if not answer.is_known:
            raise ApiError(500, "the metrics could not be read; see the log")
        return answer.content, answer.content_type

    def handle(self, message: StreamEvents | StreamRefused | QueryAnswer) -> None:
        """What came of a stream that has been left means nothing any more."""
        if isinstance(message, QueryAnswer):
            question = self._questions.get(message.number)
            if question is not None:
                question.answer = message
                question.came.set()
            return
        entered = self._streams.get(message.stream)
        if entered is None:
            return
        if isinstance(message, StreamRefused):
            entered.put((), message.error)
        else:
            entered.put(message.events, message.is_end)

    def close(self) -> None:
        """The graph is gone: whoever waits is told."""
        for entered in tuple(self._streams.values()):
            entered.put((), graph_closed())
        for question in self._questions.values():
            question.came.set()

    async def _ask(self, message: CancelRequest | CancelCall | Scrape) -> QueryAnswer:
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

    # ---- what streams use --------------------------------------------------------------------

    def begin(self, entered: "ProcessBatches", entry: GraphRequest) -> None:
        if self.link.is_broken:
            raise graph_closed()
        self.link.put(SubmitRequest(entered.number, entry))
        self._streams[entered.number] = entered

    def leave(self, entered: "ProcessBatches") -> None:
        if self._streams.pop(entered.number, None) is not None and not entered.is_over:
            self.link.put(Abandon(entered.number))


class _PendingQuery:
    def __init__(self) -> None:
        self.came = anyio.Event()
        self.answer: QueryAnswer | None = None


class ProcessBatches:
    """One request that was let in."""

    def __init__(self, bridge: ProcessBridge, number: int, entry: GraphRequest) -> None:
        self.number = number
        self._door = bridge
        self._entry = entry
        self._unread: list[TokenEvent] = []
        self._end: ApiError | bool = False
        self._num_unreported = 0  # tokens that were read, and the graph was not told yet
        self._came = anyio.Event()

    @property
    def is_over(self) -> bool:
        return self._end is not False

    async def __aenter__(self) -> "ProcessBatches":
        self._door.begin(self, self._entry)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._door.leave(self)

    def __aiter__(self) -> "ProcessBatches":
        return self

    async def __anext__(self) -> Sequence[TokenEvent]:
        while not self._unread:
            if isinstance(self._end, ApiError):
                raise self._end
            if self._end:
                raise StopAsyncIteration
            self._came = anyio.Event()
            await self._came.wait()
        taken, self._unread = self._unread, []
        self._tell(num_tokens(taken))
        return taken

    def put(self, events: Sequence[TokenEvent], end: ApiError | bool) -> None:
        """Called by the door."""
        self._unread.extend(events)
        self._end = self._end or end
        self._came.set()

    def _tell(self, num_taken: int) -> None:
        self._num_unreported += num_taken
        if self._num_unreported >= self._door.report_tokens and not self.is_over:
            self._door.link.put(TokensRead(self.number, self._num_unreported))
            self._num_unreported = 0


class RemoteMeters(HttpMeters):
    """Those of one gateway. The exposition is the graph's, who asks all gateways for it."""

    def __init__(self, bridge: ProcessBridge, endpoints: Iterable[str]) -> None:
        super().__init__(endpoints)
        self._door = bridge

    async def exposition(self, accept: str = "") -> tuple[bytes, str]:
        return await self._door.scrape(accept)


def counter_report(meters: HttpMeters, number: int = 0) -> CounterReport:
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
    )


class SummedMeters(HttpMeters):
    """Those of several gateways, in the process of the graph."""

    def __init__(self, endpoints: Iterable[str]) -> None:
        super().__init__(endpoints)
        self._num_dropped_lines = 0

    @property
    def num_dropped_lines(self) -> int:
        return self._num_dropped_lines

    def add(self, counted: CounterReport, *, is_alive: bool) -> None:
        """What one gateway has counted in its life; nothing is under way in one that is over."""
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
