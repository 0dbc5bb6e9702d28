"""The context of one replica of a service operator: what the executor lends it."""

from collections.abc import Iterable
from functools import partial
from typing import Protocol

import msgspec

from sagellm.runtime.core.core import Core
from sagellm.runtime.core.events import Ended, Event, Released, Reported, Transferred
from sagellm.runtime.core.meter import Clock
from sagellm.runtime.executors.emissions import Emissions
from sagellm.runtime.feedback import Feedback
from sagellm.runtime.messages import Item, Prefilled, TokenEvent
from sagellm.runtime.operator import Sent
from sagellm.runtime.port import Engine


class Executor(Protocol):
    """What a context and its host need of the executor around them."""

    core: Core
    engines: dict[str, tuple[Engine, ...]]
    clock: Clock
    emissions: Emissions
    is_recorded: bool  # whether events are kept to be replayed

    def now(self) -> float: ...
    def happen(self, event: Event) -> None: ...


class ServiceContext:
    """Implements the protocol Context.

    `owed`: items that were taken and that nothing was sent for yet. `untransferred`: items whose KV
    blocks do not come.
    """

    def __init__(self, executor: Executor, name: str, replica: int) -> None:
        self.name = name
        self.replica = replica
        self.executor = executor
        self.meter = executor.core.meter.services[name, replica]
        self.engine_name = executor.core.plan.engine_name(name)
        self.owed: set[tuple[str, int]] = set()
        self.untransferred: set[tuple[str, int]] = set()

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

    async def emit(self, item: Item, outlet: str = "out") -> None:
        self.owed.discard(item.key)
        await self.executor.emissions.emit(self.name, self.replica, (item,), outlet)

    async def emit_batch(self, items: Iterable[TokenEvent], sent: Sent) -> None:
        batch = tuple(items)
        if self.owed:
            self.owed.difference_update(item.key for item in batch)
        if batch:
            done = partial(sent, self)
            await self.executor.emissions.emit(self.name, self.replica, batch, sent=done)

    async def terminate(self, event: TokenEvent, cause: Exception | None = None) -> None:
        self.owed.discard(event.key)
        self.meter.num_ended += 1
        self.executor.happen(Ended(self.name, event, cause))

    def report(self, feedback: Feedback) -> None:
        named = msgspec.structs.replace(feedback, node=self.name, replica=self.replica)
        self.executor.happen(Reported(named))

    def release(self, key: tuple[str, int]) -> None:
        self.executor.happen(Released(self.name, self.replica, *key))

    def not_transferred(self, item: Item, *, has_failed: bool) -> None:
        self.untransferred.add(item.key)
        if has_failed:
            self.meter.num_errors += 1
            self.note_transfer(item, succeeded=False)

    def note_transfer(self, item: Item, *, succeeded: bool) -> None:
        """Tell the core between which replicas KV blocks were transferred, if any were."""
        if isinstance(item, Prefilled) and item.lease is not None and item.landing is not None:
            sender = item.lease.engine, item.lease.replica
            receiver = item.landing.engine, item.landing.replica
            self.executor.happen(Transferred(sender, receiver, succeeded))
