"""The context of a service operator, its queue of items, what its tasks wait with, and emissions
without credit.
"""

from collections import deque
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from functools import partial
from itertools import count, islice
from typing import Protocol

import msgspec
import trio

from sagellm.runtime.core.accounting import Clock
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.effects import Parked, Resumed
from sagellm.runtime.core.events import (
    Emitted,
    Ended,
    Event,
    Released,
    Reported,
    Transferred,
    Withdrawn,
)
from sagellm.runtime.executors.waits import Flag, Lot, Scope, Waits
from sagellm.runtime.feedback import Feedback
from sagellm.runtime.messages import EngineReplica, Item, Prefilled, TokenEvent
from sagellm.runtime.operator import Sent
from sagellm.runtime.port import Engine


class TrioWaits:
    """The primitives of trio."""

    def lot(self) -> Lot:
        return trio.lowlevel.ParkingLot()

    def flag(self) -> Flag:
        return trio.Event()

    def scope(self) -> Scope:
        return trio.CancelScope()

    def fail_after(self, seconds: float) -> AbstractContextManager[object]:
        return trio.fail_after(seconds)

    async def checkpoint(self) -> None:
        await trio.lowlevel.checkpoint()

    async def checkpoint_if_cancelled(self) -> None:
        await trio.lowlevel.checkpoint_if_cancelled()


class _Emission:
    """The items of one waiting task that still have to be sent.

    `sent`: called with each item once it is sent.
    """

    def __init__(
        self, items: tuple[Item, ...], sent: Callable[[Item], None] | None, is_done: Flag
    ) -> None:
        self._items = iter(items)
        self._num_left = len(items)
        self._sent = sent
        self.is_done = is_done

    def advance(self, number: int) -> None:
        """Record that the next `number` items were sent; let the task go on after the last."""
        for item in islice(self._items, number):
            if self._sent is not None:
                self._sent(item)
        self._num_left -= number
        if not self._num_left:
            self.is_done.set()


class Emissions:
    """Sends items from tasks into the core, and lets the tasks wait for credit.

    `dispatch`: gives an event to the core and carries out its effects.
    """

    def __init__(self, dispatch: Callable[[Event], None], waits: Waits) -> None:
        self._dispatch = dispatch
        self._waits = waits
        self._tickets = count(1)
        self._num_sent: dict[int, int] = {}  # by ticket, for tasks that do not wait yet
        self._emissions: dict[int, _Emission] = {}  # by ticket, for tasks that wait

    async def emit(
        self,
        node: str,
        replica: int,
        items: tuple[Item, ...],
        outlet: str = "out",
        sent: Callable[[Item], None] | None = None,
    ) -> None:
        """Send items of a service operator, waiting for credit. `sent` is called for each item."""
        # No full checkpoint: if there is credit, sending must not cost a task switch.
        await self._waits.checkpoint_if_cancelled()
        await self.wait(items, lambda ticket: Emitted(ticket, node, replica, items, outlet), sent)

    async def wait(
        self,
        items: tuple[Item, ...],
        event: Callable[[int], Event],
        sent: Callable[[Item], None] | None = None,
    ) -> None:
        """Dispatch an event that brings items into the core, and wait until all items are sent.

        `event`: makes the event from its ticket. `sent`: called for each item. Cancellation
        withdraws the items that are still parked.
        """
        ticket = next(self._tickets)
        self._dispatch(event(ticket))
        num_sent = self._num_sent.pop(ticket, len(items))  # without an entry, none was parked
        if sent is not None:
            for item in items[:num_sent]:
                sent(item)
        if num_sent == len(items):
            return
        emission = _Emission(items[num_sent:], sent, self._waits.flag())
        self._emissions[ticket] = emission
        try:
            await emission.is_done.wait()
        except BaseException:
            self._dispatch(Withdrawn(ticket))
            raise
        finally:
            del self._emissions[ticket]

    def advance(self, effect: Parked | Resumed) -> None:
        """Record that `effect.num_sent` items of a ticket were sent.

        Before the task of the ticket waits, only the number is kept, and `wait` reads it.
        """
        emission = self._emissions.get(effect.ticket)
        if emission is not None:
            emission.advance(effect.num_sent)
        else:
            before = self._num_sent.get(effect.ticket, 0)
            self._num_sent[effect.ticket] = before + effect.num_sent

    def end(self) -> None:
        """Let every waiting task continue, because the graph stops."""
        for emission in self._emissions.values():
            emission.is_done.set()


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


class Executor(Protocol):
    """The members of an executor that contexts and hosts use."""

    core: Core
    engines: dict[str, tuple[Engine, ...]]
    clock: Clock
    emissions: Emissions
    waits: Waits
    is_recorded: bool  # whether events are logged for a replay

    def now(self) -> float: ...
    def dispatch(self, event: Event) -> None: ...


class ServiceContext:
    """The implementation of the protocol `Context`.

    `unanswered`: items in `on_item` for which the operator has sent nothing yet. `untransferred`:
    items whose KV blocks were not transferred. `preempted`: held items that go back to the core as
    soon as the engine has stopped computing them.
    """

    def __init__(self, executor: Executor, name: str, replica: int) -> None:
        self.name = name
        self.replica = replica
        self.executor = executor
        self.meter = executor.core.meter.services[name, replica]
        self.engine_name = executor.core.plan.engine_name(name)
        self.unanswered: set[tuple[str, int]] = set()
        self.untransferred: set[tuple[str, int]] = set()
        self.preempted: set[tuple[str, int]] = set()

    @property
    def engine(self) -> Engine:
        if self.engine_name is None:
            raise LookupError(f"operator {self.name} names no engine")
        return self.engine_named(self.engine_name, self.replica)

    def engine_of(self, node: str, replica: int) -> Engine:
        name = self.executor.core.plan.engine_name(node)
        if name is None:
            raise LookupError(f"operator {node} names no engine")
        return self.engine_named(name, replica)

    def engine_named(self, name: str, replica: int) -> Engine:
        return self.executor.engines[name][replica]

    def now(self) -> float:
        return self.executor.now()

    def fail_after(self, seconds: float) -> AbstractContextManager[object]:
        return self.executor.waits.fail_after(seconds)

    async def emit(self, item: Item, outlet: str = "out") -> None:
        self.unanswered.discard(item.key)
        await self.executor.emissions.emit(self.name, self.replica, (item,), outlet)

    async def emit_batch(self, items: Iterable[TokenEvent], sent: Sent) -> None:
        batch = tuple(items)
        if self.unanswered:
            self.unanswered.difference_update(item.key for item in batch)
        if batch:
            done = partial(sent, self)
            await self.executor.emissions.emit(self.name, self.replica, batch, sent=done)

    async def terminate(self, event: TokenEvent, cause: Exception | None = None) -> None:
        self.unanswered.discard(event.key)
        self.meter.num_ended += 1
        self.executor.dispatch(Ended(self.name, event, cause))

    def report(self, feedback: Feedback) -> None:
        named = msgspec.structs.replace(feedback, node=self.name, replica=self.replica)
        self.executor.dispatch(Reported(named))

    def release(self, key: tuple[str, int]) -> None:
        self.preempted.discard(key)
        self.executor.dispatch(Released(self.name, self.replica, *key))

    def not_transferred(self, item: Item, *, has_failed: bool) -> None:
        self.untransferred.add(item.key)
        if has_failed:
            self.meter.num_errors += 1
            self.note_transfer(item, succeeded=False)

    def note_transfer(self, item: Item, *, succeeded: bool) -> None:
        """Report to the core whether the KV blocks of an item were transferred.

        Does nothing for an item without blocks to transfer.
        """
        if isinstance(item, Prefilled) and item.lease is not None and item.reservation is not None:
            sender = EngineReplica(item.lease.engine, item.lease.replica)
            receiver = EngineReplica(item.reservation.engine, item.reservation.replica)
            self.executor.dispatch(Transferred(sender, receiver, succeeded))
