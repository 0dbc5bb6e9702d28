"""The `simulation` executor: a shell whose tasks, engines and links run in simulated time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from math import inf

from sagellm.runtime.core.effects import WakeAt
from sagellm.runtime.core.events import Arrived, Signalled, TimeCame
from sagellm.runtime.executors.tasks import RecordDecision, Shell
from sagellm.runtime.messages import Forked, Item, Request
from sagellm.runtime.operator import Signal
from sagellm.runtime.plan import Plan
from sagellm.runtime.simulation.engine import SimulatedEngine
from sagellm.runtime.simulation.timeline import SimulationError, Timeline


@dataclass(frozen=True, slots=True)
class ReplicaFault:
    """A replica dies `at_s` seconds after the beginning, and is back `for_s` seconds later."""

    engine: str
    replica: int
    at_s: float
    for_s: float


class SimulationExecutor(Shell):
    """Runs a graph in simulated time, with its own core and operators, over modelled engines.

    Equal arrivals give equal results, bit by bit, on any machine. `deliver` and `record`: see
    `Shell`.
    """

    def __init__(
        self,
        plan: Plan,
        deliver: Callable[[Item | Forked], None],
        timeline: Timeline,
        *,
        engines: Mapping[str, tuple[SimulatedEngine, ...]],
        max_hold_s: float = inf,
        record: RecordDecision | None = None,
    ) -> None:
        self.timeline = timeline
        self._wake_at_s = inf
        self._replicas = engines
        super().__init__(
            plan,
            deliver,
            timeline,
            engines=engines,
            max_hold_s=max_hold_s,
            record=record,
            clock=timeline.time,
            now=timeline.time,
            set_timer=self._set_timer,
        )
        self.start_hosts(timeline)

    def arrive(self, *choices: Request) -> None:
        """Send all choices of one request into the graph now. Without credit they wait inside."""
        self.dispatch(Arrived(0, choices))

    def plan_faults(self, faults: Sequence[ReplicaFault]) -> None:
        """Let replicas die and come back at their times. Raises SimulationError for a replica that
        the graph lacks, or that dies again before it is back.
        """
        _refuse_overlaps(faults)
        for fault in faults:
            engine = self._replica(fault)
            self.timeline.at(fault.at_s, partial(self.fail, engine, fault.for_s))

    def _replica(self, fault: ReplicaFault) -> SimulatedEngine:
        replicas = self._replicas.get(fault.engine, ())
        if fault.replica >= len(replicas):
            known = ", ".join(
                f"{name}[0..{len(each) - 1}]" for name, each in self._replicas.items()
            )
            message = f"no replica {fault.replica} of engine {fault.engine} can die"
            raise SimulationError(message, f"give one of {known}")
        return replicas[fault.replica]

    def fail(self, engine: SimulatedEngine, for_s: float) -> None:
        """Let a replica die now, and come back after `for_s` seconds with an empty pool."""
        name, number = engine.place
        engine.lose()
        self.mark(name, number, is_up=False)

        def restart() -> None:
            engine.restart()
            self.mark(name, number, is_up=True)

        self.timeline.at(self.timeline.now + for_s, restart)

    def signal(self, signal: Signal) -> None:
        """End a request or one of its choices. Unknown requests are ignored."""
        self.dispatch(Signalled(signal))

    def _set_timer(self, effect: WakeAt) -> None:
        self._wake_at_s = at_s = effect.at_s
        if at_s < inf:
            self.timeline.at(at_s, lambda: self._time_came(at_s))

    def _time_came(self, at_s: float) -> None:
        if at_s == self._wake_at_s:  # else another `WakeAt` has replaced it
            self._wake_at_s = inf
            self.dispatch(TimeCame())


def _refuse_overlaps(faults: Sequence[ReplicaFault]) -> None:
    """Raise SimulationError for a replica that dies again before it is back."""
    ordered = sorted(faults, key=lambda one: (one.engine, one.replica, one.at_s))
    for before, after in pairwise(ordered):
        is_same = (before.engine, before.replica) == (after.engine, after.replica)
        if is_same and after.at_s <= before.at_s + before.for_s:
            where = f"replica {after.replica} of engine {after.engine}"
            message = f"{where} dies at {after.at_s:g} s, when it is dead already"
            raise SimulationError(message, f"give a time after {before.at_s + before.for_s:g} s")
