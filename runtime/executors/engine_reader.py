"""Reads the events of an engine for one replica of an operator."""

from sagellm.runtime.core.events import Ended, EngineFailed, Failed, Returned
from sagellm.runtime.core.faults import OperatorFault
from sagellm.runtime.executors.context import ServiceContext
from sagellm.runtime.feedback import LoadReported
from sagellm.runtime.messages import ENGINE_FAILED, FinishReason, Request, TokenEvent
from sagellm.runtime.operator import Service
from sagellm.runtime.port import EngineEvent, Lost, PrefillDone
from sagellm.runtime.user_code import LEAVING, as_error
from sagellm.runtime.user_function import failing


class EngineReader:
    """Hands events to the operator; what the engine lost, or failed on, goes back to the core."""

    def __init__(self, context: ServiceContext, service: Service) -> None:
        self._context = context
        self._service = service
        self._happen = context.executor.happen
        self._meter = context.meter

    async def run(self) -> None:
        """Until the engine stops."""
        context, clock = self._context, self._context.executor.clock
        async for events in context.engine.events(context.name):
            if isinstance(events[0], Lost):
                self._recall(events)
                continue
            begun_s = clock()
            events = self._without_failed(events)
            try:
                await self._service.on_events(context, events)
            except (Exception, *LEAVING) as error:
                self._fail_events(events, as_error(error))
            self._meter.process_s += clock() - begun_s
            context.report(LoadReported(load=context.engine.load))

    def _without_failed(self, events: tuple[EngineEvent, ...]) -> tuple[EngineEvent, ...]:
        """The events, without those of sequences that the engine failed on: the core decides where
        their requests go.
        """
        context = self._context
        failed = [one for one in events if getattr(one, "code", "") == ENGINE_FAILED]
        passed = events
        for last in failed:
            assert isinstance(last, TokenEvent)
            request = self._recalled(last.key)
            if request is not None:
                passed = tuple(one for one in passed if one is not last)
                self._meter.num_errors += 1
                self._context.release(last.key)
                self._happen(EngineFailed(context.name, context.replica, request, last))
        return passed

    def _fail_events(self, events: tuple[EngineEvent, ...], error: Exception) -> None:
        """End the choices of these events: what the operator did with them is unknown."""
        context = self._context
        self._meter.num_errors += 1
        fault = OperatorFault(context.name, error)
        for event in events:
            assert not isinstance(event, Lost)
            first = event.first if isinstance(event, PrefillDone) else event
            last = failing(first, fault.public, now=context.now())
            self._happen(Ended(context.name, last, error))
            context.engine.cancel(first.request_id, first.choice, first.epoch)
            self._context.release(first.key)

    def _recall(self, lost: tuple[EngineEvent, ...]) -> None:
        """The engine is gone: what it held goes in again."""
        for event in lost:
            assert isinstance(event, Lost)
            request = self._recalled(event.key)
            if request is not None:
                self._context.release(event.key)
                self._happen(Returned(self._context.name, request, event.by_death))

    def _recalled(self, key: tuple[str, int]) -> Request | None:
        """The request of a sequence that the operator has no more, with what was emitted of it."""
        try:
            return self._service.recall(self._context, key)
        except (Exception, *LEAVING) as error:
            self._fail_key(key, as_error(error))
            return None

    def _fail_key(self, key: tuple[str, int], error: Exception) -> None:
        self._meter.num_errors += 1
        self._context.release(key)
        self._happen(Failed(self._context.name, last_event(key, "failed"), error))


def last_event(key: tuple[str, int], reason: FinishReason) -> TokenEvent:
    """The end of a choice of which nothing else is known."""
    return TokenEvent(request_id=key[0], choice=key[1], finish_reason=reason)
