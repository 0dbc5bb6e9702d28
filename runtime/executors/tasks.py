"""The `tasks` executor: runs one graph as trio tasks of one process, in one nursery."""

from collections.abc import Callable, Mapping
from math import inf

import trio

from sagellm.runtime.core.effects import WakeAt
from sagellm.runtime.core.events import Arrived, Event, Signalled, Stopped, TimeCame
from sagellm.runtime.executors.shell import RecordDecision, Shell
from sagellm.runtime.executors.waits import TrioWaits
from sagellm.runtime.messages import Forked, Item, Request
from sagellm.runtime.operator import Signal
from sagellm.runtime.plan import Plan
from sagellm.runtime.port import Engine


class Timer:
    """Dispatches `TimeCame` at the time of the latest `WakeAt`."""

    def __init__(self, dispatch: Callable[[Event], None]) -> None:
        self._dispatch = dispatch
        self._at_s = inf
        self._moved = trio.Event()

    def set(self, effect: WakeAt) -> None:
        self._at_s = effect.at_s
        self._moved.set()

    async def run(self) -> None:
        """Run until cancelled."""
        while True:
            self._moved = trio.Event()  # a new one, as a trio event cannot be cleared
            with trio.move_on_at(self._at_s):
                await self._moved.wait()
                continue
            self._dispatch(TimeCame())


class ExecutorStopped(RuntimeError):
    """A request was submitted to a graph that has stopped."""

    def __init__(self) -> None:
        super().__init__("the graph has stopped; open it again")


class TasksExecutor(Shell):
    """Runs a core under trio: logic operators in the core, service operators in their own tasks.

    `deliver`: called with every item at the sink. It must not block, and may buffer the items:
    `max_tokens` bounds the items of a request.
    """

    def __init__(
        self,
        plan: Plan,
        deliver: Callable[[Item | Forked], None],
        *,
        engines: Mapping[str, tuple[Engine, ...]] | None = None,
        max_hold_s: float = inf,
        record: RecordDecision | None = None,
    ) -> None:
        self._timer = Timer(self.dispatch)
        self.is_stopped = False
        super().__init__(
            plan,
            deliver,
            TrioWaits(),
            engines=engines or {},
            max_hold_s=max_hold_s,
            record=record,
            clock=trio.lowlevel.current_clock().current_time,
            now=trio.current_time,  # operators read the same clock as the core
            set_timer=self._timer.set,
        )

    async def run(self, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        """Run until cancelled, or until an engine or a task of an operator raises.

        Then all open requests end as failed, so that no caller waits forever.
        """
        try:
            async with trio.open_nursery() as nursery:
                for engine in self.all_engines:
                    nursery.start_soon(engine.run)
                self.start_hosts(nursery)
                nursery.start_soon(self._timer.run)
                task_status.started()
        finally:
            # In this order, no new request can enter, and all requests end before tasks continue.
            self.is_stopped = True
            self.dispatch(Stopped())
            self._at_rest.unpark_all()
            self.emissions.end()

    async def submit(self, *choices: Request) -> None:
        """Send all choices of one request into the graph through `source`.

        In a graph without a queue, waits for credit; if cancelled meanwhile, the request ends as
        cancelled. Raises ExecutorStopped, and ValueError if the request id is in use.
        """
        if self.is_stopped:
            raise ExecutorStopped
        request_id = choices[0].request_id
        if request_id in self.core.register:
            raise ValueError(f"request {request_id!r} is running already")
        try:
            await self.emissions.wait(choices, lambda ticket: Arrived(ticket, choices))
        except BaseException:
            self.dispatch(Signalled(Signal("cancel", request_id)))
            raise

    def signal(self, signal: Signal) -> None:
        """End a request or one of its choices. Unknown requests are ignored."""
        self.dispatch(Signalled(signal))

    async def idle(self) -> None:
        """Wait until all requests have ended and all blocks are free, or the executor stops."""
        while not self.core.is_at_rest and not self.is_stopped:
            await self._at_rest.park()
        for engine in self.all_engines:
            await engine.idle()
