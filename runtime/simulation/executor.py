"""The `simulation` executor: a shell whose tasks, engines and links run in simulated time."""

from collections.abc import Callable, Mapping
from math import inf

from sagellm.graphs.sections import ReplicaBounds
from sagellm.runtime.core.effects import ScaleTo, WakeAt
from sagellm.runtime.core.events import Arrived, Signalled, TimeCame
from sagellm.runtime.executors.tasks import RecordDecision, Shell
from sagellm.runtime.messages import EngineReplica, Forked, Item, Request
from sagellm.runtime.operator import Signal
from sagellm.runtime.plan import Plan
from sagellm.runtime.simulation.engine import SimulatedEngine
from sagellm.runtime.simulation.timeline import Timeline

_LOOK_S = 0.1  # between two checks whether removed replicas have ended their sequences


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

    def fail(self, engine: SimulatedEngine, for_s: float) -> None:
        """Let a replica die now, and come back after `for_s` seconds with an empty pool. A replica
        that was removed stays so.
        """
        name, number = engine.place
        if engine.place in self.plan.removed:
            return
        engine.lose()
        self.mark(name, number, is_up=False)

        def restart() -> None:
            if engine.place in self.plan.removed:
                return
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


class SimulatedScaling:
    """Starts and removes replicas in simulated time, as a supervisor does with worker processes.

    The new replicas of a change are ready `start_s` after its begin. Removed replicas get no new
    requests, and are gone once their sequences have ended, or after `drain_s`: then other replicas
    take over the rest. `counts`: by engine, each (time, number of replicas), from the begin of
    their start to their end.
    """

    def __init__(
        self,
        executor: SimulationExecutor,
        bounds: Mapping[str, ReplicaBounds],
        open_engine: Callable[[EngineReplica], SimulatedEngine],
    ) -> None:
        self._executor = executor
        self._timeline = executor.timeline
        self._bounds = bounds
        self._open_engine = open_engine
        self.counts = {name: [(0.0, len(every))] for name, every in executor.engines.items()}

    def begin(self, effect: ScaleTo) -> None:
        """Begin a change. Its end is reported to the operators."""
        name = effect.engine  # operators of a user may scale an engine without bounds
        bounds = self._bounds.get(name) or ReplicaBounds(max=effect.num_replicas)
        present = self._numbers(name, are_removed=False)
        missing = effect.num_replicas - len(present)
        if missing > 0:
            self._note(name, effect.num_replicas)
            self._timeline.at(self._timeline.now + bounds.start_s, lambda: self._add(name, missing))
            return
        # As a supervisor does, keep replicas that serve, and replicas with low numbers.
        is_lost = self._executor.core.replicas.availability.is_lost
        present.sort(key=lambda number: (is_lost(EngineReplica(name, number)), number))
        leaving = present[effect.num_replicas :]
        for number in leaving:
            self._executor.mark(name, number, is_up=False)
        self._wait_for(name, leaving, self._timeline.now + bounds.drain_s)

    def _add(self, name: str, count: int) -> None:
        for _ in range(count):
            removed = self._numbers(name, are_removed=True)
            number = removed[0] if removed else len(self._executor.engines[name])
            if removed:
                self._engine(name, number).restart()
            else:
                self._executor.add(name, self._open_engine(EngineReplica(name, number)))
            self._executor.mark(name, number, is_up=True)
        self._executor.end_scaling(name)

    def _wait_for(self, name: str, leaving: list[int], until_s: float) -> None:
        """Remove replicas once they have no sequences."""

        def look() -> None:
            loads = [self._engine(name, number).load for number in leaving]
            is_idle = not any(load.num_running + load.num_waiting for load in loads)
            if is_idle or self._timeline.now >= until_s:
                self._remove(name, leaving)
            else:
                self._timeline.at(self._timeline.now + _LOOK_S, look)

        self._timeline.at(self._timeline.now + _LOOK_S, look)

    def _remove(self, name: str, leaving: list[int]) -> None:
        for number in leaving:
            self._engine(name, number).lose("none")
            self._executor.remove(name, number)
        self._note(name, len(self._numbers(name, are_removed=False)))
        self._executor.end_scaling(name)

    def _note(self, name: str, count: int) -> None:
        self.counts[name].append((self._timeline.now, count))

    def _numbers(self, name: str, *, are_removed: bool) -> list[int]:
        plan = self._executor.plan
        numbers = range(plan.engines[name])
        return [n for n in numbers if (EngineReplica(name, n) in plan.removed) == are_removed]

    def _engine(self, name: str, number: int) -> SimulatedEngine:
        engine = self._executor.engines[name][number]
        assert isinstance(engine, SimulatedEngine)
        return engine
