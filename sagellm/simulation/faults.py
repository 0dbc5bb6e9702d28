"""Replicas that die in a simulation, and come back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from sagellm.runtime.simulation.engine import SimulatedEngine
from sagellm.runtime.simulation.executor import SimulationExecutor
from sagellm.runtime.simulation.timeline import SimulationError


@dataclass(frozen=True, slots=True)
class ReplicaFault:
    """A replica dies `at_s` seconds after the beginning, and is back `for_s` seconds later."""

    engine: str
    replica: int
    at_s: float
    for_s: float


def refuse_overlaps(faults: Sequence[ReplicaFault]) -> None:
    """Raise SimulationError for a replica that dies again before it is back."""
    ordered = sorted(faults, key=lambda one: (one.engine, one.replica, one.at_s))
    for before, after in pairwise(ordered):
        is_same = (before.engine, before.replica) == (after.engine, after.replica)
        if is_same and after.at_s <= before.at_s + before.for_s:
            where = f"replica {after.replica} of engine {after.engine}"
            message = f"{where} dies at {after.at_s:g} s, when it is dead already"
            raise SimulationError(message, f"give a time after {before.at_s + before.for_s:g} s")


def plan_fault(
    executor: SimulationExecutor,
    engines: Mapping[str, tuple[SimulatedEngine, ...]],
    fault: ReplicaFault,
) -> None:
    """Let a replica die at its time. Raises SimulationError for one that the graph lacks."""
    replicas = engines.get(fault.engine, ())
    if fault.replica >= len(replicas):
        known = ", ".join(f"{name}[0..{len(every) - 1}]" for name, every in engines.items())
        message = f"no replica {fault.replica} of engine {fault.engine} can die"
        raise SimulationError(message, f"give one of {known}")
    engine = replicas[fault.replica]
    executor.timeline.at(fault.at_s, lambda: executor.fail(engine, fault.for_s))
