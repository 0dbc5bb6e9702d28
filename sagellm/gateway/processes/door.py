"""The door of a gateway in a process of its own: what it says over its link, and what it hears."""

import itertools
from collections.abc import Sequence

import anyio

from sagellm.gateway.door import Entry, closed
from sagellm.gateway.errors import ApiError
from sagellm.gateway.portal import num_tokens, window_of
from sagellm.gateway.processes.link import Link
from sagellm.gateway.processes.messages import (
    Answered,
    Cancel,
    CancelCall,
    Enter,
    Events,
    FromGraph,
    Leave,
    Refused,
    Scrape,
    Taken,
)
from sagellm.gateway.settings import Streaming
from sagellm.runtime.messages import TokenEvent


class RemoteDoor:
    """Lives on the app's loop, as its link does; whoever reads the link tells it by `hear`."""

    def __init__(self, link: Link[FromGraph], streaming: Streaming) -> None:
        self.link = link
        self.told_at = max(1, window_of(streaming) // 2)  # tokens that are read between two words
        self._numbers = itertools.count()
        self._streams: dict[int, Entered] = {}
        self._questions: dict[int, _Question] = {}

    def enter(self, entry: Entry) -> "Entered":
        return Entered(self, next(self._numbers), entry)

    async def cancel(self, request_id: str) -> bool:
        return (await self._ask(Cancel(next(self._numbers), request_id))).is_known

    async def cancel_elsewhere(self, call_id: str) -> bool:
        return (await self._ask(CancelCall(next(self._numbers), call_id))).is_known

    async def scrape(self, accept: str) -> tuple[bytes, str]:
        """The metrics of all, and their content type."""
        answer = await self._ask(Scrape(next(self._numbers), accept))
        if not answer.is_known:
            raise ApiError(500, "the metrics could not be read; see the log")
        return answer.content, answer.content_type

    def hear(self, message: Events | Refused | Answered) -> None:
        """What came of a stream that has been left means nothing any more."""
        if isinstance(message, Answered):
            question = self._questions.get(message.number)
            if question is not None:
                question.answer = message
                question.came.set()
            return
        entered = self._streams.get(message.stream)
        if entered is None:
            return
        if isinstance(message, Refused):
            entered.put((), message.error)
        else:
            entered.put(message.events, message.is_end)

    def close(self) -> None:
        """The graph is gone: whoever waits is told."""
        for entered in tuple(self._streams.values()):
            entered.put((), closed())
        for question in self._questions.values():
            question.came.set()

    async def _ask(self, message: Cancel | CancelCall | Scrape) -> Answered:
        question = self._questions[message.number] = _Question()
        try:
            if not self.link.is_broken:
                self.link.put(message)
                await question.came.wait()
        finally:
            del self._questions[message.number]
        if question.answer is None:
            raise closed()
        return question.answer

    # ---- what streams use --------------------------------------------------------------------

    def begin(self, entered: "Entered", entry: Entry) -> None:
        if self.link.is_broken:
            raise closed()
        self.link.put(Enter(entered.number, entry))
        self._streams[entered.number] = entered

    def leave(self, entered: "Entered") -> None:
        if self._streams.pop(entered.number, None) is not None and not entered.is_over:
            self.link.put(Leave(entered.number))


class _Question:
    def __init__(self) -> None:
        self.came = anyio.Event()
        self.answer: Answered | None = None


class Entered:
    """One request that was let in."""

    def __init__(self, door: RemoteDoor, number: int, entry: Entry) -> None:
        self.number = number
        self._door = door
        self._entry = entry
        self._unread: list[TokenEvent] = []
        self._end: ApiError | bool = False
        self._num_untold = 0  # tokens that were read, and the graph was not told yet
        self._came = anyio.Event()

    @property
    def is_over(self) -> bool:
        return self._end is not False

    async def __aenter__(self) -> "Entered":
        self._door.begin(self, self._entry)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._door.leave(self)

    def __aiter__(self) -> "Entered":
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
        self._num_untold += num_taken
        if self._num_untold >= self._door.told_at and not self.is_over:
            self._door.link.put(Taken(self.number, self._num_untold))
            self._num_untold = 0
