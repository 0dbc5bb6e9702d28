"""An engine behind a server that speaks the OpenAI API: each sequence is one streamed call."""

from collections.abc import Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field

import trio

from sagellm.client.responses import CUT_OFF, TIMED_OUT, UNREACHABLE, ClientError
from sagellm.foreign.calls import AnswerReader, call_of
from sagellm.foreign.foreign_server import ForeignServer
from sagellm.graphs.log import get_logger
from sagellm.runtime.engine.output import Mailbox
from sagellm.runtime.messages import ENGINE_FAILED, EngineReplica, SequenceState
from sagellm.runtime.port import (
    EngineFacts,
    EngineHealth,
    EngineLoad,
    EngineRefusal,
    LossCause,
    Lost,
)

log = get_logger("sagellm.foreign")

_Key = tuple[str, int, int]  # request id, choice, epoch
_NUM_TRIES = 3  # of one call before its first byte
_MOST_FAULTS = 5  # in a row, after which the server counts as down
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.2, 2.0  # between tries
_BUSY = (429, 503)
_LOCKED = (401, 403)


@dataclass(slots=True, eq=False)
class _Call:
    """One sequence at the server."""

    state: SequenceState
    reader: AnswerReader
    scope: trio.CancelScope = field(default_factory=trio.CancelScope)

    @property
    def key(self) -> _Key:
        return self.state.request_id, self.state.choice, self.state.epoch


class ForeignEngine:
    """Implements the engine port over an `ForeignServer`.

    A call that fails before its first byte is tried again. Where the server cannot be reached, or
    an answer breaks off, the sequence is lost, and the graph resumes it elsewhere. A server counts
    as down if it cannot be reached, or fails `_MOST_FAULTS` times in a row, until a probe succeeds.
    Cancelling a sequence closes its call.
    """

    def __init__(
        self,
        server: ForeignServer,
        facts: EngineFacts,
        place: EngineReplica,
        *,
        probe_s: float,
        can_resume_chats: bool,
    ) -> None:
        self.facts = facts
        self.is_up = True
        self._server = server
        self.place = place
        self._probe_s = probe_s
        self._can_resume_chats = can_resume_chats
        self._calls: dict[_Key, _Call] = {}
        self._mailboxes: dict[str, Mailbox] = {}
        self._nursery: trio.Nursery | None = None
        self._started = trio.Event()
        self._is_stopped = False
        self._num_faults = 0
        self._went_down = trio.Event()
        self._has_room = trio.Event()
        self._at_rest = trio.lowlevel.ParkingLot()
        self._on_availability: Callable[[bool], None] = lambda is_up: None

    # ---- the port ----------------------------------------------------------------------------

    async def submit(self, state: SequenceState) -> None:
        await self._started.wait()  # `run` may begin a little later than the operators
        if self._is_stopped:
            raise EngineRefusal("the engine has stopped", "shutting_down")
        if state.messages and state.num_emitted and not self._can_resume_chats:
            raise EngineRefusal("the server cannot go on with a chat", ENGINE_FAILED)
        path, body = call_of(state, self.facts.model, self.facts.max_model_len)
        call = _Call(state, AnswerReader(state))
        if call.key in self._calls:
            raise EngineRefusal(f"choice {state.choice} of {state.request_id} runs here already")
        self._calls[call.key] = call
        if state.num_emitted >= state.sampling.max_tokens:
            self._end(call, "length")
            return
        assert self._nursery is not None
        self._nursery.start_soon(self._serve, call, lambda: self._answer(call, path, body))

    def cancel(self, request_id: str, choice: int, epoch: int) -> None:
        call = self._calls.get((request_id, choice, epoch))
        if call is not None:
            self._end(call, "cancelled")
            call.scope.cancel()

    def events(self, owner: str) -> Mailbox:
        return self._mailboxes.setdefault(owner, Mailbox(self._reader_made_room))

    @property
    def load(self) -> EngineLoad:
        return EngineLoad(num_running=len(self._calls))

    @property
    def health(self) -> EngineHealth:
        return EngineHealth()

    def report_availability(self, report: Callable[[bool], None]) -> None:
        """Call `report` whenever the server goes down or comes up."""
        self._on_availability = report

    @property
    def url(self) -> str:
        return self._server.url

    async def drained(self) -> None:
        """Wait until no call is open."""
        while self._calls:
            await self._at_rest.park()

    def stop(self) -> None:
        """End the engine. Its sequences are lost, and the graph resumes them elsewhere."""
        for call in tuple(self._calls.values()):
            self._lose(call, "none")
        if self._nursery is not None:
            self._nursery.cancel_scope.cancel()

    async def idle(self) -> None:
        """Return at once: the server frees what its sequences hold."""
        await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._started.set()
                await self._watch()
        finally:
            self._is_stopped = True
            self._started.set()
            for mailbox in self._mailboxes.values():
                mailbox.close()
            with trio.CancelScope(shield=True):
                await self._server.aclose()

    # ---- one call ----------------------------------------------------------------------------

    async def _serve(self, call: _Call, answer: Callable[[], Awaitable[None]]) -> None:
        """Compute one sequence, whatever the server does. Ends it by exactly one event."""
        with call.scope:
            for number in range(1, _NUM_TRIES + 1):
                try:
                    await answer()
                    return
                except ClientError as error:
                    if call.reader.has_begun or not self._may_try_again(error, number):
                        self._give_up(call, error)
                        return
                    pause_s = error.retry_after_s or _FIRST_PAUSE_S * 2 ** (number - 1)
                await trio.sleep(min(pause_s, _MAX_PAUSE_S))

    async def _answer(self, call: _Call, path: str, body: dict[str, object]) -> None:
        """Post the events of one call. Raises ClientError if the answer does not come whole."""
        reader, mailbox = call.reader, self.events(call.state.owner)
        reader.started_s = trio.current_time()
        async with aclosing(self._server.stream(path, body)) as stream:
            async for chunks in stream:
                while mailbox.is_full:  # a slow reader slows its own calls down, through TCP
                    await self._has_room.wait()
                now = trio.current_time()
                for chunk in chunks:
                    event = reader.take(chunk, now)
                    if event is not None:
                        mailbox.post(event)
                mailbox.flush()
        self._num_faults = 0
        self._forget(call)
        mailbox.post(reader.last(trio.current_time()))
        mailbox.flush()

    def _may_try_again(self, error: ClientError, number: int) -> bool:
        is_passing = error.status in _BUSY or error.code == CUT_OFF
        return is_passing and number < _NUM_TRIES and self.is_up

    def _give_up(self, call: _Call, error: ClientError) -> None:
        """End a call that failed: refuse its request, or give it back to the graph."""
        log.warning(
            "upstream_failed",
            engine=f"{self.place.engine}[{self.place.number}]",
            url=self._server.url,
            request_id=call.state.request_id,
            status=error.status,
            why=error.message,
        )
        status = error.status
        if status in _BUSY:
            why = f"the server of this model is busy: {error.message}"
            self._end(call, "refused", error=why, code="unavailable", retry_after_s=_wait_s(error))
        elif status in _LOCKED:
            self._end(call, "failed", error="the server of this model refused its key")
        elif status is not None and 400 <= status < 500:
            self._end(call, "refused", error=error.message, code="bad_request")
        else:
            self._count_fault(is_gone=error.code == UNREACHABLE)
            is_lost = call.reader.has_begun or error.code in (UNREACHABLE, CUT_OFF, TIMED_OUT)
            if is_lost:
                self._lose(call, "link")
            else:
                self._end(call, "failed", error=error.message, code=ENGINE_FAILED)

    def _end(self, call: _Call, reason: object, **fields: object) -> None:
        if not self._forget(call):
            return
        event = call.reader.ended(reason, trio.current_time(), **fields)  # type: ignore[arg-type]
        mailbox = self.events(call.state.owner)
        mailbox.post(event)
        mailbox.flush()

    def _lose(self, call: _Call, cause: LossCause) -> None:
        """Give the sequence back to the graph, after all its events."""
        if not self._forget(call):
            return
        state, mailbox = call.state, self.events(call.state.owner)
        mailbox.flush()
        mailbox.post(
            Lost(request_id=state.request_id, choice=state.choice, epoch=state.epoch, cause=cause)
        )
        mailbox.flush()

    def _forget(self, call: _Call) -> bool:
        """Drop a call that ends. Return whether it was still open."""
        was_open = self._calls.pop(call.key, None) is not None
        if not self._calls:
            self._at_rest.unpark_all()
        return was_open

    def _reader_made_room(self) -> None:
        self._has_room.set()
        self._has_room = trio.Event()

    # ---- availability ------------------------------------------------------------------------

    def _count_fault(self, *, is_gone: bool) -> None:
        self._num_faults += 1
        if self.is_up and (is_gone or self._num_faults >= _MOST_FAULTS):
            self._set_up(False)

    def _set_up(self, is_up: bool) -> None:
        self.is_up = is_up
        log.warning(
            "upstream_up" if is_up else "upstream_down",
            engine=f"{self.place.engine}[{self.place.number}]",
            url=self._server.url,
        )
        if is_up:
            self._num_faults = 0
        else:
            self._went_down.set()
        self._on_availability(is_up)

    async def _watch(self) -> None:
        """Probe the server while it is down."""
        while True:
            await self._went_down.wait()
            while not self.is_up:
                await trio.sleep(self._probe_s)
                if await self._server.is_healthy():
                    self._went_down = trio.Event()
                    self._set_up(True)


def _wait_s(error: ClientError) -> float:
    return error.retry_after_s or 1.0
