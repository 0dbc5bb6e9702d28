"""The tokens of one request on their way to its reader, and the answer that they add up to."""

import weakref
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
from sagellm.session.requests import RequestError, raise_unserved

Output: TypeAlias = TokenEvent | Answer
OUTPUTS = (TokenEvent, Answer)  # a test against a tuple takes half as long as one against a union
ItemCallback: TypeAlias = Callable[[Item | Forked], None]
_LOGPROB_BYTES = 16  # an id and a number
_MOST_EXCUSED = 16  # times the limits, whoever is to blame


class Upstream(Protocol):
    """What a stream asks of the session that it belongs to."""

    async def submit(
        self, requests: Sequence[Request], caller: ItemCallback, timing: "Timing"
    ) -> None: ...
    def dismiss(self, request_id: str, caller: ItemCallback) -> None: ...
    def forget(self, request_id: str, caller: ItemCallback) -> None: ...
    def forget_soon(self, request_id: str, caller: ItemCallback) -> None: ...
    def end(self, request_id: str, code: str) -> None: ...
    def cause_of(self, key: tuple[str, int]) -> Exception | None: ...


class Timing(NamedTuple):
    """When a request arrived, and for how long its answer is wanted.

    `waited_s`: what has passed since it arrived at whoever asks, until it is submitted.
    `timeout_s` counts from its arrival; None: for ever.
    """

    timeout_s: float | None = None
    waited_s: float = 0.0


UNSERVED = ("refused", "failed")  # finish reasons that reading an answer raises for


class UnreadLimits(NamedTuple):
    """What may wait unread of one request. None: as much as comes."""

    tokens: int | None = None
    bytes: int | None = None


@misused(
    __iter__="a stream of a trio session is read with `async for`",
    __enter__="a stream of a trio session is entered with `async with`",
    __await__="a stream is not awaited: read it with `async for`, or await session.generate(...)",
)
class Stream:
    """The tokens of one request as they come: an async iterator, entered or not.

    Leaving the `async with`, `aclose`, or losing the last reference cancels what is unfinished;
    the stream is then at its end. Cancelled before it was let in, a request ends as cancelled.
    Where a choice was refused or failed, reading raises RequestRefused or RequestFailed.

    Where more than `limits` waits unread, the request is cancelled in its engine at once. What
    waits can still be read; each choice that it cut short ends as cancelled, with the code
    "slow_reader". Counted are the tokens of events and the bytes of their text and logprobs, not
    logprobs of the prompt and whole answers, which come in one piece however fast the reader is.
    """

    def __init__(
        self,
        session: Upstream,
        requests: Sequence[Request],
        timing: Timing = Timing(),  # noqa: B008 (an immutable value)
        limits: UnreadLimits = UnreadLimits(),  # noqa: B008 (an immutable value)
    ) -> None:
        self._session = session
        self._requests = requests
        self._timing = timing
        self._unread = _Unread(limits)
        self._arrived = trio.lowlevel.ParkingLot()
        self._num_open = len(requests)
        self._is_started = False
        self._is_overrun = False
        self._wants_ends = False  # its reader waits for more than the next token
        self._causes: dict[int, Exception | None] = {}  # of choices that failed
        self._caller = _weakly(self)
        self.on_arrival: Callable[[], None] | None = None  # called for whatever comes
        # Asked when more waits than may: whether that may not be the reader's fault.
        self.is_excused: Callable[[], bool] = lambda: False

    @property
    def request_id(self) -> str:
        return self._requests[0].request_id

    async def __aenter__(self) -> "Stream":
        await self._start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    def __aiter__(self) -> "Stream":
        return self

    async def __anext__(self) -> Output:
        """The next event or answer. Cancelled here, the request goes on until closed.

        Raises RequestRefused or RequestFailed in place of the last event of a choice.
        """
        await self._wait()
        if not self._unread:
            raise StopAsyncIteration
        output = self._unread.pop()
        raise_unserved(output, self.cause_of(output.choice))
        return output

    async def take(self) -> tuple[Output, ...]:
        """All that waits, at least one; none where the stream is at its end.

        What one engine step yields comes together. Cancelled, it takes nothing. Refusals and
        failures are events here: nothing is raised for them.
        """
        await self._wait()
        return self._unread.pop_all()

    async def take_ended(self) -> tuple[Output, ...]:
        """As `take`, once every choice has ended, or one has not been served: who wants whole
        answers is not woken for each token.
        """
        self._wants_ends = True
        try:
            await self._wait()
        finally:
            self._wants_ends = False
        return self._unread.pop_all()

    def cause_of(self, choice: int) -> Exception | None:
        """What was raised in the graph for a choice that failed, where that is known here."""
        return self._causes.get(choice)

    def take_nowait(self) -> tuple[Output, ...]:
        """All that waits, which may be nothing."""
        return self._unread.pop_all()

    @property
    def is_over(self) -> bool:
        """Whether all has come; it may still wait to be read."""
        return self._num_open == 0

    async def aclose(self) -> None:
        """Cancel what is unfinished; the blocks are free within one engine step."""
        self._is_started = True
        self._session.forget(self.request_id, self._caller)
        self._unread.pop_all()
        self._num_open = 0
        self._arrived.unpark_all()

    def __del__(self) -> None:
        if self._is_started and self._num_open:
            self._session.forget_soon(self.request_id, self._caller)

    def put(self, item: Item | Forked) -> None:
        """Called by the session for each item of this request."""
        if isinstance(item, OUTPUTS):
            self._unread.put(item)
            if item.finish_reason is not None:
                self._num_open -= 1
                if item.finish_reason == "failed":
                    self._causes[item.choice] = self._session.cause_of(item.key)
        elif isinstance(item, Forked):
            self._num_open += item.num_choices - 1
        if self._num_open == 0:
            self._session.dismiss(self.request_id, self._caller)
        elif self._unread.is_limited and not self._is_overrun and self._is_too_much:
            self._is_overrun = True
            self._session.end(self.request_id, "slow_reader")
        if self._is_due and self._arrived:
            self._arrived.unpark_all()
        if self.on_arrival is not None:
            self.on_arrival()

    @property
    def _is_too_much(self) -> bool:
        unread = self._unread
        return unread.is_beyond(1) and (unread.is_beyond(_MOST_EXCUSED) or not self.is_excused())

    async def _wait(self) -> None:
        """Until something waits, or nothing can come any more."""
        if not self._is_started:
            await self._start()
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._is_due:
            await self._arrived.park()

    @property
    def _is_due(self) -> bool:
        """Whether there is what the reader waits for."""
        if self._num_open == 0:
            return True
        return self._unread.has_unserved if self._wants_ends else bool(self._unread)

    async def _start(self) -> None:
        if not self._is_started:
            self._is_started = True
            try:
                await self._session.submit(self._requests, self._caller, self._timing)
            except RequestError:
                self._num_open = 0
                raise


class _Unread:
    """What a reader has not taken yet, and how much of it counts."""

    def __init__(self, limits: UnreadLimits) -> None:
        self._items: deque[Output] = deque()
        self._limits = limits
        self.is_limited = limits != UnreadLimits()
        self._num_tokens = 0
        self._num_bytes = 0
        self.has_unserved = False  # the end of a choice that was refused, or failed

    def __bool__(self) -> bool:
        return bool(self._items)

    def is_beyond(self, times: int) -> bool:
        """Whether more waits than so many times the limits."""
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


def _weakly(stream: Stream) -> ItemCallback:
    """What the session calls; it does not keep alive a stream that its reader has dropped."""
    reference = weakref.ref(stream)

    def put(item: Item | Forked) -> None:
        alive = reference()
        if alive is not None:
            alive.put(item)

    return put


def gather(parts: Sequence[Output]) -> Answer:
    """The answer that one choice's events add up to."""
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
    )


def _stamps(first: TokenEvent, last: TokenEvent) -> Stamps:
    """How the request began, as its first event says (the last may come from outside its engine),
    and when it ended.
    """
    began = msgspec.structs.asdict(first.stamps)
    known = {name: at for name, at in began.items() if at is not None and name != "finished_s"}
    return msgspec.structs.replace(last.stamps, **known)
