"""Propagates an item through logic operators inside one transaction."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sagellm.graphs.ir import SINK, Graph
from sagellm.runtime.core.accounting import CommittedCount, Meter
from sagellm.runtime.core.credit import CreditGate, Gates, NoCredit
from sagellm.runtime.core.effects import OperatorFault
from sagellm.runtime.core.journal import Journal, LogicCell, ReachedSink
from sagellm.runtime.core.outputs import (
    ITEMS,
    Outputs,
    SendItem,
    check_step,
    unknown_outlet,
    unknown_output,
)
from sagellm.runtime.core.parking import Holds, RefusalCache, replica_for
from sagellm.runtime.messages import Item, Request
from sagellm.runtime.operator import (
    Arrival,
    Emit,
    EmitFirst,
    Input,
    OfferTaken,
    OperatorOutput,
    Step,
    Terminate,
    Wait,
)
from sagellm.runtime.user_code import LEAVING, WrongResult, as_error

_SENDING = frozenset({EmitFirst, Wait, Terminate})  # outputs after which an item is not kept


class Propagation:
    """Runs operators, sends their outputs along edges, and records all changes in the journal.

    `num_replicas`: the current number of replicas of each service operator.
    """

    def __init__(
        self,
        graph: Graph,
        cells: Mapping[str, LogicCell],
        gates: Gates,
        journal: Journal,
        meter: Meter,
        num_replicas: Mapping[str, int],
    ) -> None:
        self.wakes_changed = False
        self._cells = cells
        self._gates = gates
        self._journal = journal
        self._num_replicas = num_replicas
        self._clock = meter.clock
        self._edges: dict[tuple[str, str], tuple[str, str, LogicCell | None, CommittedCount]] = {
            (edge.source, edge.outlet): (
                edge.target,
                edge.inlet,
                cells.get(edge.target),
                meter.edges[edge.source, edge.outlet],
            )
            for edge in graph.edges
            if not edge.feedback
        }
        self.refusals = RefusalCache(graph, cells, gates)
        self.holds = Holds()
        self._output_handlers = Outputs(self, gates, journal, self.refusals, self.holds).by_type

    def run_input(self, cell: LogicCell, happened: Input, now: float) -> bool:
        """Give an operator an input, carry out its outputs, and answer accepted offers.

        Returns False if only the state of the operator has changed.
        """
        outputs = self._run_operator(cell, cell.on, happened, now)
        if type(happened) is Arrival:
            self._send_on(cell, happened.item, outputs, now)
        elif outputs:
            self._carry_out(cell, outputs, now, self._send_separately)
        else:
            return False
        if self._journal.accepted:
            self._answer_offers(now)
        return True

    def _answer_offers(self, now: float) -> None:
        """Give `OfferTaken` to each operator whose offer was accepted."""
        accepted = self._journal.accepted
        while accepted:
            offering, item = accepted.popleft()
            outputs = self._run_operator(offering, offering.on, OfferTaken(item), now)
            self._carry_out(offering, outputs, now, self._send_separately)

    def propagate(self, node: str, item: Item, outlet: str, now: float) -> None:
        """Send an item along the edge from an outlet. Raises NoCredit, OperatorFault."""
        found = self._edges.get((node, outlet))
        if found is None:
            raise self._outlet_error(node, outlet)
        target, inlet, cell, count = found
        journal = self._journal
        journal.counts.append((count, 1))  # not counted now: the transaction may be undone
        # Most nodes do not hold the item: record a change only if this node held it or kept it.
        held = journal.held.get(node)
        if (held and item.request_id in held) or node in journal.keeping:
            journal.held_changes.append((node, item, False))
        if cell is not None:
            outputs = self._run_operator(cell, cell.on, Arrival(item, inlet), now)
            self._send_on(cell, item, outputs, now)
            if journal.accepted:
                self._answer_offers(now)
        elif target == SINK:
            journal.outcomes.append(ReachedSink(item))
        else:
            self._enter(target, item)

    def propagate_batch(self, node: str, items: Sequence[Item], outlet: str, now: float) -> None:
        """Send several items along one edge: in one call, if the operator there has `on_batch`."""
        found = self._edges.get((node, outlet))
        if found is None:
            raise self._outlet_error(node, outlet)
        target, _, cell, count = found
        on_batch = getattr(cell.operator, "on_batch", None) if cell is not None else None
        if cell is not None and on_batch is not None:
            self._journal.counts.append((count, len(items)))
            outputs = self._run_operator(cell, on_batch, items, now)
            self._carry_out(cell, outputs, now, self.propagate)
        elif target == SINK:
            self._journal.counts.append((count, len(items)))
            self._journal.outcomes += map(ReachedSink, items)
        else:
            for item in items:
                self.propagate(node, item, outlet, now)

    def _send_on(
        self, cell: LogicCell, item: Item, outputs: tuple[OperatorOutput, ...], now: float
    ) -> None:
        """Carry out the outputs for an item, and record the item as held if it was not sent on.

        The first branch is a fast path: most operators send the same item on at once.
        """
        if len(outputs) == 1 and type(outputs[0]) is Emit:
            sent = outputs[0].item
            if sent is item or (type(sent) is Request and sent.key == item.key):
                return self.propagate(cell.name, sent, outputs[0].outlet, now)
        elif not (len(outputs) == 1 and type(outputs[0]) in _SENDING):
            self._journal.keep(cell, item)
        self._carry_out(cell, outputs, now, self.propagate)

    def _run_operator(
        self, cell: LogicCell, method: Callable[..., Any], given: Any, now: float
    ) -> tuple[OperatorOutput, ...]:
        """Run one method of an operator, store the new state, and return the outputs.

        The inline checks avoid the call of `check_step` for most answers.
        """
        before, number, draw = cell.state, cell.num_inputs, cell.draw
        self._journal.cells.append((cell, before, number, cell.wake_at))
        begun_s = self._clock()
        try:
            draw.number, draw.count = number, 0
            step = method(before, given, now, draw)
            if (
                type(step) is not Step
                or type(step.outputs) is not tuple
                or step.wake_at is not None
                or (type(given) is Arrival and not step.outputs)
            ):
                check_step(cell.operator, given, step, before)
        except (Exception, *LEAVING) as error:  # users write operators: only a request may fail
            cell.meter.errors.count += 1
            raise OperatorFault(cell.name, as_error(error)) from error
        cell.meter.process_s += self._clock() - begun_s
        cell.state, wake_at = step.state, step.wake_at
        cell.num_inputs = number + 1
        if cell.wake_at != wake_at:
            cell.wake_at, self.wakes_changed = wake_at, True
        return step.outputs  # type: ignore[no-any-return]

    def _carry_out(
        self, cell: LogicCell, outputs: tuple[OperatorOutput, ...], now: float, send: SendItem
    ) -> None:
        try:
            for output in outputs:
                if type(output) is Emit and type(output.item) in ITEMS:
                    send(cell.name, output.item, output.outlet, now)
                    continue
                handle = self._output_handlers.get(type(output))
                if handle is None:
                    raise unknown_output(cell.operator, output)
                handle(cell, output, now, send)
        except WrongResult as error:
            raise OperatorFault(cell.name, error) from None

    def _send_separately(self, node: str, item: Item, outlet: str, now: float) -> None:
        """Send one of the items that an operator kept.

        If an operator downstream fails on the item, only its choice ends; the transaction goes on.
        """
        mark = self._journal.mark()
        try:
            self.propagate(node, item, outlet, now)
        except OperatorFault as fault:
            self._journal.roll_back(mark)
            self._journal.end(item, fault, now)

    def _enter(self, node: str, item: Item) -> None:
        replica = replica_for(item, node, self._num_replicas[node])
        decoder, later = self._gates.reserved.later.get(node), None
        if decoder is not None:
            assert isinstance(item, Request)
            # If no router chose a replica of the decoder, both operators use the same replica of
            # one engine.
            later = CreditGate(decoder, item.placement.get(decoder, replica))
        refusing = self._journal.take(CreditGate(node, replica), item, later)
        if refusing is not None:
            raise NoCredit(*refusing)

    def _outlet_error(self, node: str, outlet: str) -> Exception:
        known = [edge[1] for edge in self._edges if edge[0] == node]
        cell = self._cells.get(node)
        if cell is None:
            return unknown_outlet(None, outlet, known)
        return OperatorFault(node, unknown_outlet(cell.operator, outlet, known))
