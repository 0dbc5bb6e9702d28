"""The `tasks` executor: one graph as trio tasks of one process, in one nursery."""

import heapq
from collections.abc import Callable
from typing import Any

import msgspec
import structlog
import trio

from sagellm.graphs.ir import SOURCE
from sagellm.runtime.executors.credit import Gates
from sagellm.runtime.executors.host import Host
from sagellm.runtime.executors.region import Deliver, Effect, Region, Send, Upstream, ends
from sagellm.runtime.ledger import Ledger
from sagellm.runtime.messages import Forked, Item, Request, TokenEvent, refusal
from sagellm.runtime.operator import Feedback, Signal, Wake
from sagellm.runtime.plan import Plan

log = structlog.get_logger("sagellm.executor")

_USER_OPS = {"map", "filter", "flat_map"}  # they may leave tokens out


class TasksExecutor:
    """Runs a plan. Logic operators run inside the task that feeds them; service operators have
    tasks of their own; every item that reaches the sink is handed to `deliver`, which must not
    wait: what one request may pile up there is bounded by its `max_tokens`.
    """

    def __init__(self, plan: Plan, deliver: Callable[[Item | Forked], None]) -> None:
        self.plan = plan
        self.ledger = Ledger(gaps=any(node.op in _USER_OPS for node in plan.graph.nodes))
        self.gates = Gates()
        self.region = Region(plan.graph, plan.logic, self.gates, plan.replicas, seed=plan.seed)
        self._deliver = deliver
        self._hosts = {
            (node, replica): Host(self, node, replica, service)
            for node, service in plan.services.items()
            for replica in range(plan.replicas[node])
        }
        self._hearers: dict[tuple[str, str], tuple[str, ...]] = {}
        self._num_told: dict[tuple[str, int, str], int] = {}
        self._open: dict[str, int] = {}  # request -> choices without a last event
        self._tombstones: dict[str, Signal] = {}
        self._abandoned: set[tuple[str, int]] = set()
        self._blocked = trio.lowlevel.ParkingLot()
        self._at_rest = trio.lowlevel.ParkingLot()
        self._expiries: list[tuple[float, str]] = []
        self._timer_moved = trio.Event()
        self._is_stopped = False

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled, or until an engine or an operator's task fails."""
        try:
            async with trio.open_nursery() as nursery:
                for engine in (engine for pool in self.plan.engines.values() for engine in pool):
                    nursery.start_soon(engine.run)
                for host in self._hosts.values():
                    host.start(nursery)
                nursery.start_soon(self._keep_time)
                task_status.started()
        finally:
            self._is_stopped = True
            self._at_rest.unpark_all()

    def now(self) -> float:
        return trio.current_time()

    # ---- the border ------------------------------------------------------------------------

    async def submit(self, request: Request) -> None:
        """Let one choice in through `source`; waits only where no operator of the graph queues.

        Cancelled while it waits, the request ends as cancelled.
        """
        self.ledger.accept(request.key, position=len(request.emitted_token_ids))
        self._open[request.request_id] = self._open.get(request.request_id, 0) + 1
        if request.expires_s is not None:
            heapq.heappush(self._expiries, (request.expires_s, request.request_id))
            self._timer_moved.set()
        try:
            await self.push(SOURCE, request)
        except BaseException:
            self.finish(request, "cancelled")
            raise

    def signal(self, signal: Signal) -> None:
        """Deliver a signal to every operator at once; one of an unknown request does nothing."""
        if signal.request_id not in self._open:
            return
        if signal.choice is None:  # else the choice has ended: nothing of it is under way
            self._tombstones.setdefault(signal.request_id, signal)
        for name in self.region.names:
            self._feed(name, signal)
        for host in self._hosts.values():
            host.signal(signal)
        self._blocked.unpark_all()

    async def idle(self) -> None:
        """Wait until every request has ended and left its engine, or the executor has stopped."""
        while (self._open or self._abandoned) and not self._is_stopped:
            await self._at_rest.park()

    # ---- what hosts use --------------------------------------------------------------------

    def tombstone(self, item: Item) -> Signal | None:
        return self._tombstones.get(item.request_id)

    async def push(self, source: str, item: Item, outlet: str = "out") -> None:
        """Send an item along an edge, waiting for credit; a tombstone ends a request instead."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while True:
            signal = self._tombstones.get(item.request_id)
            if signal is not None and isinstance(item, Request):
                return self.finish(item, _reason(signal))
            try:
                effects = self.region.send(source, item, outlet, self.now())
            except Exception as error:  # an operator's own fault must not take the graph down
                log.exception("operator_failed", node=source, request_id=item.request_id)
                return self.fail(item, error)
            if effects is not None:
                return self._apply(effects)
            await self._blocked.park()

    def tell(self, node: str, replica: int, kind: str, value: Any) -> None:
        """Feedback of `node` to the operators that hear it."""
        hearers = self._hearers.get((node, kind))
        if hearers is None:
            hearers = self._hearers[node, kind] = self.plan.hearers(node, kind)
        if not hearers:
            return
        number = self._num_told[node, replica, kind] = (
            self._num_told.get((node, replica, kind), 0) + 1
        )
        feedback = Feedback(node, replica, number, kind, value)
        for name in hearers:
            self._feed(name, feedback)

    def release(self, node: str, replica: int, key: tuple[str, int]) -> None:
        """Return credit, and let those who wait for it try again."""
        if self.gates.give((node, replica), key):
            if key in self._abandoned and not self._is_held(key):
                self._abandoned.discard(key)
                self._at_rest.unpark_all()
            self.tell(node, replica, "credit", None)
            self._blocked.unpark_all()

    def finish(self, item: Item, reason: Any, error: str | None = None) -> None:
        """End a request that holds nothing any more, with the last event that it has not had."""
        request = item if isinstance(item, Request) else getattr(item, "request", None)
        if request is not None:
            self.to_sink(refusal(request, reason, now=self.now(), error=error), terminal=True)
        elif not ends(item) or reason == "failed":
            last = TokenEvent(
                request_id=item.request_id, choice=item.choice, finish_reason=reason, error=error
            )
            self.to_sink(last, terminal=True)

    def fail(self, item: Item, error: Exception) -> None:
        self.finish(item, "failed", f"{type(error).__name__} in the graph; see the log")

    def to_sink(self, item: Item | Forked, *, terminal: bool = False) -> None:
        """Hand an item to the session, and close the books of a choice with its last one."""
        if isinstance(item, Forked):
            num_known = self._open.get(item.request_id, 0)
            self._open[item.request_id] = num_known + item.num_choices - 1
            self.ledger.fork(item)
            return self._deliver(item)
        if item.key in self._abandoned:
            return
        item = self._renamed(item)
        self.ledger.record(item)
        self._deliver(item)
        if ends(item):
            self._close(item, terminal=terminal)

    # ---- inside ----------------------------------------------------------------------------

    def _renamed(self, item: Item) -> Item:
        """An engine calls every end from outside `cancelled`; the signal knows better."""
        signal = self._tombstones.get(item.request_id)
        if signal and signal.kind == "expire" and getattr(item, "finish_reason", "") == "cancelled":
            return msgspec.structs.replace(item, finish_reason="expired")
        return item

    def _close(self, item: Item, *, terminal: bool) -> None:
        if terminal and self._is_held(item.key):
            # It ended outside its engine (a user's function failed): stop the engine too.
            self._abandoned.add(item.key)
            for host in self._hosts.values():
                host.signal(Signal("cancel", item.request_id, item.key[1]))
        self._open[item.request_id] -= 1
        if self._open[item.request_id] == 0:
            del self._open[item.request_id]
            self._tombstones.pop(item.request_id, None)
            for name in self.region.names:
                self._feed(name, Signal("forget", item.request_id))
            if not self._open:
                self._at_rest.unpark_all()

    def _is_held(self, key: tuple[str, int]) -> bool:
        return any(self.gates.holds(gate, key) for gate in self._hosts)

    def _feed(self, node: str, happened: Any) -> None:
        effects = self.region.feed(node, happened, self.now())
        if effects:
            self._apply(effects)
        if self.region.next_wake is not None:
            self._timer_moved.set()

    def _apply(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            match effect:
                case Send(gate, item):
                    self._hosts[gate].put(item)
                case Deliver(item, terminal):
                    self.to_sink(item, terminal=terminal)
                case Upstream(node, kind, value):
                    self.tell(node, 0, kind, value)

    async def _keep_time(self) -> None:
        """Wake operators and expire requests at their time."""
        while True:
            self._timer_moved = trio.Event()
            with trio.move_on_at(self._next_time()):
                await self._timer_moved.wait()
            self._expire_due()
            self._wake_due()

    def _next_time(self) -> float:
        wake = self.region.next_wake
        times = [wake[0]] if wake else []
        times += [self._expiries[0][0]] if self._expiries else []
        return min(times, default=float("inf"))

    def _expire_due(self) -> None:
        while self._expiries and self._expiries[0][0] <= self.now():
            _, request_id = heapq.heappop(self._expiries)
            self.signal(Signal("expire", request_id))

    def _wake_due(self) -> None:
        wake = self.region.next_wake
        if wake and wake[0] <= self.now():
            self._feed(wake[1], Wake())


def _reason(signal: Signal) -> str:
    return "expired" if signal.kind == "expire" else "cancelled"
