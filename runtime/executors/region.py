"""Connected logic operators, run as one: each input is a transaction over their states."""

from collections import deque
from collections.abc import Callable, Container, Mapping, Sized
from dataclasses import dataclass
from typing import Any, TypeAlias

from sagellm.graphs.ir import SINK, Edge, Graph
from sagellm.runtime.executors.answers import (
    check_end,
    check_item,
    check_step,
    state_was_lost,
    unknown_outlet,
    unknown_output,
)
from sagellm.runtime.executors.credit import Gate, Gates
from sagellm.runtime.executors.faults import OperatorFault
from sagellm.runtime.executors.holdings import Holdings
from sagellm.runtime.executors.meter import Meter, Tally
from sagellm.runtime.messages import Forked, Item, Prefilled, Request, TokenEvent
from sagellm.runtime.operator import (
    Announce,
    Arrival,
    Draw,
    Emit,
    Input,
    Logic,
    Offer,
    Output,
    Taken,
    Tell,
    Terminate,
)
from sagellm.runtime.user_code import LEAVING, WrongResult, as_error
from sagellm.runtime.user_function import failing


@dataclass(frozen=True, slots=True)
class Send:
    """An item for a service operator; its credit is spent."""

    gate: Gate
    item: Item


@dataclass(frozen=True, slots=True)
class Deliver:
    """An item for the sink."""

    item: Item | Forked
    terminal: bool = False
    fault: OperatorFault | None = None  # what ended it


@dataclass(frozen=True, slots=True)
class Upstream:
    """Feedback of one operator for those before it."""

    node: str
    kind: str
    value: Any


Effect: TypeAlias = Send | Deliver | Upstream
_Sending: TypeAlias = Callable[[str, Item, str, float], None]


class _NoCredit(Exception):
    """An item found no credit: the transaction is undone."""


@dataclass(slots=True)
class _Cell:
    """What the region keeps of one operator."""

    state: Any
    num_inputs: int = 0
    wake_at: float | None = None


class Region:
    """The logic operators of a graph, and the edges that leave them.

    Nothing here waits or knows a clock: `feed` either does all that an input entails and returns
    the effects, or nothing. So a log of inputs replays to the same decisions.
    """

    def __init__(
        self,
        graph: Graph,
        logic: Mapping[str, Logic[Any]],
        gates: Gates,
        replicas: Mapping[str, int],
        *,
        seed: int = 0,
        meter: Meter | None = None,
        entries: Container[str] = (),
    ) -> None:
        """`entries`: the ids of the requests that are open."""
        self._logic = dict(logic)
        self.holdings = Holdings(tuple(logic), entries)
        self._gates = gates
        self._replicas = replicas
        self._seed = seed
        meter = meter or Meter(graph, logic, replicas)
        self._meters, self._clock = meter.logic, meter.clock
        self._edges = {
            (edge.source, edge.outlet): (edge, meter.edges[edge.source, edge.outlet])
            for edge in graph.edges
            if not edge.feedback
        }
        self._initial = {name: operator.initial for name, operator in logic.items()}
        self._cells = {name: _Cell(state) for name, state in self._initial.items()}
        self._wakes: dict[str, float] = {}
        self._undo: list[tuple[str, Any, int, float | None]] = []
        self._taken: list[Send] = []
        self._effects: list[Effect] = []
        self._accepted: deque[tuple[str, Item]] = deque()
        self._passed: list[Tally] = []  # what to count once all is done
        self._moves: list[tuple[str, Item, bool]] = []  # operator, item, and whether it came in
        self.undone: tuple[str, ...] = ()  # the operators whose input found no credit the last time

    def __contains__(self, node: str) -> bool:
        return node in self._logic

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._logic)

    def state(self, node: str) -> Any:
        return self._cells[node].state

    @property
    def next_wake(self) -> tuple[float, str] | None:
        """When, and which operator, wants to be woken first."""
        if not self._wakes:
            return None
        return min(((at, name) for name, at in self._wakes.items()), default=None)

    def forget_wake(self, node: str) -> None:
        """Its time has come: whatever the operator makes of it, it asks anew for the next."""
        self._cells[node].wake_at = None
        self._wakes.pop(node, None)

    def restart(self, node: str) -> None:
        """Give an operator its first state again, after it failed on the one that it has."""
        self._set(node, _Cell(self._initial[node], self._cells[node].num_inputs))

    def is_waiting(self, node: str) -> bool:
        """Whether the operator has asked for a wake-up that has not come."""
        return self._cells[node].wake_at is not None

    def lost(self, node: str) -> WrongResult | None:
        """The error of an operator that has dropped its state with requests in it, if it has."""
        cell, items = self._cells[node], self.holdings.of(node)
        if not items or cell.wake_at is not None:
            return None
        return state_was_lost(self._logic[node], cell.state, self._initial[node], items)

    def feed(self, node: str, happened: Input, now: float) -> tuple[Effect, ...] | None:
        """All effects of an input, or None: no credit, and nothing has changed."""
        if not self._attempt(lambda: self._meet(node, happened, now)):
            return None
        return self._commit()

    def send(self, source: str, item: Item, outlet: str, now: float) -> tuple[Effect, ...] | None:
        """Send an item from a port or a service operator; None as for `feed`."""
        if not self._attempt(lambda: self._pass_on(source, item, outlet, now)):
            return None
        return self._commit()

    def _commit(self) -> tuple[Effect, ...]:
        effects = tuple(self._effects)
        for tally in self._passed:
            tally.count += 1
        for node, item, is_in in self._moves:
            (self.holdings.take if is_in else self.holdings.send)(node, item)
        self._passed.clear()
        self._moves.clear()
        self._effects.clear()
        self._undo.clear()
        self._taken.clear()
        return effects

    def _attempt(self, action: Any) -> bool:
        marks = self._marks()
        try:
            action()
        except _NoCredit:
            self.undone = tuple(entry[0] for entry in self._undo[marks[0] :])
            self._roll_back(marks)
            return False
        except BaseException:
            self._roll_back(marks)
            raise
        return True

    def _marks(self) -> tuple[int, ...]:
        """How far the transaction is, for `_roll_back`."""
        logs: tuple[Sized, ...] = (
            self._undo, self._taken, self._accepted, self._effects, self._passed, self._moves,
        )  # fmt: skip
        return tuple(map(len, logs))

    def _roll_back(self, marks: tuple[int, ...]) -> None:
        undo, taken, accepted, effects, passed, moves = marks
        while len(self._undo) > undo:
            name, state, num_inputs, wake_at = self._undo.pop()
            self._set(name, _Cell(state, num_inputs, wake_at))
        while len(self._taken) > taken:
            send = self._taken.pop()
            self._gates.give(send.gate, send.item.key)
        while len(self._accepted) > accepted:
            self._accepted.pop()
        del self._effects[effects:], self._passed[passed:], self._moves[moves:]

    def _meet(self, node: str, happened: Input, now: float) -> None:
        """Run an input, and answer the offers that it led to before the next input."""
        self._run(node, happened, now)
        while self._accepted:
            offering, item = self._accepted.popleft()
            self._run(offering, Taken(item), now)

    def _run(self, node: str, happened: Input, now: float) -> None:
        cell = self._cells[node]
        self._undo.append((node, cell.state, cell.num_inputs, cell.wake_at))
        draw = Draw(self._seed, node, cell.num_inputs)
        meter, begun_s = self._meters[node], self._clock()
        try:
            step = self._logic[node].on(cell.state, happened, now, draw)
            check_step(self._logic[node], happened, step, cell.state)
        except (Exception, *LEAVING) as error:
            meter.errors.count += 1
            raise OperatorFault(node, as_error(error)) from error
        meter.process_s += self._clock() - begun_s
        self._set(node, _Cell(step.state, cell.num_inputs + 1, step.wake_at))
        send = self._send_apart
        if isinstance(happened, Arrival):
            send = self._pass_on
            if not _is_sent_on(happened.item, step.outputs):
                self._moves.append((node, happened.item, True))
        for output in step.outputs:
            try:
                self._put_out(node, output, now, send)
            except WrongResult as error:
                raise OperatorFault(node, error) from None

    def _set(self, node: str, cell: _Cell) -> None:
        self._cells[node] = cell
        if cell.wake_at is not None:
            self._wakes[node] = cell.wake_at
        elif self._wakes:
            self._wakes.pop(node, None)

    def _put_out(self, node: str, output: Output, now: float, send: _Sending) -> None:
        match output:
            case Emit(item, outlet):
                check_item(self._logic[node], item)
                send(node, item, outlet, now)
            case Offer(items, outlet):
                self._offer(node, items, outlet, now)
            case Terminate(event, cause):
                check_end(self._logic[node], output)
                self._count_end(node, event)
                fault = OperatorFault(node, cause) if cause is not None else None
                self._effects.append(Deliver(event, terminal=True, fault=fault))
            case Announce(forked):
                self._effects.append(Deliver(forked))
            case Tell(kind, value):
                self._effects.append(Upstream(node, kind, value))
            case _:
                raise unknown_output(self._logic[node], output)

    def _count_end(self, node: str, event: TokenEvent) -> None:
        meter = self._meters[node]
        self._passed.append(meter.ended)
        if event.finish_reason == "failed":
            self._passed.append(meter.errors)

    def _offer(self, node: str, items: tuple[Item, ...], outlet: str, now: float) -> None:
        """An item that an operator downstream fails on is taken, and ends as failed: it would
        else stay at the head of its queue, and fail every request that comes after it.
        """
        for item in items:
            try:
                is_taken = self._attempt(lambda item=item: self._pass_on(node, item, outlet, now))
            except OperatorFault as fault:
                self._end(item, fault, now)
                is_taken = True
            if is_taken:
                self._accepted.append((node, item))
                return

    def _send_apart(self, node: str, item: Item, outlet: str, now: float) -> None:
        """Send one of the items that were kept: if an operator downstream fails on it, it ends
        alone.
        """
        marks = self._marks()
        try:
            self._pass_on(node, item, outlet, now)
        except OperatorFault as fault:
            self._roll_back(marks)
            self._end(item, fault, now)

    def _end(self, item: Item, fault: OperatorFault, now: float) -> None:
        event = failing(item, fault.public, now=now)
        self._effects.append(Deliver(event, terminal=True, fault=fault))

    def _pass_on(self, node: str, item: Item, outlet: str, now: float) -> None:
        if (node, outlet) not in self._edges:
            known = [edge[1] for edge in self._edges if edge[0] == node]
            raise unknown_outlet(self._logic.get(node), outlet, known)
        edge, tally = self._edges[node, outlet]
        self._passed.append(tally)
        if self._moves or self.holdings.held.get(node):  # else it holds nothing that could leave
            self._moves.append((node, item, False))
        if edge.target == SINK:
            self._effects.append(Deliver(item))
        elif edge.target in self._logic:
            self._meet(edge.target, Arrival(item, edge.inlet), now)
        else:
            self._enter(edge, item)

    def _enter(self, edge: Edge, item: Item) -> None:
        gate = edge.target, replica_for(item, edge.target, self._replicas[edge.target])
        if not self._gates.take(gate, item):
            raise _NoCredit
        send = Send(gate, item)
        self._taken.append(send)
        self._effects.append(send)


def _is_sent_on(item: Item, outputs: tuple[Output, ...]) -> bool:
    """Whether an operator answers an item with the next one of its choice, as nearly all do."""
    if len(outputs) != 1 or not isinstance(outputs[0], Emit):
        return False
    sent = outputs[0].item
    return sent is item or getattr(sent, "key", None) == item.key


def replica_for(item: Item, node: str, num_replicas: int) -> int:
    """The replica that the router placed an item on; the only one where there is one."""
    if num_replicas == 1:
        return 0
    request = item.request if isinstance(item, Prefilled) else item
    if isinstance(request, Request) and node in request.placement:
        return request.placement[node]
    raise LookupError(f"{node} has {num_replicas} replicas and no route chose one")


def ends(item: Item | Forked) -> bool:
    """Whether this is the last item of its choice."""
    if isinstance(item, TokenEvent):  # nearly all are
        return item.is_last
    return not isinstance(item, Forked | Request | Prefilled)
