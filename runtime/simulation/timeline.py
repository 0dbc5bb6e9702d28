"""Simulated time: a heap of calls, tasks that run between them, and what tasks wait with.

No task of trio runs here. A task is a coroutine that waits only with the primitives of this file:
so the same operators run in simulated time, a thousand times as fast as under trio's mock clock.
Equal calls at equal times run in the order in which they were made.
"""

import gc
import types
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from contextlib import AbstractContextManager, contextmanager
from heapq import heappop, heappush
from types import TracebackType
from typing import Any

import trio


class SimulationError(Exception):
    """A graph, or what it calls, cannot be simulated. `fix`: what to change."""

    def __init__(self, message: str, fix: str = "see docs/simulation.md") -> None:
        super().__init__(message)
        self.fix = fix


class ScopeCancelled(BaseException):
    """Ends the block of a cancelled scope, which catches it."""

    def __init__(self, scope: "SimulatedScope") -> None:
        super().__init__(scope)
        self.scope = scope


class Timeline:
    """The clock and the tasks of one simulation. Implements `Waits` and `Spawner`."""

    def __init__(self) -> None:
        self.now = 0.0
        self.current: Task | None = None
        self._calls: list[tuple[float, int, int, Callable[[], None]]] = []
        self._num_calls = 0
        self._ready: deque[tuple[Task, BaseException | None]] = deque()

    def time(self) -> float:
        return self.now

    def at(self, at_s: float, call: Callable[[], None], *, is_late: bool = False) -> None:
        """Call `call` at `at_s`, which is not before now. `is_late`: after all others of that time
        that are not late, and after the tasks that these wake.
        """
        self._num_calls += 1
        heappush(self._calls, (max(at_s, self.now), is_late, self._num_calls, call))

    def run(self, until_s: float = float("inf")) -> None:
        """Run all tasks and calls, until `until_s` or until none is left."""
        self._run_ready()
        calls = self._calls
        while calls and calls[0][0] <= until_s:
            self.now, _, _, call = heappop(calls)
            call()
            self._run_ready()

    def start_soon(self, function: Callable[[], Awaitable[Any]], /) -> None:
        self.wake(Task(function, self))

    def wake(self, task: "Task", error: BaseException | None = None) -> None:
        """Let a task go on once the running task waits; with `error`, by raising it there."""
        self._ready.append((task, error))

    def _run_ready(self) -> None:
        ready = self._ready
        while ready:
            task, error = ready.popleft()
            task.resume(error)

    # ---- Waits -------------------------------------------------------------------------------

    def lot(self) -> "SimulatedLot":
        return SimulatedLot(self)

    def flag(self) -> "SimulatedFlag":
        return SimulatedFlag(self)

    def scope(self) -> "SimulatedScope":
        return SimulatedScope(self)

    def fail_after(self, seconds: float) -> AbstractContextManager[object]:
        return _Limit(self, seconds)

    async def checkpoint(self) -> None:
        """Do nothing: simulated tasks that do not wait take no time."""

    async def checkpoint_if_cancelled(self) -> None:
        """Do nothing: a cancelled task ends where it waits."""

    async def sleep(self, seconds: float) -> None:
        """Wait for `seconds` of simulated time."""
        flag = SimulatedFlag(self)
        self.at(self.now + seconds, flag.set)
        await flag.wait()


class Task:
    """One coroutine, and where it waits. `scopes`: its open scopes, outermost first."""

    __slots__ = ("_coroutine", "_function", "_timeline", "lot", "scopes")

    def __init__(self, function: Callable[[], Awaitable[Any]], timeline: Timeline) -> None:
        self._function = function
        self._coroutine: Coroutine[Any, Any, Any] | None = None  # made when the task first runs
        self._timeline = timeline
        self.lot: SimulatedLot | None = None
        self.scopes: list[SimulatedScope] = []

    def resume(self, error: BaseException | None) -> None:
        """Run until the task waits or ends. Raises what the coroutine raises."""
        timeline, coroutine = self._timeline, self._coroutine
        if coroutine is None:
            made = self._function()
            assert isinstance(made, Coroutine)
            coroutine = self._coroutine = made
        timeline.current, self.lot = self, None
        try:
            lot = coroutine.throw(error) if error else coroutine.send(None)
            while True:
                if not isinstance(lot, SimulatedLot):
                    foreign = SimulationError("waits for something outside of the simulation")
                    lot = coroutine.throw(foreign)
                    continue
                cancelled = next((scope for scope in self.scopes if scope.is_cancelled), None)
                if cancelled is None:
                    break
                lot = coroutine.throw(ScopeCancelled(cancelled))
        except StopIteration:
            return
        finally:
            timeline.current = None
        self.lot = lot
        lot.add(self)

    def cancel(self, scope: "SimulatedScope") -> None:
        """Raise ScopeCancelled where the task waits; if it runs, where it waits next."""
        if self.lot is not None:
            self.lot.remove(self)
            self.lot = None
            self._timeline.wake(self, ScopeCancelled(scope))


class SimulatedLot:
    """A place where tasks park, in order of arrival."""

    __slots__ = ("_tasks", "_timeline")

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._tasks: dict[Task, None] = {}

    def __len__(self) -> int:
        return len(self._tasks)

    @types.coroutine
    def park(self) -> Generator["SimulatedLot", None, None]:
        yield self

    def add(self, task: Task) -> None:
        self._tasks[task] = None

    def remove(self, task: Task) -> None:
        del self._tasks[task]

    def unpark(self) -> None:
        if self._tasks:
            task = next(iter(self._tasks))
            del self._tasks[task]
            task.lot = None
            self._timeline.wake(task)

    def unpark_all(self) -> None:
        while self._tasks:
            self.unpark()


class SimulatedFlag:
    """An event that happens once."""

    __slots__ = ("_is_set", "_lot")

    def __init__(self, timeline: Timeline) -> None:
        self._is_set = False
        self._lot = SimulatedLot(timeline)

    def set(self) -> None:
        self._is_set = True
        self._lot.unpark_all()

    async def wait(self) -> None:
        if not self._is_set:
            await self._lot.park()


class SimulatedScope:
    """A block of the running task that can be cancelled. Used once."""

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._task: Task | None = None
        self.is_cancelled = False
        self.cancelled_caught = False

    def cancel(self) -> None:
        self.is_cancelled = True
        if self._task is not None:
            self._task.cancel(self)

    def __enter__(self) -> "SimulatedScope":
        assert self._timeline.current is not None
        self._task = self._timeline.current
        self._task.scopes.append(self)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None:
        assert self._task is not None
        self._task.scopes.remove(self)
        self._task = None
        self.cancelled_caught = isinstance(error, ScopeCancelled) and error.scope is self
        return self.cancelled_caught


class _Limit(SimulatedScope):
    """A block that may take `seconds`. Raises trio.TooSlowError, as `trio.fail_after` does."""

    def __init__(self, timeline: Timeline, seconds: float) -> None:
        super().__init__(timeline)
        self._seconds = seconds

    def __enter__(self) -> "_Limit":
        super().__enter__()
        self._timeline.at(self._timeline.now + self._seconds, self._expire)
        return self

    def _expire(self) -> None:
        if self._task is not None:
            self.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if super().__exit__(kind, error, trace):
            raise trio.TooSlowError


@contextmanager
def few_collections() -> Iterator[None]:
    """Switch off automatic collections of garbage: a simulation makes few cycles, and its open
    requests would be looked through again and again.
    """
    was_enabled = gc.isenabled()
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.unfreeze()
        if was_enabled:
            gc.enable()
