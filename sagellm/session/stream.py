"""The stream of one request: its unread items, its reader, and the joined answer."""

from collections import deque
from collections.abc import Callable, Sequence
from itertools import chain
from typing import NamedTuple, Protocol, TypeAlias

import msgspec
import trio

from sagellm.errors import misused
from sagellm.runtime.messages import (
    Answer,
    Forked,
    Item,
    Request,
    Stamps,
    TokenEvent,
)
from sagellm.session.requests import RequestError, Timing, raise_unserved

Output: TypeAlias = TokenEvent | Answer
OUTPUTS = (TokenEvent, Answer)  # `isinstance` with a tuple is twice as fast as with a union
_LOGPROB_BYTES = 16  # an id and a number
# An excused reader may leave 16 times its limits unread: the memory must have a bound.
_MOST_EXCUSED = 16


class Upstream(Protocol):
    """The methods of a session that a stream calls."""

    async def submit(self, stream: "Stream") -> None:
        """Register the stream and submit its requests. Raises RequestError."""

    def forget(self, stream: "Stream") -> None:
        """Cancel the unfinished request, and deliver no more items to the stream."""


UNSERVED = ("refused", "failed")  # finish reasons for which `__anext__` raises


class UnreadLimits(NamedTuple):
    """Bounds on the unread items of one request, in tokens and in bytes. None: no bound."""

    tokens: int | None = None
    bytes: int | None = None


@misused(
    __iter__="a stream of a trio session is read with `async for`",
    __enter__="a stream of a trio session is entered with `async with`",
    __await__="a stream is not awaited: read it with `async for`, or await session.generate(...)",
)
class Stream:
    """An async iterator over the events of one request. `async with` is optional.

    Leaving the `async with`, `aclose`, or dropping the last reference cancels the unfinished
    request and ends the stream. A request that is cancelled before it enters the graph ends as
    cancelled. Iterating raises RequestRefused or RequestFailed for a choice that was refused or
    failed.

    If the unread events exceed `limits`, the request is cancelled in its engine at once. The
    unread events can still be read. Each unfinished choice ends as cancelled, with the code
    "slow_reader". The limits count the tokens of events, and the bytes of their text and logprobs.
    Prompt logprobs and whole answers are not counted: each comes in one piece.
    """

    def __init__(
        self,
        session: Upstream,
        requests: Sequence[Request],
        timing: Timing = Timing(),  # noqa: B008 (an immutable value)
        limits: UnreadLimits = UnreadLimits(),  # noqa: B008 (an immutable value)
    ) -> None:
        self.requests = requests
        self.timing = timing
        self._session = session
        self._unread = _Unread(limits)
        self._arrived = trio.lowlevel.ParkingLot()
        self._num_open = len(requests)
        self._is_started = False
        self._is_overrun = False
        self._wants_ends = False  # `take_ended` waits: wake it at the end of a choice only
        # Choice -> the exception that made the choice fail.
        self._causes: dict[int, Exception | None] = {}
        self.on_arrival: Callable[[], None] | None = None  # called after each item
        # Called if the limits are exceeded. True: the transport to the reader may be slow, so the
        # request is not cancelled yet.
        self.is_excused: Callable[[], bool] = lambda: False

    @property
    def request_id(self) -> str:
        return self.requests[0].request_id

    async def __aenter__(self) -> "Stream":
        await self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Output:
        """Return the next event or answer.

        Raises RequestRefused or RequestFailed instead of the last event of a choice. Cancelling
        this call loses no event and does not end the request.
        """
        await self._wait()
        if not self._unread:
            raise StopAsyncIteration
        output = self._unread.pop()
        raise_unserved(output, self.cause_of(output.choice))
        return output

    async def take(self) -> tuple[Output, ...]:
        """Wait for an item, and return all unread items; an empty tuple at the stream's end.

        The items of one engine step come together. Cancelling this call loses no item. Refusals
        and failures are returned as events, not raised.
        """
        await self._wait()
        return self._unread.pop_all()

    async def take_ended(self) -> tuple[Output, ...]:
        """As `take`, but wait until all choices have ended, or one was refused or failed.

        For readers of whole answers, which need no wake-up for each token.
        """
        self._wants_ends = True
        try:
            await self._wait()
        finally:
            self._wants_ends = False
        return self._unread.pop_all()

    def cause_of(self, choice: int) -> Exception | None:
        """The exception that made a choice fail in the graph; None if unknown."""
        return self._causes.get(choice)

    def take_nowait(self) -> tuple[Output, ...]:
        """Return all unread items without waiting; an empty tuple if there are none."""
        return self._unread.pop_all()

    @property
    def is_over(self) -> bool:
        """Whether all choices have ended. Unread items may be left."""
        return self._num_open == 0

    async def aclose(self) -> None:
        """Cancel the unfinished request. Its KV blocks are free within one engine step."""
        self._is_started = True
        self._session.forget(self)
        self._unread.pop_all()
        self._num_open = 0
        self._arrived.unpark_all()

    def put(self, item: Item | Forked, cause: Exception | None) -> bool:
        """Add an item to the unread items. The session calls this.

        `cause` is the exception that made the item's choice fail. Return True, once, if the unread
        items exceed the limits: the session must then cancel the request.
        """
        if isinstance(item, OUTPUTS):
            self._unread.put(item)
            if item.finish_reason is not None:
                self._num_open -= 1
                if item.finish_reason == "failed":
                    self._causes[item.choice] = cause
        elif isinstance(item, Forked):
            self._num_open += item.num_choices - 1
        is_overrun = self._mark_overrun()
        if self._is_due and self._arrived:
            self._arrived.unpark_all()
        if self.on_arrival is not None:
            self.on_arrival()
        return is_overrun

    def _mark_overrun(self) -> bool:
        """Record that the unread items exceed the limits. Return True the first time only.

        Return False if all choices have ended: nothing is left to cancel.
        """
        if self._num_open == 0 or not self._unread.is_limited or self._is_overrun:
            return False
        self._is_overrun = self._is_too_much
        return self._is_overrun

    @property
    def _is_too_much(self) -> bool:
        """Whether the unread items exceed the limits, and the reader is not excused."""
        unread = self._unread
        return unread.is_beyond(1) and (unread.is_beyond(_MOST_EXCUSED) or not self.is_excused())

    async def _wait(self) -> None:
        """Wait for an item, or for the end of the stream."""
        if not self._is_started:
            await self._start()
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._is_due:
            await self._arrived.park()

    @property
    def _is_due(self) -> bool:
        """Whether a waiting reader can go on: with an item, or at the end of the stream."""
        if self._num_open == 0:
            return True
        return self._unread.has_unserved if self._wants_ends else bool(self._unread)

    async def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            try:
                await self._session.submit(self)
            except RequestError:
                self._num_open = 0
                raise


class _Unread:
    """The queue of unread items, and their size as far as the limits count it."""

    def __init__(self, limits: UnreadLimits) -> None:
        self._items: deque[Output] = deque()
        self._limits = limits
        self.is_limited = limits != UnreadLimits()
        self._num_tokens = 0
        self._num_bytes = 0
        self.has_unserved = False  # the end of a refused or failed choice is in the queue

    def __bool__(self) -> bool:
        return bool(self._items)

    def is_beyond(self, times: int) -> bool:
        """Whether the unread items exceed `times` the limits."""
        tokens, size = self._limits
        return (tokens is not None and self._num_tokens > times * tokens) or (
            size is not None and self._num_bytes > times * size
        )

    def put(self, item: Output) -> None:
        self._items.append(item)
        if item.finish_reason in UNSERVED:
            self.has_unserved = True
        if self.is_limited:
            self._count(item, 1)

    def pop(self) -> Output:
        item = self._items.popleft()
        if self.is_limited:
            self._count(item, -1)
        return item

    def pop_all(self) -> tuple[Output, ...]:
        items = tuple(self._items)
        self._items.clear()
        self._num_tokens = self._num_bytes = 0
        self.has_unserved = False
        return items

    def _count(self, item: Output, sign: int) -> None:
        if isinstance(item, TokenEvent):
            self._num_tokens += sign * item.num_tokens
            self._num_bytes += sign * _num_bytes(item)


def _num_bytes(event: TokenEvent) -> int:
    num_logprobs = sum(1 + len(logprob.top) for logprob in event.logprobs)
    return len(event.text.encode(errors="replace")) + _LOGPROB_BYTES * num_logprobs


def gather(parts: Sequence[Output]) -> Answer:
    """Return the whole answer of one choice, joined from its items."""
    last = parts[-1]
    if isinstance(last, Answer):
        return last
    events = [part for part in parts if isinstance(part, TokenEvent)]
    return Answer(
        request_id=last.request_id,
        choice=last.choice,
        text="".join([event.text for event in events]),
        token_ids=tuple(chain.from_iterable([event.token_ids for event in events])),
        num_tokens_without_ids=sum([event.num_tokens_without_ids for event in events]),
        logprobs=tuple(chain.from_iterable([event.logprobs for event in events])),
        prompt_logprobs=tuple(chain.from_iterable([event.prompt_logprobs for event in events])),
        finish_reason=last.finish_reason or "failed",
        stop_reason=last.stop_reason,
        error=last.error,
        code=last.code,
        retry_after_s=last.retry_after_s,
        num_prompt_tokens=max([event.num_prompt_tokens for event in events]),
        num_cached_tokens=max([event.num_cached_tokens for event in events]),
        num_preemptions=max([event.num_preemptions for event in events]),
        stamps=_stamps(events[0], last),
        vector=last.vector,
    )


def _stamps(first: TokenEvent, last: TokenEvent) -> Stamps:
    """Return the stamps of the first event, with `finished_s` of the last event."""
    # The last event may come from outside the engine, without stamps of the engine.
    began = msgspec.structs.asdict(first.stamps)
    known = {name: at for name, at in began.items() if at is not None and name != "finished_s"}
    return msgspec.structs.replace(last.stamps, **known)
