"""The flow of items: first tries, retries of parked items, and the re-entry of lost requests."""

from msgspec.structs import replace

from sagellm.graphs.ir import SOURCE
from sagellm.runtime.core.accounting import Meter
from sagellm.runtime.core.credit import NoCredit
from sagellm.runtime.core.effects import Discard, FailedOn, OperatorFault, Parked, Reaction, Resumed
from sagellm.runtime.core.events import EngineFailed, Returned
from sagellm.runtime.core.inputs import InputQueue
from sagellm.runtime.core.logic_graph import LogicGraph
from sagellm.runtime.core.parking import BlockedAt, ParkedInput, ParkedItems, Parking
from sagellm.runtime.core.request_lifecycle import (
    RequestLifecycle,
    quarantined_event,
    reason_of,
    retries_spent_event,
)
from sagellm.runtime.feedback import CreditChanged
from sagellm.runtime.messages import (
    WOULD_WAIT,
    EngineReplica,
    Item,
    Request,
    TokenEvent,
    refusal,
)
from sagellm.runtime.operator import Arrival, Signal
from sagellm.runtime.plan import Plan
from sagellm.runtime.user_code import WrongResult


class Flow:
    """Sends items from the source and from service operators along the edges of the graph.

    Items without credit are parked in order, and retried when credit returns.
    """

    def __init__(
        self,
        reaction: Reaction,
        logic_graph: LogicGraph,
        meter: Meter,
        lifecycle: RequestLifecycle,
        parking: Parking,
        inputs: InputQueue,
    ) -> None:
        self._reaction = reaction
        self._logic_graph = logic_graph
        self._meter = meter
        self._lifecycle = lifecycle
        self._parking = parking
        self._inputs = inputs

    def emit(
        self, ticket: int, source: str, replica: int, items: tuple[Item, ...], outlet: str = "out"
    ) -> None:
        """Send items in order. The first item without credit is parked with all later items.

        If items are parked, the effect `Parked` with `ticket` is recorded; ticket 0 records none.
        """
        first = items[0]
        if len(items) > 1:
            # The events of one engine step: one transaction is cheaper than one for each event.
            if type(first) is TokenEvent and self._send_all(source, replica, items, outlet):
                return
        elif self._send(source, replica, first, outlet) is None:
            return
        request_id = first.request_id if isinstance(first, Request) else None
        entry = ParkedItems(ticket, source, replica, items, outlet, request_id)
        num_sent = self._send_parked(entry)
        if entry.items:
            entry.watches = self._meter.waiting(source, replica, self._logic_graph.undone)
            self._parking.add(entry)
            if ticket:
                self._reaction.effects.append(Parked(ticket, num_sent))

    def withdraw(self, ticket: int) -> None:
        """Drop the parked items of a ticket. Requests among them that come from the source end as
        cancelled.
        """
        parked = self._parking.of_ticket(ticket)
        if parked is None:
            return
        self._parking.remove(parked, parked.blocked_at)
        if parked.source == SOURCE:
            for item in parked.items:
                self._lifecycle.finish(item, "cancelled")

    def retry(self, node: str, replica: int) -> None:
        """Retry the entries that wait for a replica in order, until an entry stays blocked."""
        if self._parking.is_empty:
            return
        for gate in (BlockedAt(node, replica), BlockedAt(node, None)):
            while (parked := self._parking.first(gate)) is not None and self._try(parked):
                pass

    def end_holds(self, node: str, replica: int, request_ids: list[str], num_left: float) -> None:
        """End the holds of requests that waited for one replica although others had room.

        Retries their parked inputs. Reports a change of credit, so that operators that keep
        requests offer them again.
        """
        credit = CreditChanged(node=node, replica=replica, num_left=num_left)
        self._inputs.report(credit)
        for request_id in request_ids:
            self.retry_request(request_id)

    def retry_all(self) -> None:
        """Retry all parked entries; for changes that may have opened any gate."""
        for parked in self._parking.all:
            self._try(parked)

    def retry_request(self, request_id: str) -> None:
        """Retry the parked entries of a request after a signal, or after the end of its hold."""
        for parked in self._parking.of_request(request_id):
            self._try(parked)

    def _try(self, parked: ParkedInput | ParkedItems) -> bool:
        """Retry a parked entry. Returns False if it is blocked at the same gate as before."""
        before = parked.blocked_at
        if isinstance(parked, ParkedItems):
            num_sent = self._send_parked(parked)
            is_over = not parked.items
            if num_sent and parked.ticket:
                self._reaction.effects.append(Resumed(parked.ticket, num_sent))
        else:
            refused = self._inputs.give(parked.node, parked.happened)
            is_over = refused is None
            if refused is not None:
                parked.blocked_at = BlockedAt(refused.node, refused.replica)
        if is_over:
            self._parking.remove(parked, before)
        elif parked.blocked_at != before:
            self._parking.move(parked, before)
        self._inputs.settle()
        return is_over or parked.blocked_at != before

    def _send_parked(self, parked: ParkedItems) -> int:
        """Send parked items until an item has no credit. Returns how many were sent."""
        num_sent = 0
        for item in parked.items:
            refused = self._send(parked.source, parked.replica, item, parked.outlet)
            if refused is not None:
                parked.blocked_at = BlockedAt(refused.node, refused.replica)
                break
            num_sent += 1
            self._inputs.settle()
        parked.items = parked.items[num_sent:]
        return num_sent

    def _send(self, source: str, replica: int, item: Item, outlet: str) -> NoCredit | None:
        """Send one item. Returns NoCredit if the item has no credit; then nothing has changed."""
        register = self._lifecycle.register
        if isinstance(item, Request):
            signal = register.tombstone(item.request_id)
            if signal or register.is_over(item.key):  # the signal overtook the request
                self._lifecycle.finish(item, reason_of(signal))
                return None
        try:
            outcomes = self._logic_graph.send(source, item, outlet, self._reaction.now)
        except NoCredit as refused:
            if not isinstance(item, Request) or not item.is_impatient:
                return refused
            self._lifecycle.end(_would_wait_event(item, self._reaction.now), None)
            if source != SOURCE:
                self._reaction.effects.append(Discard(source, replica, item))
            return None
        except Exception as error:  # an operator's fault must not stop the graph
            fault = error if isinstance(error, OperatorFault) else OperatorFault(source, error)
            self._lifecycle.fail(fault, item)
            if source != SOURCE:  # only items of service operators hold resources
                self._reaction.effects.append(Discard(source, replica, item))
            return None
        self._meter.sent(source, replica)
        self._inputs.apply(outcomes)
        return None

    def _send_all(self, source: str, replica: int, items: tuple[Item, ...], outlet: str) -> bool:
        """Send all items in one transaction. Returns False if that fails; nothing has changed then.

        The caller then sends the items one by one, so that a fault ends its own request only.
        """
        try:
            outcomes = self._logic_graph.send_all(source, items, outlet, self._reaction.now)
        except (NoCredit, OperatorFault, WrongResult):
            return False
        self._meter.sent(source, replica, len(items))
        self._inputs.apply(outcomes)
        self._inputs.settle()
        return True


def _would_wait_event(request: Request, now: float) -> TokenEvent:
    """The last event of a request that would be parked, and does not want to wait."""
    return refusal(
        request, "refused", now=now, error=WOULD_WAIT, code="would_wait", retry_after_s=_RETRY_S
    )


_RETRY_S = 1.0  # the wait of parked requests is unknown
_MAX_REPLICAS = 2  # other replicas that are tried after an engine failed on a request


class Reentry:
    """Lets requests enter again, or ends them, after their engine was lost or failed on them."""

    def __init__(
        self,
        plan: Plan,
        reaction: Reaction,
        lifecycle: RequestLifecycle,
        inputs: InputQueue,
        flow: Flow,
    ) -> None:
        self._plan = plan
        self._reaction = reaction
        self._lifecycle = lifecycle
        self._inputs = inputs
        self._flow = flow
        self._recovery = lifecycle.recovery

    def enter_again(self, returned: Returned) -> None:
        """Handle a request whose engine was lost: let it resume if `Recovery` allows it.

        `Recovery` may also keep the request for a trial. Otherwise the request ends.
        """
        request, lifecycle = returned.request, self._lifecycle
        if lifecycle.register.tombstone(request.request_id) or not lifecycle.register.is_open(
            request.key
        ):
            lifecycle.finish(request)
            return
        verdict = self._recovery.judge(returned.node, request, returned.cause)
        if verdict == "now":
            self._enter(returned.node, request)
        elif verdict == "never":
            lifecycle.end(quarantined_event(request, self._reaction.now), None)
        elif verdict == "spent":
            lifecycle.end(retries_spent_event(request, self._reaction.now), None)

    def fail_over(self, failed: EngineFailed, engine: str, num_present: int) -> None:
        """After an engine failed on a request, send the request to a replica that has not tried it.

        If no such replica is present, or `_MAX_REPLICAS` others were tried, the request ends.
        """
        request, lifecycle = failed.request, self._lifecycle
        replica = EngineReplica(engine, failed.replica)
        error = failed.last.error or ""
        self._reaction.effects.append(FailedOn(*replica, request.request_id, error))
        if lifecycle.register.tombstone(request.request_id) or not lifecycle.register.is_open(
            request.key
        ):
            lifecycle.finish(request)
            return
        avoid = dict.fromkeys((*request.avoid, replica))
        if sum(name == engine for name, _ in avoid) < min(num_present, _MAX_REPLICAS + 1):
            self._enter(failed.node, replace(request, avoid=tuple(avoid)))
        else:
            lifecycle.end(failed.last, None)

    def try_next(self) -> None:
        """Let the next request on trial enter, unless another request is on trial."""
        while (due := self._recovery.next()) is not None:
            self._enter(*due)
            self._inputs.settle()

    def end_waiting(self, signal: Signal) -> None:
        """End the requests that wait for their trial and that a signal concerns."""
        for request in self._recovery.drop(signal.concerns):
            self._lifecycle.finish(request)

    def end_unserved(self, max_hold_s: float) -> None:
        """End the requests that have waited for an engine without replicas for `max_hold_s`."""
        now, lifecycle = self._reaction.now, self._lifecycle
        for request_id, entry in tuple(lifecycle.register.entries.items()):
            for choice in sorted(entry.choices):
                since_s = self._recovery.lost_s((request_id, choice)) or entry.arrived_s
                # A choice that a service operator holds is being served, and does not wait.
                if now - since_s >= max_hold_s and not lifecycle.is_held(request_id, choice):
                    entry.unavailable.add(choice)
                    signal = Signal("cancel", request_id, choice)
                    self.end_waiting(signal)
                    self._inputs.signal(signal)
                    lifecycle.interrupt(signal)
                    self._flow.retry_request(request_id)

    def _enter(self, node: str, request: Request) -> None:
        self._recovery.num_migrated += 1
        # The new epoch makes leases and late events of the lost engine invalid.
        again = replace(request, epoch=request.epoch + 1, placement={}, num_cached_tokens=0)
        entrance = self._plan.entrance(node)
        if isinstance(entrance, str):
            self._inputs.feed(entrance, Arrival(again))
        else:
            self._flow.emit(0, entrance.source, 0, (again,), entrance.outlet)
