"""The shell around a core: turns effects into actions, with tasks of trio or of simulated time."""

from collections import deque
from collections.abc import Callable, Mapping
from typing import TypeAlias

from sagellm.graphs.log import get_logger
from sagellm.runtime.core.accounting import Clock
from sagellm.runtime.core.core import Core
from sagellm.runtime.core.effects import (
    Deliver,
    Discard,
    Effect,
    Ejected,
    FailedOn,
    Faulted,
    Interrupt,
    Parked,
    QueryCache,
    Resumed,
    Send,
    WakeAt,
)
from sagellm.runtime.core.events import (
    CacheReported,
    Event,
    ReplicaAdded,
    ReplicaMarked,
    ReplicaRemoved,
)
from sagellm.runtime.executors.context import Emissions
from sagellm.runtime.executors.host import ServiceHost, Spawner, log_fault
from sagellm.runtime.executors.reading import Reading, read
from sagellm.runtime.executors.waits import Waits
from sagellm.runtime.messages import Forked, Item
from sagellm.runtime.plan import Plan
from sagellm.runtime.port import Engine
from sagellm.runtime.prefixes import ReportsCache

log = get_logger("sagellm.executor")

RecordDecision: TypeAlias = Callable[[float, Event, list[Effect]], None]


class Shell:
    """Gives events to a core, and carries out its effects.

    `deliver`: called with every item at the sink. It must not block. `engines`: the replicas of
    each engine of the plan. `record`: called with (time, event, effects) after each event. `clock`:
    the seconds that events get. `now`: the clock that operators read. `set_timer`: keeps the one
    timer of the core.
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
        self.clock = clock
        self.now = now
        self.waits = waits
        self.core = Core(plan, max_hold_s=max_hold_s, clock=clock)
        self._deliver = deliver
        self._record = record
        self.is_recorded = record is not None
        self._events: deque[Event] = deque()
        self._is_dispatching = False
        self.emissions = Emissions(self.dispatch, waits)
        self._at_rest = waits.lot()
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
            FailedOn: _log_failure,
            Ejected: _log_ejection,
            QueryCache: lambda effect: _ask_cache(
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

    def mark(self, engine: str, replica: int, *, is_up: bool) -> None:
        """Record that a replica of an engine is up, or was lost."""
        self.dispatch(ReplicaMarked(engine, replica, is_up))

    def remove(self, engine: str, replica: int) -> None:
        """Record that a lost replica will not come back."""
        self.dispatch(ReplicaRemoved(engine, replica))

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

    def _deliver_item(self, effect: Deliver) -> None:
        self.cause = effect.error
        self._deliver(effect.item)


def _ask_cache(engine: Engine, dispatch: Callable[[Event], None]) -> None:
    if isinstance(engine, ReportsCache):
        engine.report_cache(lambda changed: dispatch(CacheReported(changed)))


def _log_failure(effect: FailedOn) -> None:
    where = {"engine": effect.engine, "replica": effect.replica}
    log.warning("engine_failed", **where, request_id=effect.request_id, error=effect.error)


def _log_ejection(effect: Ejected) -> None:
    where = {"engine": effect.engine, "replica": effect.replica}
    if effect.for_s:
        log.warning("replica_ejected", **where, for_s=effect.for_s)
    else:
        log.info("replica_readmitted", **where)
