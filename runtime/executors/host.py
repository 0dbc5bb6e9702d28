"""The host of one replica of a service operator: its queue of items and its tasks."""

from collections import deque
from collections.abc import Awaitable, Callable
from typing import Any, Protocol

from sagellm.graphs.log import get_logger
from sagellm.runtime.core.effects import Assigned, Ejected, FailedOn, OperatorFault, ScaleTo
from sagellm.runtime.core.events import (
    CacheReported,
    Ended,
    Event,
    Failed,
    Finished,
    Opened,
    Returned,
)
from sagellm.runtime.core.outputs import must_be_answered, not_answered
from sagellm.runtime.core.request_lifecycle import reason_of
from sagellm.runtime.executors.context import Executor, ServiceContext
from sagellm.runtime.executors.engine_reader import EngineReader, last_event
from sagellm.runtime.executors.waits import Scope, Waits
from sagellm.runtime.messages import Item, Prefilled, Request, TokenEvent
from sagellm.runtime.operator import Service, Signal
from sagellm.runtime.port import DamagedBlocks, Engine, EngineLost, LossCause, StaleLease
from sagellm.runtime.prefixes import ReportsCache
from sagellm.runtime.user_code import LEAVING, as_error, name_of, place_of, traceback_of

log = get_logger("sagellm.executor")


def log_fault(fault: OperatorFault, *, request_id: str) -> None:
    """Log a fault of an operator, with the place in the code and the request.

    An error from the user's own code is logged with its text and traceback, because the user has to
    fix it. Any other error is logged without its text, which may quote a request.
    """
    error = fault.error
    fields = {"node": fault.node, "request_id": request_id, "error": name_of(error)}
    own = traceback_of(error)
    if own is None:
        log.error("operator_failed", **fields, at=_places(error))
    else:
        log.error("operator_failed", **fields, at=place_of(error), exception=own)


def log_failure(effect: FailedOn) -> None:
    """Log that an engine failed on a request."""
    where = {"engine": effect.engine, "replica": effect.replica}
    log.warning("engine_failed", **where, request_id=effect.request_id, error=effect.error)


def log_ejection(effect: Ejected) -> None:
    """Log that a replica gets no new requests, or gets them again."""
    where = {"engine": effect.engine, "replica": effect.replica}
    if effect.for_s:
        log.warning("replica_ejected", **where, for_s=effect.for_s)
    else:
        log.info("replica_readmitted", **where)


def log_scaling(effect: ScaleTo) -> None:
    """Log that an operator changes the number of replicas of an engine."""
    counts = {"replicas": effect.num_before, "wanted": effect.num_replicas}
    log.info("autoscaling", engine=effect.engine, **counts, reason=effect.reason)


def log_assignment(effect: Assigned) -> None:
    """Log that a replica takes requests of an operator, or no more."""
    log.info("role", node=effect.node, replica=effect.replica, is_on=effect.is_on)


def ask_cache(engine: Engine, dispatch: Callable[[Event], None]) -> None:
    """Ask an engine to report its prefix blocks; does nothing if it cannot."""
    if isinstance(engine, ReportsCache):
        engine.report_cache(lambda changed: dispatch(CacheReported(changed)))


def _places(error: Exception) -> list[str]:
    """file:line of each frame of an error's traceback, outermost first."""
    places, trace = [], error.__traceback__
    while trace is not None:
        places.append(f"{trace.tb_frame.f_code.co_filename}:{trace.tb_lineno}")
        trace = trace.tb_next
    return places


class Spawner(Protocol):
    """Starts tasks, as a nursery of trio does."""

    def start_soon(self, function: Callable[[], Awaitable[Any]], /) -> None: ...


class ItemQueue:
    """A FIFO queue of the items that wait for one service operator.

    Its length is bounded by the credit that the operator grants. Unlike trio's channels, it can
    remove the items of an ended request from its middle.
    """

    def __init__(self, waits: Waits) -> None:
        self._items: deque[Item] = deque()
        self._waits = waits
        self._waiting = waits.lot()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._waiting.unpark()

    async def take(self) -> Item:
        """Wait for an item, and take the oldest. If cancelled, takes nothing."""
        await self._waits.checkpoint_if_cancelled()
        while not self._items:
            await self._waiting.park()
        return self._items.popleft()

    def remove(self, unwanted: Callable[[Item], bool]) -> tuple[Item, ...]:
        """Remove and return the items for which `unwanted` is true."""
        removed = tuple(item for item in self._items if unwanted(item))
        if removed:
            self._items = deque(item for item in self._items if not unwanted(item))
        return removed


class ServiceHost:
    """Gives items to one replica of a service operator, in `concurrency` tasks.

    If a signal ends the request of an item, or the operator raises on it, the host ends the item.
    """

    def __init__(self, executor: Executor, name: str, replica: int, service: Service) -> None:
        self._context = context = ServiceContext(executor, name, replica)
        self._executor = executor
        self._service = service
        self._waits = executor.waits
        self._mailbox = ItemQueue(executor.waits)
        self._scopes: list[tuple[Item, Scope]] = []
        self._meter = context.meter
        self._register = executor.core.register
        facts = context.engine.facts if context.engine_name else None
        block_size = facts.block_size if facts else 1
        executor.dispatch(Opened(name, replica, service.capacity(facts), block_size))

    def start(self, nursery: Spawner) -> None:
        """Start the tasks of the operator, and the reader of its engine."""
        for _ in range(self._service.concurrency):
            nursery.start_soon(self._work)
        if self._context.engine_name:
            nursery.start_soon(EngineReader(self._context, self._service).run)

    @property
    def num_waiting(self) -> int:
        return len(self._mailbox)

    def put(self, item: Item) -> None:
        """Queue an item; end it instead if the signal that cancels its request came before."""
        if isinstance(item, TokenEvent) or self._register.tombstone(item.request_id) is None:
            self._mailbox.put(item)
        else:
            self._end(item)

    def signal(self, signal: Signal) -> None:
        """End the queued and running items that a signal concerns, and give it to the operator."""
        for item in self._mailbox.remove(lambda item: _is_ended_by(item, signal)):
            self._end(item)
        for item, scope in self._scopes:
            if _is_ended_by(item, signal):
                scope.cancel()
        try:
            self._service.on_signal(self._context, signal)
        except (Exception, *LEAVING) as error:  # a fault must not keep the signal from the others
            self._log(as_error(error), signal.request_id)
            self._end_held(signal)

    async def _work(self) -> None:
        while True:
            await self._serve(await self._mailbox.take())

    async def _serve(self, item: Item) -> None:
        failure: Exception | None = None
        begun_s = self._executor.clock()
        with self._waits.scope() as scope:
            entry = (item, scope)
            self._scopes.append(entry)
            try:
                await self._take(item)
            except (EngineLost, StaleLease, DamagedBlocks) as error:
                if not isinstance(error, EngineLost):
                    self._context.note_transfer(item, succeeded=False)
                self._meter.num_errors += _is_transfer(item)
                self._return_request(item, error)
                # `take` does not yield while items wait: without a checkpoint, a queue of items
                # that all lost their engine would block the thread.
                await self._waits.checkpoint()
                return
            except (Exception, *LEAVING) as error:
                failure = as_error(error)
            finally:
                self._scopes.remove(entry)
                is_transferred = item.key not in self._context.untransferred
                self._context.untransferred.discard(item.key)
                self._meter.process_s += self._executor.clock() - begun_s
        if failure is not None:
            self._meter.num_errors += 1
            self._fail(item, failure)
        elif scope.cancelled_caught:
            self._end(item)
        elif not self._service.holds:
            if is_transferred:
                self._context.note_transfer(item, succeeded=True)
            self._context.release(item.key)

    async def _take(self, item: Item) -> None:
        """Run `on_item`. Raises WrongResult if it returned without an answer to the item."""
        if not self._service.holds and must_be_answered(item):
            self._context.unanswered.add(item.key)
        try:
            await self._service.on_item(self._context, item)
            if item.key in self._context.unanswered:
                raise not_answered(self._service, item)
        finally:
            self._context.unanswered.discard(item.key)

    def _return_request(self, item: Item, error: Exception) -> None:
        """Give the request of an item back to the core, after its engine or blocks were lost."""
        try:
            recalled = self._service.recall(self._context, item.key)
        except (Exception, *LEAVING) as fault:
            # The emitted tokens are unknown, so the request cannot resume.
            self._fail(item, as_error(fault))
            return
        request = recalled or _request_of(item)
        if request is None:
            self._fail(item, error)
        else:
            self._discard_and_release(item)
            cause: LossCause = "none"
            if recalled is not None and isinstance(error, EngineLost):
                cause = error.cause
            self._executor.dispatch(Returned(self._context.name, request, cause))

    def _end(self, item: Item) -> None:
        """End an item because of a signal, and return its credit."""
        self._discard_and_release(item)
        self._executor.dispatch(
            Finished(item, reason_of(self._register.tombstone(item.request_id)))
        )

    def _end_held(self, signal: Signal) -> None:
        """End all choices of a request that the operator holds, after it raised on a signal."""
        if not self._service.holds or signal.kind == "forget":
            return
        gate = self._context.name, self._context.replica
        for holder, choice in self._executor.core.gates.holders(signal.request_id, signal.choice):
            if holder == gate:
                key = signal.request_id, choice
                self._context.release(key)
                self._executor.dispatch(Ended(self._context.name, last_event(key, "cancelled")))

    def _fail(self, item: Item, error: Exception) -> None:
        self._discard_and_release(item)
        self._executor.dispatch(Failed(self._context.name, item, error))

    def _discard_and_release(self, item: Item) -> None:
        self.discard(item)
        self._context.release(item.key)

    def discard(self, item: Item) -> None:
        """Let the operator free the resources of an item; log its fault if it raises."""
        try:
            self._service.discard(self._context, item)
        except (Exception, *LEAVING) as error:
            self._log(as_error(error), item.request_id)

    def _log(self, error: Exception, request_id: str) -> None:
        """Count and log a fault of the operator during clean-up; the request ends in any case."""
        self._meter.num_errors += 1
        log_fault(OperatorFault(self._context.name, error), request_id=request_id)


def _is_transfer(item: Item) -> bool:
    """Whether an item has KV blocks to transfer to another pool."""
    return isinstance(item, Prefilled) and item.lease is not None and item.reservation is not None


def _request_of(item: Item) -> Request | None:
    if isinstance(item, Prefilled):
        return item.request
    return item if isinstance(item, Request) else None


def _is_ended_by(item: Item, signal: Signal) -> bool:
    """Whether a signal ends an item at once.

    False for tokens: they are delivered, up to the last event of their sequence.
    """
    return not isinstance(item, TokenEvent) and signal.concerns(item.key)
