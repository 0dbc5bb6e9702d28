"""Readings of an executor's meters, and how operators spent the time between two readings."""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from sagellm.graphs.ir import SINK, Node
from sagellm.runtime.core.accounting import Meter
from sagellm.runtime.core.credit import Gates
from sagellm.runtime.plan import Plan

TERMINAL = "terminal"  # the implicit outlet of every operator to the sink


@dataclass(frozen=True, slots=True)
class OperatorReading:
    """The counters of a logic operator, or of one replica of a service operator, since the start.

    `num_out` counts all outlets, including the implicit `terminal`. `process_s`: the sum of the
    times of all calls, which may overlap. `busy_s`, `backpressured_s` and idle time do not overlap,
    and together are the elapsed time.
    """

    node: str
    op: str
    replica: int
    num_in: int
    num_out: int
    num_errors: int
    num_in_flight: int
    queue_depth: int
    queue_capacity: int | None  # None: unbounded, or no queue
    process_s: float
    busy_s: float
    backpressured_s: float


@dataclass(frozen=True, slots=True)
class EdgeReading:
    """The number of items that have passed one edge, explicit or implicit."""

    source: str
    outlet: str
    target: str
    num_items: int


@dataclass(frozen=True, slots=True)
class Reading:
    """All meters at one moment of the executor's clock."""

    at_s: float
    operators: tuple[OperatorReading, ...]
    edges: tuple[EdgeReading, ...]


def read(meter: Meter, plan: Plan, gates: Gates, waiting: Mapping[tuple[str, int], int]) -> Reading:
    """Read all meters, without changing them.

    `waiting`: the number of items in the queue of each (service operator, replica).
    """
    edges = _edges(meter, plan)
    operators: list[OperatorReading] = []
    for node in plan.graph.nodes:
        if node.name in meter.logic:
            operators.append(_logic(meter, plan, node, edges))
        else:
            operators += [
                _service(meter, node.op, gate, gates, waiting.get(gate, 0))
                for gate in meter.services
                if gate[0] == node.name
            ]
    return Reading(meter.clock(), tuple(operators), edges)


def _logic(meter: Meter, plan: Plan, node: Node, edges: tuple[EdgeReading, ...]) -> OperatorReading:
    logic = meter.logic[node.name]
    return OperatorReading(
        node=node.name,
        op=node.op,
        replica=0,
        num_in=sum(edge.num_items for edge in edges if edge.target == node.name),
        num_out=sum(edge.num_items for edge in edges if edge.source == node.name),
        num_errors=logic.errors.count,
        num_in_flight=logic.num_queued,
        queue_depth=logic.num_queued,
        queue_capacity=_bound(plan, node.name) if logic.is_queue else None,
        process_s=logic.process_s,
        busy_s=logic.process_s,
        backpressured_s=logic.blocked.seconds,
    )


def _service(
    meter: Meter, op: str, gate: tuple[str, int], gates: Gates, num_waiting: int
) -> OperatorReading:
    service, capacity = meter.services[gate], gates.accounts[gate].capacity.requests
    blocked_s = service.blocked.seconds
    return OperatorReading(
        node=gate[0],
        op=op,
        replica=gate[1],
        num_in=service.num_in,
        num_out=service.num_sent + service.num_ended,
        num_errors=service.num_errors,
        num_in_flight=service.held.level,
        queue_depth=num_waiting,
        queue_capacity=None if math.isinf(capacity) else int(capacity),
        process_s=service.process_s,
        busy_s=max(service.held.seconds - blocked_s, 0.0),
        backpressured_s=blocked_s,
    )


def _edges(meter: Meter, plan: Plan) -> tuple[EdgeReading, ...]:
    explicit = [
        EdgeReading(
            edge.source, edge.outlet, edge.target, meter.edges[edge.source, edge.outlet].count
        )
        for edge in plan.graph.edges
        if not edge.feedback
    ]
    ended = {name: logic.ended.count for name, logic in meter.logic.items()}
    for (name, _), service in meter.services.items():
        ended[name] = ended.get(name, 0) + service.num_ended
    implicit = [EdgeReading(name, TERMINAL, SINK, count) for name, count in ended.items()]
    return (*explicit, *implicit)


def _bound(plan: Plan, node: str) -> int | None:
    """The option `max_queued` of `node`, or else of the nearest operator upstream; None without."""
    for name in (node, *plan.ancestors(node)):
        bound = option_of(plan, name, "max_queued")
        if isinstance(bound, int):
            return bound
    return None


def option_of(plan: Plan, node: str, option: str) -> Any:
    """The value of an option of a logic operator; None if the operator has no such option."""
    return getattr(getattr(plan.logic.get(node), "options", None), option, None)


class Shares(NamedTuple):
    """The shares of a span of time that an operator spent busy, idle and backpressured; sum 1."""

    busy: float
    idle: float
    backpressured: float


def shares(before: OperatorReading, after: OperatorReading, elapsed_s: float) -> Shares:
    """The shares of the span between two readings; all idle if no time has passed."""
    if elapsed_s <= 0:
        return Shares(0.0, 1.0, 0.0)
    busy = min(max((after.busy_s - before.busy_s) / elapsed_s, 0.0), 1.0)
    blocked = (after.backpressured_s - before.backpressured_s) / elapsed_s
    backpressured = min(max(blocked, 0.0), 1.0 - busy)
    return Shares(busy, max(1.0 - busy - backpressured, 0.0), backpressured)


class Window:
    """The readings of the last `span_s` seconds, from which shares are computed.

    Every reader gets shares over the same span, no matter how often it reads.
    """

    def __init__(self, span_s: float) -> None:
        self._span_s = span_s
        self._readings: deque[Reading] = deque()

    def add(self, reading: Reading) -> None:
        """Add a reading, which must be newer than all others.

        Of the readings that are at least `span_s` older, only the newest is kept.
        """
        self._readings.append(reading)
        while len(self._readings) > 1 and self._readings[1].at_s <= reading.at_s - self._span_s:
            self._readings.popleft()

    def shares(self, now: Reading) -> dict[tuple[str, int], Shares]:
        """(operator, replica) -> shares since the oldest kept reading.

        A replica that is not in that reading counts as idle.
        """
        since = self._readings[0] if self._readings else now
        before = {(one.node, one.replica): one for one in since.operators}
        return {
            (one.node, one.replica): shares(
                before.get((one.node, one.replica), one), one, now.at_s - since.at_s
            )
            for one in now.operators
        }
