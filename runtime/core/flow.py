"""The flow of items into logic operators, and the retry of what found no credit."""

from sagellm.graphs.ir import SOURCE
from sagellm.runtime.core.books import Books, reason_of
from sagellm.runtime.core.credit import NoCredit
from sagellm.runtime.core.effects import Discard, Parked, Resumed
from sagellm.runtime.core.faults import OperatorFault
from sagellm.runtime.core.inputs import Inputs
from sagellm.runtime.core.meter import Meter
from sagellm.runtime.core.parking import ParkedInput, ParkedItems, Parking
from sagellm.runtime.core.region import Region
from sagellm.runtime.core.turn import Turn
from sagellm.runtime.feedback import CreditChanged
from sagellm.runtime.messages import Item, Request, TokenEvent
from sagellm.runtime.user_code import WrongResult


class Flow:
    """Sends what ports and service operators emit; what finds no credit is parked, in order."""

    def __init__(
        self,
        turn: Turn,
        region: Region,
        meter: Meter,
        books: Books,
        parking: Parking,
        inputs: Inputs,
    ) -> None:
        self._turn = turn
        self._region = region
        self._meter = meter
        self._books = books
        self._parking = parking
        self._inputs = inputs

    def emit(
        self, ticket: int, source: str, replica: int, items: tuple[Item, ...], outlet: str = "out"
    ) -> None:
        """Send items in order; the first that finds no credit is parked, with those after it."""
        first = items[0]
        if len(items) > 1:
            if type(first) is TokenEvent and self._send_all(source, replica, items, outlet):
                return
        elif self._send(source, replica, first, outlet) is None:
            return
        request_id = first.request_id if isinstance(first, Request) else None
        entry = ParkedItems(ticket, source, replica, items, outlet, request_id)
        num_sent = self._send_parked(entry)
        if entry.items:
            entry.watches = self._meter.waiting(source, replica, self._region.undone)
            self._parking.add(entry)
            if ticket:
                self._turn.effects.append(Parked(ticket, num_sent))

    def withdraw(self, ticket: int) -> None:
        """Forget what is parked under a ticket; requests that have not entered are cancelled."""
        parked = self._parking.of_ticket(ticket)
        if parked is None:
            return
        self._parking.remove(parked, parked.way)
        if parked.source == SOURCE:
            for item in parked.items:
                self._books.finish(item, "cancelled")

    def retry(self, node: str, replica: int) -> None:
        """A replica has returned credit: try what waits for it, until something finds none."""
        if self._parking.is_empty:
            return
        for way in ((node, replica), (node, None)):
            while (parked := self._parking.first(way)) is not None and self._try(parked):
                pass

    def end_holds(self, node: str, replica: int, request_ids: list[str], num_left: float) -> None:
        """Requests have waited for a replica for long enough. What of them is parked is tried;
        operators that keep requests offer them again, as if its credit had changed.
        """
        credit = CreditChanged(node=node, replica=replica, num_left=num_left)
        self._inputs.report(credit)
        for request_id in request_ids:
            self.retry_request(request_id)

    def retry_all(self) -> None:
        """Ways may have opened: try everything."""
        for parked in self._parking.all:
            self._try(parked)

    def retry_request(self, request_id: str) -> None:
        """Try what of a request is parked: it was signalled, or its hold is over."""
        for parked in self._parking.of_request(request_id):
            self._try(parked)

    def _try(self, parked: ParkedInput | ParkedItems) -> bool:
        """Try what is parked; False where it waits for the same as before."""
        before = parked.way
        if isinstance(parked, ParkedItems):
            num_sent = self._send_parked(parked)
            is_over = not parked.items
            if num_sent and parked.ticket:
                self._turn.effects.append(Resumed(parked.ticket, num_sent))
        else:
            refused = self._inputs.give(parked.node, parked.happened)
            is_over = refused is None
            parked.way = (refused.node, refused.replica) if refused is not None else before
        if is_over:
            self._parking.remove(parked, before)
        elif parked.way != before:
            self._parking.move(parked, before)
        self._inputs.settle()
        return is_over or parked.way != before

    def _send_parked(self, parked: ParkedItems) -> int:
        """Send its items until one finds no credit; how many were sent."""
        num_sent = 0
        for item in parked.items:
            refused = self._send(parked.source, parked.replica, item, parked.outlet)
            if refused is not None:
                parked.way = refused.node, refused.replica
                break
            num_sent += 1
            self._inputs.settle()
        parked.items = parked.items[num_sent:]
        return num_sent

    def _send(self, source: str, replica: int, item: Item, outlet: str) -> NoCredit | None:
        """Send one item; NoCredit, and nothing has changed, where it must wait."""
        register = self._books.register
        if isinstance(item, Request):
            signal = register.tombstone(item.request_id)
            if signal or register.is_over(item.key):
                self._books.finish(item, reason_of(signal))
                return None
        try:
            outcomes = self._region.send(source, item, outlet, self._turn.now)
        except NoCredit as refused:
            return refused
        except Exception as error:  # must not take the graph down
            fault = error if isinstance(error, OperatorFault) else OperatorFault(source, error)
            self._books.fail(fault, item)
            if source != SOURCE:
                self._turn.effects.append(Discard(source, replica, item))
            return None
        self._meter.sent(source, replica)
        self._inputs.apply(outcomes)
        return None

    def _send_all(self, source: str, replica: int, items: tuple[Item, ...], outlet: str) -> bool:
        """Send all items at once; False, and nothing has changed, where one of them cannot be."""
        try:
            outcomes = self._region.send_all(source, items, outlet, self._turn.now)
        except (NoCredit, OperatorFault, WrongResult):
            return False
        self._meter.sent(source, replica, len(items))
        self._inputs.apply(outcomes)
        self._inputs.settle()
        return True
