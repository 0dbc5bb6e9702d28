"""Reads the events of an engine for one replica of an operator, and follows its availability."""

from collections.abc import Callable
from typing import TypeAlias

from msgspec.structs import replace

from sagellm.runtime.core.effects import OperatorFault
from sagellm.runtime.core.events import Ended, EngineFailed, Failed, Preempted, Returned
from sagellm.runtime.executors.context import ServiceContext
from sagellm.runtime.feedback import KINDS, LoadReported
from sagellm.runtime.handover import merge_stamps
from sagellm.runtime.messages import ENGINE_FAILED, ChoiceKey, FinishReason, Request, TokenEvent
from sagellm.runtime.operator import Service
from sagellm.runtime.port import Engine, EngineEvent, Lost, PrefillDone, ReportsAvailability
from sagellm.runtime.user_code import LEAVING, as_error
from sagellm.runtime.user_function import failure_event

_End: TypeAlias = TokenEvent | PrefillDone


def follow_availability(engine: Engine, mark: Callable[..., None]) -> None:
    """Call `mark(is_up=...)` whenever an engine goes down or comes up by itself."""
    if isinstance(engine, ReportsAvailability):
        engine.report_availability(lambda is_up: mark(is_up=is_up))


class EngineReader:
    """Gives the events of an engine to the operator.

    Requests that the engine lost, or failed on, go back to the core, which may retry them. So do
    preempted requests.
    """

    def __init__(self, context: ServiceContext, service: Service) -> None:
        self._context = context
        self._service = service
        self._dispatch = context.executor.dispatch
        self._meter = context.meter
        executor, kind = context.executor, KINDS[LoadReported]
        # A decision log needs all reports: a replay with other options may have other subscribers.
        self._reports_load = executor.is_recorded or bool(
            executor.core.plan.subscribers(context.name, kind)
        )

    async def run(self) -> None:
        """Read events until the engine stops."""
        context, clock = self._context, self._context.executor.clock
        async for events in context.engine.events(context.name):
            if isinstance(events[0], Lost):  # then all events of the batch are losses
                self._recall(events)
                continue
            begun_s = clock()
            ends = self._ends_of_preempted(events) if context.preempted else {}
            if ends:  # first the tokens of the same step, so that the requests resume after them
                others = (one for one in events if one not in ends.values())
                events = (*others, *(more for end in ends.values() for more in _tokens_of(end)))
            failed = [one for one in events if getattr(one, "code", "") == ENGINE_FAILED]
            if failed:  # first the tokens of the same step, so that a retry resumes after them
                await self._hand_on(tuple(one for one in events if one not in failed))
                events = tuple(one for one in failed if not self._is_failed_over(one))
            await self._hand_on(events)
            for key, end in ends.items():
                await self._resume_elsewhere(key, end)
            self._meter.process_s += clock() - begun_s
            if self._reports_load:
                context.report(LoadReported(load=context.engine.load))

    async def _hand_on(self, events: tuple[EngineEvent, ...]) -> None:
        if not events:
            return
        try:
            await self._service.on_events(self._context, events)
        except (Exception, *LEAVING) as error:
            self._fail_events(events, as_error(error))

    def _is_failed_over(self, last: EngineEvent) -> bool:
        """Give a request on which the engine failed to the core, which retries or ends it.

        Returns False if the operator does not hold the request.
        """
        context = self._context
        assert isinstance(last, TokenEvent)
        request = self._recalled(last.key)
        if request is None:
            return False
        self._meter.num_errors += 1
        context.release(last.key)
        ended = merge_stamps(request, last)
        self._dispatch(EngineFailed(context.name, context.replica, request, ended))
        return True

    def _fail_events(self, events: tuple[EngineEvent, ...], error: Exception) -> None:
        """End the choices of events on which the operator raised.

        The operator may have handled some of the events, so none of the choices can continue.
        """
        context = self._context
        self._meter.num_errors += 1
        fault = OperatorFault(context.name, error)
        for event in events:
            assert not isinstance(event, Lost)
            first = event.first if isinstance(event, PrefillDone) else event
            last = failure_event(first, fault.public, now=context.now())
            self._dispatch(Ended(context.name, last, error))
            context.engine.cancel(first.request_id, first.choice, first.epoch)
            self._context.release(first.key)

    def _recall(self, lost: tuple[EngineEvent, ...]) -> None:
        """Give the requests of lost sequences back to the core."""
        for event in lost:
            assert isinstance(event, Lost)
            request = self._taken_back(event.key)
            if request is not None:
                self._dispatch(Returned(self._context.name, request, event.cause))

    def _taken_back(self, key: ChoiceKey) -> Request | None:
        """Take a request from the operator, and return its credit. None if it is not held."""
        request = self._recalled(key)
        if request is not None:
            self._context.release(key)
        return request

    def _ends_of_preempted(self, events: tuple[EngineEvent, ...]) -> dict[ChoiceKey, _End]:
        """The events with which the engine stops computing preempted requests.

        A prompt may be done before its cancel reaches the engine: then its blocks are held.
        """
        ends: dict[ChoiceKey, _End] = {}
        for event in events:
            assert not isinstance(event, Lost)
            first = event.first if isinstance(event, PrefillDone) else event
            is_stopped = first is not event and not first.is_last
            if first.key in self._context.preempted and (
                is_stopped or first.finish_reason == "cancelled"
            ):
                ends[first.key] = event
        return ends

    async def _resume_elsewhere(self, key: ChoiceKey, end: _End) -> None:
        """Give a preempted request back to the core. A signal that came after `preempt` ends the
        request instead.
        """
        context = self._context
        if key not in context.preempted:
            await self._hand_on((_without_tokens(end),))
            return
        if isinstance(end, PrefillDone):
            context.engine.cancel(*key, end.first.epoch)
        request = self._taken_back(key)
        if request is not None:
            self._dispatch(Preempted(context.name, request))

    def _recalled(self, key: tuple[str, int]) -> Request | None:
        """Take the request of a sequence from the operator, with all its emitted tokens.

        Returns None if the operator does not hold it, or fails; then the choice has ended.
        """
        try:
            return self._service.recall(self._context, key)
        except (Exception, *LEAVING) as error:
            self._fail_key(key, as_error(error))
            return None

    def _fail_key(self, key: tuple[str, int], error: Exception) -> None:
        self._meter.num_errors += 1
        self._context.release(key)
        self._dispatch(Failed(self._context.name, last_event(key, "failed"), error))


def _tokens_of(end: _End) -> tuple[EngineEvent, ...]:
    """The tokens that came with the end of a preempted request, as an event that does not end it.
    The first token of a prompt whose blocks are held is computed again.
    """
    if isinstance(end, PrefillDone) or not end.num_tokens:
        return ()
    return (replace(end, finish_reason=None),)


def _without_tokens(end: _End) -> _End:
    """The end of a request whose tokens were handed on before."""
    if isinstance(end, PrefillDone):
        return end
    position = end.position + end.num_tokens
    return replace(
        end, position=position, token_ids=(), num_tokens_without_ids=0, text="", logprobs=()
    )


def last_event(key: tuple[str, int], reason: FinishReason) -> TokenEvent:
    """A last event for a choice of which only the key is known."""
    return TokenEvent(request_id=key[0], choice=key[1], finish_reason=reason)
