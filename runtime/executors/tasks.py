"""Runs a core: the shell that turns effects into actions, and the executor `tasks`, under trio."""

from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from math import inf
from typing import TypeAlias

import trio

from sagellm.runtime.core.accounting import Clock
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.effects import (
    Assigned,
    Deliver,
    Discard,
    Effect,
    Ejected,
    FailedOn,
    Faulted,
    Interrupt,
    Noted,
    Parked,
    QueryCache,
    Resumed,
    ScaleTo,
    Send,
    WakeAt,
)
from sagellm.runtime.core.events import (
    Arrived,
    Event,
    ReplicaAdded,
    ReplicaMarked,
    ReplicaRemoved,
    Reported,
    Signalled,
    Stopped,
)
from sagellm.runtime.executors.context import Emissions, TrioWaits
from sagellm.runtime.executors.engine_reader import follow_availability
from sagellm.runtime.executors.host import (
    ServiceHost,
    Spawner,
    ask_cache,
    log_assignment,
    log_ejection,
    log_failure,
    log_fault,
    log_scaling,
)
from sagellm.runtime.executors.reading import Reading, read
from sagellm.runtime.executors.waits import Timer, Waits
from sagellm.runtime.feedback import ScaleEnded
from sagellm.runtime.messages import Forked, Item, Request
from sagellm.runtime.operator import Signal
from sagellm.runtime.plan import Plan
from sagellm.runtime.port import Engine

RecordDecision: TypeAlias = Callable[[float, Event, list[Effect]], None]


class Shell:
    """Gives events to a core, and carries out its effects.

    `deliver`: called with every item at the sink. It must not block. `engines`: the replicas of
    each engine of the plan. `record`: called with (time, event, effects) after each event. `clock`:
    the seconds that events get. `now`: the clock that operators read. `set_timer`: keeps the one
    timer of the core.

    `scale` carries out `ScaleTo`, and calls `end_scaling` at the end; None: replicas are fixed.
    """

    def __init__(
        self,
        plan: Plan,
        deliver: Callable[[Item | Forked], None],
        waits: Waits,
        *,
        engines: Mapping[str, tuple[Engine, ...]],
        max_hold_s: float,
        record: RecordDecision | None,
        clock: Clock,
        now: Clock,
        set_timer: Callable[[WakeAt], None],
    ) -> None:
        self.engines = dict(engines)
        self.cause: Exception | None = None  # the exception that ended the item being delivered
        self.clock, self.now, self.waits = clock, now, waits
        self.on_note: Callable[[Noted], None] = lambda effect: None  # the core counts all notes
        self.core = Core(plan, max_hold_s=max_hold_s, clock=clock)
        self._deliver = deliver
        self._record = record
        self.is_recorded = record is not None
        self._events: deque[Event] = deque()
        self._is_dispatching = False
        self.emissions = Emissions(self.dispatch, waits)
        self._at_rest = waits.lot()
        self.scale: Callable[[ScaleTo], None] | None = None
        self._spawner: Spawner | None = None
        self._effect_handlers: dict[type, Callable[..., None]] = {
            Send: lambda effect: self._hosts[effect.node, effect.replica].put(effect.item),
            Deliver: self._deliver_item,
            Interrupt: lambda effect: self._hosts[effect.node, effect.replica].signal(
                effect.signal
            ),
            Discard: lambda effect: self._hosts[effect.node, effect.replica].discard(effect.item),
            Parked: self.emissions.advance,
            Resumed: self.emissions.advance,
            WakeAt: set_timer,
            Faulted: lambda effect: log_fault(effect.fault, request_id=effect.request_id),
            FailedOn: log_failure,
            Noted: lambda effect: self.on_note(effect),
            Ejected: log_ejection,
            Assigned: log_assignment,
            ScaleTo: self._begin_scaling,
            QueryCache: lambda effect: ask_cache(
                self.engines[effect.engine][effect.replica], dispatch=self.dispatch
            ),
        }
        self._hosts = {
            (node, replica): ServiceHost(self, node, replica, service)
            for node, service in plan.services.items()
            for replica in range(plan.num_replicas(node))
        }

    def start_hosts(self, spawner: Spawner) -> None:
        """Start the tasks of all service operators."""
        self._spawner = spawner
        for name, replicas in self.engines.items():
            for number, engine in enumerate(replicas):
                follow_availability(engine, partial(self.mark, name, number))
        for host in self._hosts.values():
            host.start(spawner)

    @property
    def plan(self) -> Plan:
        """The current plan; it is replaced when replicas are added or removed."""
        return self.core.plan

    @property
    def all_engines(self) -> tuple[Engine, ...]:
        """All replicas of all engines."""
        return tuple(engine for replicas in self.engines.values() for engine in replicas)

    def reading(self) -> Reading:
        """The meters of operators and edges since the start."""
        waiting = {gate: host.num_waiting for gate, host in self._hosts.items()}
        return read(self.core.meter, self.plan, self.core.gates, waiting)

    def is_routed(self, engine: str) -> bool:
        return self.plan.is_routed(engine)

    def add(self, name: str, engine: Engine) -> None:
        """Add a replica to a routed engine. It gets no request before `mark` with `is_up` True."""
        assert self._spawner is not None
        replica = len(self.engines[name])
        self.engines[name] = (*self.engines[name], engine)
        self._spawner.start_soon(engine.run)
        self.dispatch(ReplicaAdded(name))
        for node in self.plan.nodes_of(name):
            host = self._hosts[node, replica] = ServiceHost(
                self, node, replica, self.plan.services[node]
            )
            host.start(self._spawner)
        follow_availability(engine, partial(self.mark, name, replica))

    def mark(self, engine: str, replica: int, *, is_up: bool) -> None:
        """Record that a replica of an engine is up, or was lost."""
        self.dispatch(ReplicaMarked(engine, replica, is_up))

    def remove(self, engine: str, replica: int) -> None:
        """Record that a lost replica will not come back."""
        self.dispatch(ReplicaRemoved(engine, replica))

    def end_scaling(self, engine: str, error: str = "") -> None:
        """Report that a change of the number of replicas has ended; `error`: why it failed."""
        node = next(iter(self.plan.nodes_of(engine)), "")
        self.dispatch(Reported(ScaleEnded(node=node, engine=engine, error=error)))

    def dispatch(self, event: Event) -> None:
        """Give an event to the core, and carry out its effects.

        If an effect dispatches another event, that event is queued until all effects are done.
        """
        self._events.append(event)
        if self._is_dispatching:  # the core is not re-entrant
            return
        self._is_dispatching = True
        try:
            while self._events:
                self._handle(self._events.popleft())
        finally:
            self._is_dispatching = False

    def _handle(self, event: Event) -> None:
        now = self.clock()
        effects = self.core.on(event, now)
        if self._record is not None:
            self._record(now, event, effects)
        for effect in effects:
            self._effect_handlers[type(effect)](effect)
        if self._at_rest and self.core.is_at_rest:
            self._at_rest.unpark_all()

    def _begin_scaling(self, effect: ScaleTo) -> None:
        log_scaling(effect)
        if self.scale is None or effect.engine not in self.engines:
            self.end_scaling(effect.engine, "the number of its replicas is fixed")
        else:
            self.scale(effect)

    def _deliver_item(self, effect: Deliver) -> None:
        self.cause = effect.error
        self._deliver(effect.item)


class ExecutorStopped(RuntimeError):
    """A request was submitted to a graph that has stopped."""

    def __init__(self) -> None:
        super().__init__("the graph has stopped; open it again")


class TasksExecutor(Shell):
    """Runs a core under trio: logic operators in the core, service operators in their own tasks.

    `deliver`: called with every item at the sink. It must not block, and may buffer the items:
    `max_tokens` bounds the items of a request.
    """

    def __init__(
        self,
        plan: Plan,
        deliver: Callable[[Item | Forked], None],
        *,
        engines: Mapping[str, tuple[Engine, ...]] | None = None,
        max_hold_s: float = inf,
        record: RecordDecision | None = None,
    ) -> None:
        self._timer = Timer(self.dispatch)
        self.is_stopped = False
        super().__init__(
            plan,
            deliver,
            TrioWaits(),
            engines=engines or {},
            max_hold_s=max_hold_s,
            record=record,
            clock=trio.lowlevel.current_clock().current_time,
            now=trio.current_time,  # operators read the same clock as the core
            set_timer=self._timer.set,
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled, or until an engine or a task of an operator raises.

        Then all open requests end as failed, so that no caller waits forever.
        """
        try:
            async with trio.open_nursery() as nursery:
                for engine in self.all_engines:
                    nursery.start_soon(engine.run)
                self.start_hosts(nursery)
                nursery.start_soon(self._timer.run)
                task_status.started()
        finally:
            # In this order, no new request can enter, and all requests end before tasks continue.
            self.is_stopped = True
            self.dispatch(Stopped())
            self._at_rest.unpark_all()
            self.emissions.end()

    async def submit(self, *choices: Request) -> None:
        """Send all choices of one request into the graph through `source`.

        In a graph without a queue, waits for credit; if cancelled meanwhile, the request ends as
        cancelled. Raises ExecutorStopped, and ValueError if the request id is in use.
        """
        if self.is_stopped:
            raise ExecutorStopped
        request_id = choices[0].request_id
        if request_id in self.core.register:
            raise ValueError(f"request {request_id!r} is running already")
        try:
            await self.emissions.wait(choices, lambda ticket: Arrived(ticket, choices))
        except BaseException:
            self.dispatch(Signalled(Signal("cancel", request_id)))
            raise

    def signal(self, signal: Signal) -> None:
        """End a request or one of its choices. Unknown requests are ignored."""
        self.dispatch(Signalled(signal))

    async def idle(self) -> None:
        """Wait until all requests have ended and all blocks are free, or the executor stops."""
        while not self.core.is_at_rest and not self.is_stopped:
            await self._at_rest.park()
        for engine in self.all_engines:
            await engine.idle()
