"""A host: one replica of a service operator, its mailbox, its tasks and its context."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Protocol

import msgspec
import trio

from sagellm.runtime.core.answers import must_be_answered, not_answered
from sagellm.runtime.core.books import reason_of
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.events import (
    Ended,
    Event,
    Failed,
    Finished,
    Opened,
    Released,
    Reported,
    Returned,
    Transferred,
)
from sagellm.runtime.core.faults import OperatorFault
from sagellm.runtime.core.meter import Clock
from sagellm.runtime.engine.port import (
    DamagedBlocks,
    Engine,
    EngineEvent,
    EngineLost,
    Lost,
    PrefillDone,
    StaleLease,
)
from sagellm.runtime.executors.faults import log_fault
from sagellm.runtime.executors.mailbox import Mailbox
from sagellm.runtime.feedback import Feedback, LoadReported
from sagellm.runtime.messages import FinishReason, Item, Prefilled, Request, TokenEvent
from sagellm.runtime.operator import Sent, Service, Signal
from sagellm.runtime.user_code import LEAVING, as_error
from sagellm.runtime.user_function import failing


class Executor(Protocol):
    """What a host needs of the executor around it."""

    core: Core
    engines: dict[str, tuple[Engine, ...]]
    clock: Clock

    def now(self) -> float: ...
    def happen(self, event: Event) -> None: ...
    async def emit(
        self,
        node: str,
        replica: int,
        items: tuple[Item, ...],
        outlet: str = "out",
        sent: Callable[[Item], None] | None = None,
    ) -> None: ...


class Host:
    """Implements the Context of one service replica."""

    def __init__(self, executor: Executor, name: str, replica: int, service: Service) -> None:
        self.name = name
        self.replica = replica
        self._executor = executor
        self._service = service
        self._mailbox = Mailbox()
        self._scopes: list[tuple[Item, trio.CancelScope]] = []
        self._owed: set[tuple[str, int]] = set()  # taken, and nothing was sent for it yet
        self._untransferred: set[tuple[str, int]] = set()  # taken, and their blocks do not come
        self._meter = executor.core.meter.services[name, replica]
        self._engine = executor.core.plan.engine_name(name)
        facts = self.engine.facts if self._engine else None
        block_size = facts.block_size if facts else 1
        executor.happen(Opened(name, replica, service.capacity(facts), block_size))

    def start(self, nursery: trio.Nursery) -> None:
        for _ in range(self._service.concurrency):
            nursery.start_soon(self._work)
        if self._engine:
            nursery.start_soon(self._forward_events)

    # ---- the Context -----------------------------------------------------------------------

    @property
    def engine(self) -> Engine:
        if self._engine is None:
            raise LookupError(f"operator {self.name} names no engine")
        return self.engine_named(self._engine, self.replica)

    def engine_of(self, node: str, replica: int) -> Engine:
        name = self._executor.core.plan.engine_name(node)
        if name is None:
            raise LookupError(f"operator {node} names no engine")
        return self.engine_named(name, replica)

    def engine_named(self, name: str, replica: int) -> Engine:
        return self._executor.engines[name][replica]

    def now(self) -> float:
        return self._executor.now()

    async def emit(self, item: Item, outlet: str = "out") -> None:
        self._owed.discard(item.key)
        await self._executor.emit(self.name, self.replica, (item,), outlet)

    async def emit_batch(self, items: Iterable[TokenEvent], sent: Sent) -> None:
        batch = tuple(items)
        if self._owed:
            self._owed.difference_update(item.key for item in batch)
        if batch:
            done = partial(sent, self)
            await self._executor.emit(self.name, self.replica, batch, sent=done)

    async def terminate(self, event: TokenEvent, cause: Exception | None = None) -> None:
        self._owed.discard(event.key)
        self._meter.num_ended += 1
        self._executor.happen(Ended(self.name, event, cause))

    def report(self, feedback: Feedback) -> None:
        named = msgspec.structs.replace(feedback, node=self.name, replica=self.replica)
        self._executor.happen(Reported(named))

    def release(self, key: tuple[str, int]) -> None:
        self._executor.happen(Released(self.name, self.replica, *key))

    def not_transferred(self, item: Item, *, has_failed: bool) -> None:
        self._untransferred.add(item.key)
        if has_failed:
            self._meter.num_errors += 1
            self._note_transfer(item, succeeded=False)

    # ---- what the executor calls -----------------------------------------------------------

    @property
    def num_waiting(self) -> int:
        return len(self._mailbox)

    def put(self, item: Item) -> None:
        """Take an item whose credit is spent; one that its cancel overtook ends here."""
        if isinstance(item, TokenEvent) or self._signal_of(item) is None:
            self._mailbox.put(item)
        else:
            self._end(item)

    def signal(self, signal: Signal) -> None:
        for item in self._mailbox.remove(lambda item: _is_ended_by(item, signal)):
            self._end(item)
        for item, scope in self._scopes:
            if _is_ended_by(item, signal):
                scope.cancel()
        try:
            self._service.on_signal(self, signal)
        except (Exception, *LEAVING) as error:  # the other operators must hear the signal too
            self._log(as_error(error), signal.request_id)
            self._end_held(signal)

    # ---- tasks -----------------------------------------------------------------------------

    async def _work(self) -> None:
        while True:
            await self._serve(await self._mailbox.take())

    async def _serve(self, item: Item) -> None:
        failure: Exception | None = None
        begun_s = self._executor.clock()
        with trio.CancelScope() as scope:
            entry = (item, scope)
            self._scopes.append(entry)
            try:
                await self._take(item)
            except (EngineLost, StaleLease, DamagedBlocks) as error:
                if not isinstance(error, EngineLost):
                    self._note_transfer(item, succeeded=False)
                self._meter.num_errors += _is_transfer(item)
                self._send_back(item, error)
                await trio.lowlevel.checkpoint()
                return
            except (Exception, *LEAVING) as error:
                failure = as_error(error)
            finally:
                self._scopes.remove(entry)
                is_transferred = item.key not in self._untransferred
                self._untransferred.discard(item.key)
                self._meter.process_s += self._executor.clock() - begun_s
        if failure is not None:
            self._meter.num_errors += 1
            self._fail(item, failure)
        elif scope.cancelled_caught:
            self._end(item)
        elif not self._service.holds:
            if is_transferred:
                self._note_transfer(item, succeeded=True)
            self.release(item.key)

    async def _take(self, item: Item) -> None:
        """Raises WrongResult where the operator has let go of an item that it never answered."""
        if not self._service.holds and must_be_answered(item):
            self._owed.add(item.key)
        try:
            await self._service.on_item(self, item)
            if item.key in self._owed:
                raise not_answered(self._service, item)
        finally:
            self._owed.discard(item.key)

    async def _forward_events(self) -> None:
        async for events in self.engine.events(self.name):
            if isinstance(events[0], Lost):
                self._recall(events)
                continue
            begun_s = self._executor.clock()
            try:
                await self._service.on_events(self, events)
            except (Exception, *LEAVING) as error:
                self._fail_events(events, as_error(error))
            self._meter.process_s += self._executor.clock() - begun_s
            self.report(LoadReported(load=self.engine.load))

    def _fail_events(self, events: tuple[EngineEvent, ...], error: Exception) -> None:
        """End the choices of these events: what the operator did with them is unknown."""
        self._meter.num_errors += 1
        fault = OperatorFault(self.name, error)
        for event in events:
            assert not isinstance(event, Lost)
            first = event.first if isinstance(event, PrefillDone) else event
            last = failing(first, fault.public, now=self.now())
            self._executor.happen(Ended(self.name, last, error))
            self.engine.cancel(first.request_id, first.choice, first.epoch)
            self.release(first.key)

    def _recall(self, lost: tuple[EngineEvent, ...]) -> None:
        """The engine is gone: what it held goes in again."""
        for event in lost:
            assert isinstance(event, Lost)
            try:
                request = self._service.recall(self, event.key)
            except (Exception, *LEAVING) as error:
                self._fail_key(event.key, as_error(error))
                continue
            if request is not None:
                self.release(event.key)
                self._executor.happen(Returned(self.name, request, event.by_death))

    def _send_back(self, item: Item, error: Exception) -> None:
        """An engine was lost, or what it held, while this operator had the item."""
        try:
            recalled = self._service.recall(self, item.key)
        except (Exception, *LEAVING) as fault:  # what was emitted is unknown: it cannot go in again
            self._fail(item, as_error(fault))
            return
        request = recalled or _request_of(item)
        if request is None:
            self._fail(item, error)
        else:
            self._give_up(item)
            was_asked = isinstance(error, EngineLost) and error.was_asked
            was_computed = recalled is not None and was_asked
            self._executor.happen(Returned(self.name, request, was_computed))

    def _note_transfer(self, item: Item, *, succeeded: bool) -> None:
        """Tell the core between which replicas KV blocks were transferred, if any were."""
        if isinstance(item, Prefilled) and item.lease is not None and item.landing is not None:
            sender = item.lease.engine, item.lease.replica
            receiver = item.landing.engine, item.landing.replica
            self._executor.happen(Transferred(sender, receiver, succeeded))

    def _end(self, item: Item) -> None:
        """A signal ended an item that the operator holds no more."""
        self._give_up(item)
        self._executor.happen(Finished(item, reason_of(self._signal_of(item))))

    def _end_held(self, signal: Signal) -> None:
        """The operator failed on a signal: end what it keeps of that request."""
        if not self._service.holds or signal.kind == "forget":
            return
        gate = self.name, self.replica
        for holder, choice in self._executor.core.gates.holders(signal.request_id, signal.choice):
            if holder == gate:
                key = signal.request_id, choice
                self.release(key)
                self._executor.happen(Ended(self.name, _last(key, "cancelled")))

    def _fail_key(self, key: tuple[str, int], error: Exception) -> None:
        self._meter.num_errors += 1
        self.release(key)
        self._executor.happen(Failed(self.name, _last(key, "failed"), error))

    def _fail(self, item: Item, error: Exception) -> None:
        self._give_up(item)
        self._executor.happen(Failed(self.name, item, error))

    def _give_up(self, item: Item) -> None:
        self.discard(item)
        self.release(item.key)

    def discard(self, item: Item) -> None:
        try:
            self._service.discard(self, item)
        except (Exception, *LEAVING) as error:
            self._log(as_error(error), item.request_id)

    def _signal_of(self, item: Item) -> Signal | None:
        return self._executor.core.register.tombstone(item.request_id)

    def _log(self, error: Exception, request_id: str) -> None:
        """For a fault in what cleans up: its request ends in any case."""
        self._meter.num_errors += 1
        log_fault(OperatorFault(self.name, error), request_id=request_id)


def _last(key: tuple[str, int], reason: FinishReason) -> TokenEvent:
    return TokenEvent(request_id=key[0], choice=key[1], finish_reason=reason)


def _is_transfer(item: Item) -> bool:
    """Whether its blocks are to move from one pool to another."""
    return isinstance(item, Prefilled) and item.lease is not None and item.landing is not None


def _request_of(item: Item) -> Request | None:
    if isinstance(item, Prefilled):
        return item.request
    return item if isinstance(item, Request) else None


def _is_ended_by(item: Item, signal: Signal) -> bool:
    """Requests end at once; the tokens of a running sequence go on to their last event."""
    return not isinstance(item, TokenEvent) and signal.concerns(item.key)
