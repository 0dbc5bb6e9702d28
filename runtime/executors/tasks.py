"""The `tasks` executor: one graph as trio tasks of one process, in one nursery."""

from collections.abc import Callable, Sequence
from math import inf
from typing import Any

import msgspec
import trio

from sagellm.graphs.ir import SOURCE
from sagellm.runtime.engine.port import Engine
from sagellm.runtime.executors.absence import Absence
from sagellm.runtime.executors.credit import Gates
from sagellm.runtime.executors.faults import OperatorFault, log_fault
from sagellm.runtime.executors.host import Host
from sagellm.runtime.executors.meter import Meter, Stopwatch
from sagellm.runtime.executors.outliers import Outliers, Replica
from sagellm.runtime.executors.reading import Reading, read
from sagellm.runtime.executors.recovery import Recovery
from sagellm.runtime.executors.region import Deliver, Effect, Region, Send, Upstream, ends
from sagellm.runtime.executors.register import Register
from sagellm.runtime.ledger import Ledger
from sagellm.runtime.messages import (
    Answer,
    FinishReason,
    Forked,
    Item,
    Request,
    TokenEvent,
    refusal,
)
from sagellm.runtime.operator import Arrival, Feedback, Input, Signal, Wake
from sagellm.runtime.plan import Plan
from sagellm.runtime.user_function import ending, failing

_NO_ENGINE = "no engine is there to serve it: try again later"
_USER_OPS = {"map", "filter", "flat_map"}  # they may leave tokens out


class ExecutorStopped(RuntimeError):
    """A request for a graph that runs no more."""

    def __init__(self) -> None:
        super().__init__("the graph has stopped; open it again")


class TasksExecutor:
    """Runs a plan. Logic operators run inside the task that feeds them; service operators have
    tasks of their own; every item that reaches the sink is handed to `deliver`, which must not
    wait: what one request may pile up there is bounded by its `max_tokens`.
    """

    def __init__(
        self,
        plan: Plan,
        deliver: Callable[[Item | Forked], None],
        *,
        max_hold_s: float = inf,
    ) -> None:
        self.plan = plan
        self.ledger = Ledger(gaps=any(node.op in _USER_OPS for node in plan.graph.nodes))
        self.gates = Gates()
        clock = trio.lowlevel.current_clock().current_time
        self.meter = Meter(plan.graph, plan.logic, plan.replicas, clock)
        self.register = Register()
        self.region = Region(
            plan.graph,
            plan.logic,
            self.gates,
            plan.replicas,
            seed=plan.seed,
            meter=self.meter,
            entries=self.register.entries,
        )
        self._deliver = deliver
        self._hosts = {
            (node, replica): Host(self, node, replica, service)
            for node, service in plan.services.items()
            for replica in range(plan.replicas[node])
        }
        self._hearers: dict[tuple[str, str], tuple[str, ...]] = {}
        self._num_told: dict[tuple[str, int, str], int] = {}
        # Inputs that found no credit, and are tried again; what times how long operators wait.
        self._undone: list[tuple[str, Input, list[Stopwatch]]] = []
        self._blocked = trio.lowlevel.ParkingLot()
        self._at_rest = trio.lowlevel.ParkingLot()
        self._sleeps_until = inf
        self._timer_moved = trio.Event()
        self._nursery: trio.Nursery | None = None
        self.absence = Absence(plan, max_hold_s)
        self.recovery = Recovery(self.now)
        self.outliers = Outliers(self.absence, self.now, self._tell_health)
        self._is_stopped = False

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled, or until an engine or an operator's task fails.

        What is open then ends as failed, so that nobody waits for it.
        """
        try:
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                for engine in self.plan.all_engines:
                    nursery.start_soon(engine.run)
                for host in self._hosts.values():
                    host.start(nursery)
                nursery.start_soon(self._keep_time)
                task_status.started()
        finally:
            self._is_stopped = True
            self._fail_open()
            self._at_rest.unpark_all()
            self._blocked.unpark_all()

    def now(self) -> float:
        return trio.current_time()

    # ---- the border ------------------------------------------------------------------------

    @property
    def is_stopped(self) -> bool:
        return self._is_stopped

    async def submit(self, *choices: Request) -> None:
        """Let all choices of one request in through `source`.

        Waits only where no operator of the graph queues; cancelled there, what has not entered
        ends as cancelled. Raises ExecutorStopped, and ValueError where the request is known.
        """
        first = choices[0]
        if self._is_stopped:
            raise ExecutorStopped
        if first.request_id in self.register:
            raise ValueError(f"request {first.request_id!r} is running already")
        numbers = {request.choice for request in choices}
        self.register.open(first.request_id, numbers, first.expires_s, now=self.now())
        for request in choices:
            self.ledger.accept(request.key, position=len(request.emitted_token_ids))
        self._set_timer()
        await self._enter(choices)

    def signal(self, signal: Signal) -> None:
        """Deliver a signal to every operator at once; one of an unknown request does nothing."""
        if signal.request_id not in self.register.entries:
            return
        self.register.bury(signal)
        for request in self.recovery.drop(signal.concerns):
            self.finish(request, _reason(signal))
        self._spread(signal)
        self._try_again()

    async def idle(self) -> None:
        """Wait until all requests have ended and every block is free, or the executor stops."""
        while not self.register.is_empty and not self._is_stopped:
            await self._at_rest.park()
        for engine in self.plan.all_engines:
            await engine.idle()

    def reading(self) -> Reading:
        """What operators and edges have done so far."""
        waiting = {gate: host.num_waiting for gate, host in self._hosts.items()}
        return read(self.meter, self.plan, self.gates, waiting)

    # ---- what hosts use --------------------------------------------------------------------

    def tombstone(self, item: Item) -> Signal | None:
        return self.register.tombstone(item.request_id)

    async def push(self, source: str, item: Item, outlet: str = "out", *, replica: int = 0) -> bool:
        """Send an item along an edge, waiting for credit; a tombstone ends a request instead.

        False where an operator raised: the item has ended as failed, and is the caller's to free.
        """
        await trio.lowlevel.checkpoint_if_cancelled()
        while (sent := self.try_push(source, item, outlet, replica=replica)) is None:
            with self.meter.waiting(source, replica, self.region.undone):
                await self._blocked.park()
        return sent

    def try_push(
        self, source: str, item: Item, outlet: str = "out", *, replica: int = 0
    ) -> bool | None:
        """As `push`; None where there is no credit, and then nothing has changed."""
        if isinstance(item, Request):
            signal = self.tombstone(item)
            if signal or self.register.is_over(item.key):
                self.finish(item, _reason(signal))
                return True
        try:
            effects = self.region.send(source, item, outlet, self.now())
        except OperatorFault as fault:  # must not take the graph down
            self.fail(fault.node, item, fault.error)
            return False
        except Exception as error:
            self.fail(source, item, error)
            return False
        if effects is None:
            return None
        self.meter.sent(source, replica)
        self._apply(effects)
        return True

    def tell(self, node: str, replica: int, kind: str, value: Any) -> None:
        """Feedback of `node` to the operators that hear it."""
        if kind == "queue":
            self.meter.queue(node, value)
        hearers = self._hearers.get((node, kind))
        if hearers is None:
            hearers = self._hearers[node, kind] = self.plan.hearers(node, kind)
        if not hearers:
            return
        number = self._num_told.get((node, replica, kind), 0) + 1
        self._num_told[node, replica, kind] = number
        for name in hearers:
            self._feed(name, Feedback(node, replica, number, kind, value))

    def release(self, node: str, replica: int, key: tuple[str, int]) -> None:
        """Return credit, and let those who wait for it try again."""
        if not self.gates.give((node, replica), key):
            return
        self.meter.services[node, replica].held.leave()
        if key in self.register.abandoned and not self._is_held(key):
            self.register.abandoned.discard(key)
            self._at_rest.unpark_all()
        self.tell(node, replica, "credit", None)
        self._try_again()

    def finish(self, item: Item, reason: FinishReason, error: str | None = None) -> None:
        """Give the choice its last event, unless it has had it."""
        self.to_sink(ending(item, reason, now=self.now(), error=error), terminal=True)

    def fail(self, node: str, item: Item, error: Exception) -> None:
        """End a choice as failed by what the operator `node` raised, which is logged."""
        fault = OperatorFault(node, error)
        log_fault(fault, request_id=item.request_id)
        event = failing(item, fault.public, now=self.now())
        self._end(event, fault)

    def end(self, event: TokenEvent, fault: OperatorFault | None) -> None:
        """Give a choice its last event; log the fault that ended it, unless it had ended before."""
        if fault is not None and self.register.is_open(event.key):
            log_fault(fault, request_id=event.request_id)
        self._end(event, fault)

    def _end(self, event: TokenEvent, fault: OperatorFault | None) -> None:
        entry = self.register.entries.get(event.request_id)
        if fault is not None and entry is not None:
            entry.causes.setdefault(event.choice, fault.error)
        self.to_sink(event, terminal=True)

    def reenter(self, node: str, request: Request, *, was_computed: bool) -> None:
        """Send in again a request whose engine was lost, behind what it has emitted already."""
        signal = self.tombstone(request)
        if signal or not self.register.is_open(request.key):
            self.finish(request, _reason(signal))
            return
        verdict = self.recovery.judge(node, request, was_computed=was_computed)
        if verdict == "now":
            self._enter_again(node, request)
        elif verdict == "never":
            self.to_sink(_quarantined(request, self.now()), terminal=True)
        elif verdict == "spent":
            self.to_sink(_spent(request, self.now()), terminal=True)
        self._try_next()

    def _enter_again(self, node: str, request: Request) -> None:
        self.recovery.num_migrated += 1
        again = msgspec.structs.replace(
            request, epoch=request.epoch + 1, placement={}, num_cached_tokens=0
        )
        entrance = self.plan.entrance(node)
        if isinstance(entrance, str):
            self._feed(entrance, Arrival(again))
        else:
            assert self._nursery is not None
            self._nursery.start_soon(self.push, entrance.source, again, entrance.outlet)

    def _try_next(self) -> None:
        """The next of the requests that are tried one at a time, if it is its turn."""
        while (due := self.recovery.next()) is not None:
            self._enter_again(*due)

    def add(self, name: str, engine: Engine) -> None:
        """One more replica of an engine that is routed to; nothing reaches it before `mark`."""
        assert self._nursery is not None
        replica = self.plan.add(name, engine)
        self._nursery.start_soon(engine.run)
        for node in self.plan.nodes_of(name):
            self.meter.add(node, replica)
            host = Host(self, node, replica, self.plan.services[node])
            self._hosts[node, replica] = host
            host.start(self._nursery)

    def is_routed(self, engine: str) -> bool:
        return self.plan.is_routed(engine)

    def mark(self, engine: str, replica: int, *, is_up: bool) -> None:
        """A replica of an engine is lost, or is back: shut the ways to it, or open them."""
        self.absence.mark(engine, replica, self.now(), is_up=is_up)
        self._shut_gates()
        self.outliers.forget((engine, replica))
        self._tell_health((engine, replica), is_up)
        self._try_again()
        self._set_timer()

    def _tell_health(self, replica: Replica, is_up: bool) -> None:
        """To those who choose. One that is lost is never told to be up."""
        engine, number = replica
        is_up = is_up and not self.absence.is_lost(replica)
        for node in self.plan.nodes_of(engine):
            self.tell(node, number, "health", is_up)

    def remove(self, engine: str, replica: int) -> None:
        """A replica that was lost is not to come back: what was placed there finds out, and is
        placed anew.
        """
        self.absence.remove(engine, replica)
        self._shut_gates()
        for node in self.plan.nodes_of(engine):
            self.tell(node, replica, "removed", None)
        self._try_again()

    def _shut_gates(self) -> None:
        self.gates.shut, self.gates.locked = self.absence.shut, self.absence.locked

    def to_sink(self, item: Item | Forked, *, terminal: bool = False) -> None:
        """Hand an item to the session, and close the books of a choice with its last one.

        What comes behind the last one is dropped: a choice may end outside its engine.
        """
        if isinstance(item, Forked):
            self._fork(item)
        elif self.register.is_open(item.key):
            item = self._renamed(item)
            self.ledger.record(item)
            self._deliver(item)
            if self.recovery.is_under_way:
                self.recovery.note(item)
                self._try_next()
            if ends(item):
                self._close(item, terminal=terminal)

    # ---- inside ----------------------------------------------------------------------------

    async def _enter(self, choices: Sequence[Request]) -> None:
        try:
            for request in choices:
                refused = self._unfit(request)
                if refused is None:
                    await self.push(SOURCE, request)
                else:
                    self.to_sink(refused, terminal=True)
        except BaseException:
            for request in choices:  # those that went in end by the signal, the others here
                self.signal(Signal("cancel", request.request_id))
                self.finish(request, "cancelled")
            raise

    def _unfit(self, request: Request) -> TokenEvent | None:
        """Why a request is not let in, whatever the operators would say."""
        if self.recovery.is_blocked(request):
            return _quarantined(request, self.now())
        if self.absence.is_cut:
            return _unavailable(request, self.now())
        return None

    def _fork(self, forked: Forked) -> None:
        entry = self.register.entries.get(forked.request_id)
        if entry is not None:
            entry.choices |= set(range(forked.num_choices))
            self.ledger.fork(forked)
            self._deliver(forked)

    def _renamed(self, item: Item) -> Item:
        """An engine calls every end from outside `cancelled`; the signal knows better."""
        if not isinstance(item, TokenEvent | Answer) or item.finish_reason != "cancelled":
            return item
        entry = self.register.entries[item.request_id]
        if item.choice in entry.unavailable:
            return msgspec.structs.replace(
                item, finish_reason="refused", error=_NO_ENGINE, code="unavailable"
            )
        signal = self.tombstone(item)
        if signal and signal.kind == "expire":
            return msgspec.structs.replace(item, finish_reason="expired")
        return item

    def _close(self, item: Item, *, terminal: bool) -> None:
        is_last = self.register.close(item.key)
        self.region.holdings.forget(item.request_id, None if is_last else item.choice)
        self.recovery.forget(item.key)
        if terminal and self._is_held(item.key):
            # It ended outside its engine (a user's function failed): stop the engine too.
            self.register.abandoned.add(item.key)
            for host in self._hosts.values():
                host.signal(Signal("cancel", item.request_id, item.key[1]))
        if is_last:
            for name in self.region.names:
                self._feed(name, Signal("forget", item.request_id))
        if self.register.is_empty:
            self._at_rest.unpark_all()

    def _fail_open(self) -> None:
        for request_id, entry in tuple(self.register.entries.items()):
            for choice in sorted(entry.choices):
                error = "the graph stopped before this request ended"
                last = TokenEvent(
                    request_id=request_id, choice=choice, finish_reason="failed", error=error
                )
                self.ledger.record(last)
                self._deliver(last)
        self.register.entries.clear()

    def _is_held(self, key: tuple[str, int]) -> bool:
        return any(self.gates.holds(gate, key) for gate in self._hosts)

    def _spread(self, signal: Signal) -> None:
        for name in self.region.names:
            self._feed(name, signal)
        for host in self._hosts.values():
            host.signal(signal)

    def _feed(self, node: str, happened: Input) -> None:
        """Give an operator what happened; its faults are logged, not raised, and end what it holds
        where nothing else would.
        """
        try:
            effects = self.region.feed(node, happened, self.now())
        except Exception as error:
            fault = error if isinstance(error, OperatorFault) else OperatorFault(node, error)
            self._end_by_fault(node, happened, fault)
            return
        if effects is None:
            watches = self.meter.blocked_watches(self.region.undone)
            for watch in watches:
                watch.enter()
            self._undone.append((node, happened, watches))
            return
        self._apply(effects)
        if isinstance(happened, Wake) and (lost := self.region.lost(node)) is not None:
            self._end_by_fault(node, happened, OperatorFault(node, lost))

    def _end_by_fault(self, node: str, happened: Input, fault: OperatorFault) -> None:
        """A signal and an item concern one request. What else an operator fails on may be what all
        that it holds waited for: unless a wake-up is to come, all of it ends.
        """
        log_fault(fault, request_id=getattr(happened, "request_id", ""))
        held = self.region.holdings.of(node)
        match happened:
            case Arrival(item):
                self._end(failing(item, fault.public, now=self.now()), fault)
            case Signal() as signal:
                for item in held:
                    if signal.concerns(item.key):
                        self.finish(item, _reason(signal))
            case _ if not self._is_to_wake(node):
                self.region.restart(node)
                for item in held:
                    self._end(failing(item, fault.public, now=self.now()), fault)

    def _is_to_wake(self, node: str) -> bool:
        """Whether a wake-up of the operator is to come, or to be tried again."""
        is_undone = any(name == node and isinstance(what, Wake) for name, what, _ in self._undone)
        return is_undone or self.region.is_waiting(node)

    def _try_again(self) -> None:
        undone, self._undone = self._undone, []
        for node, happened, watches in undone:
            for watch in watches:
                watch.leave()
            self._feed(node, happened)
        self._blocked.unpark_all()

    def _apply(self, effects: tuple[Effect, ...]) -> None:
        for effect in effects:
            match effect:
                case Send(gate, item):
                    self._hosts[gate].put(item)
                case Deliver(TokenEvent() as event, _, OperatorFault() as fault):
                    self.end(event, fault)
                case Deliver(item, terminal):
                    self.to_sink(item, terminal=terminal)
                case Upstream(node, kind, value):
                    self.tell(node, 0, kind, value)
        self._set_timer()

    def _set_timer(self) -> None:
        if self._next_time() < self._sleeps_until:
            self._timer_moved.set()

    def _next_time(self) -> float:
        wake, expiry = self.region.next_wake, self.register.next_expiry
        at = min(self.absence.next_end_s, self.outliers.next_end_s)
        at = at if wake is None else min(at, wake[0])
        return at if expiry is None else min(at, expiry)

    async def _keep_time(self) -> None:
        """Wake operators and expire requests at their time."""
        while True:
            self._timer_moved = trio.Event()
            self._sleeps_until = self._next_time()
            with trio.move_on_at(self._sleeps_until):
                await self._timer_moved.wait()
            for request_id in self.register.take_expired(self.now()):
                self.signal(Signal("expire", request_id))
            self._wake_due()
            self._end_hold()
            self.outliers.readmit_due()

    def _end_hold(self) -> None:
        """What has waited long enough for an engine of which no replica is there ends."""
        now = self.now()
        if not self.absence.take_due(now):
            return
        for request_id, entry in tuple(self.register.entries.items()):
            for choice in tuple(entry.choices):
                key = request_id, choice
                since_s = self.recovery.lost_s(key) or entry.arrived_s
                if not self._is_held(key) and now - since_s >= self.absence.max_hold_s:
                    entry.unavailable.add(choice)
                    self._end_waiting(request_id, choice)
        self._try_again()

    def _end_waiting(self, request_id: str, choice: int) -> None:
        """Wherever it waits; who is asked to end it says `cancelled`, and `_renamed` why."""
        signal = Signal("cancel", request_id, choice)
        for request in self.recovery.drop(signal.concerns):
            self.finish(request, "cancelled")
        self._spread(signal)

    def _wake_due(self) -> None:
        wake = self.region.next_wake
        if wake and wake[0] <= self.now():
            self.region.forget_wake(wake[1])
            self._feed(wake[1], Wake())


def _unavailable(request: Request, now: float) -> TokenEvent:
    return refusal(request, "refused", now=now, error=_NO_ENGINE, code="unavailable")


def _quarantined(request: Request, now: float) -> TokenEvent:
    error = "engines died of this request, or of its like: it is not tried again"
    return refusal(request, "failed", now=now, error=error, code="request_quarantined")


def _spent(request: Request, now: float) -> TokenEvent:
    error = "engines, or the links between them, failed too often: try again later"
    return refusal(request, "failed", now=now, error=error, code="engine_failed")


def _reason(signal: Signal | None) -> FinishReason:
    return "expired" if signal and signal.kind == "expire" else "cancelled"
