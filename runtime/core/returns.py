"""Requests whose engine was lost: they enter again, or end."""

from msgspec.structs import replace

from sagellm.runtime.core.books import Books, quarantined, spent
from sagellm.runtime.core.effects import FailedOn
from sagellm.runtime.core.events import EngineFailed, Returned
from sagellm.runtime.core.flow import Flow
from sagellm.runtime.core.inputs import Inputs
from sagellm.runtime.core.turn import Turn
from sagellm.runtime.messages import Request
from sagellm.runtime.operator import Arrival, Signal
from sagellm.runtime.plan import Plan

_MOST_REPLICAS = 2  # that a request is tried on, where engines fail on it


class Returns:
    """Does what `Recovery` decides."""

    def __init__(self, plan: Plan, turn: Turn, books: Books, inputs: Inputs, flow: Flow) -> None:
        self._plan = plan
        self._turn = turn
        self._books = books
        self._inputs = inputs
        self._flow = flow
        self._recovery = books.recovery

    def enter_again(self, returned: Returned) -> None:
        """Send a request in again, after what it has emitted already, if that helps."""
        request, books = returned.request, self._books
        if books.register.tombstone(request.request_id) or not books.register.is_open(request.key):
            books.finish(request)
            return
        verdict = self._recovery.judge(returned.node, request, returned.cause)
        if verdict == "now":
            self._enter(returned.node, request)
        elif verdict == "never":
            books.end(quarantined(request, self._turn.now), None)
        elif verdict == "spent":
            books.end(spent(request, self._turn.now), None)

    def fail_over(self, failed: EngineFailed, engine: str, num_present: int) -> None:
        """Send a request that an engine failed on to another replica, if there is one it has not
        met; end it otherwise.
        """
        request, books = failed.request, self._books
        replica = engine, failed.replica
        error = failed.last.error or ""
        self._turn.effects.append(FailedOn(*replica, request.request_id, error))
        if books.register.tombstone(request.request_id) or not books.register.is_open(request.key):
            books.finish(request)
            return
        avoid = dict.fromkeys((*request.avoid, replica))
        if sum(name == engine for name, _ in avoid) < min(num_present, _MOST_REPLICAS + 1):
            self._enter(failed.node, replace(request, avoid=tuple(avoid)))
        else:
            books.end(failed.last, None)

    def try_next(self) -> None:
        """Send the next of the requests that are tried one at a time, if it is its turn."""
        while (due := self._recovery.next()) is not None:
            self._enter(*due)
            self._inputs.settle()

    def end_waiting(self, signal: Signal) -> None:
        """End what waits to be tried."""
        for request in self._recovery.drop(signal.concerns):
            self._books.finish(request)

    def end_unserved(self, max_hold_s: float) -> None:
        """End what has waited long enough for an engine of which no replica is there."""
        now, books = self._turn.now, self._books
        for request_id, entry in tuple(books.register.entries.items()):
            for choice in sorted(entry.choices):
                since_s = self._recovery.lost_s((request_id, choice)) or entry.arrived_s
                if now - since_s >= max_hold_s and not books.is_held(request_id, choice):
                    entry.unavailable.add(choice)
                    signal = Signal("cancel", request_id, choice)
                    self.end_waiting(signal)
                    self._inputs.signal(signal)
                    books.interrupt(signal)
                    self._flow.retry_request(request_id)

    def _enter(self, node: str, request: Request) -> None:
        self._recovery.num_migrated += 1
        again = replace(request, epoch=request.epoch + 1, placement={}, num_cached_tokens=0)
        entrance = self._plan.entrance(node)
        if isinstance(entrance, str):
            self._inputs.feed(entrance, Arrival(again))
        else:
            self._flow.emit(0, entrance.source, 0, (again,), entrance.outlet)
