"""A bounded number of worker threads, also where callers gave up on their work."""

import threading
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from typing import Any, Generic, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

T = TypeVar("T")

_LOOK_S = 0.02  # the shortest time between two looks at the CPU time of work


class Overrun(Exception):
    """The work exceeded its CPU time. The thread goes on until the work ends."""


class NoThread(Exception):
    """Every thread has abandoned work: no thread is likely to become free."""


class WorkerThreads:
    """At most `limit` threads. Work whose caller has left keeps its thread until it ends.

    anyio's own limiter promises that on trio only. On asyncio it gives the place of an abandoned
    thread to the next caller, so hung work would pile up threads without a bound.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_abandoned = 0

    # Made at the first use: the owner may be built on another loop than it runs on.
    @cached_property
    def _places(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(self._limit)

    async def run(self, work: Callable[[], T]) -> T:
        """Return the work's result, from a thread. Cancellation does not stop the work."""
        job = _Job(work, anyio.lowlevel.current_token(), self._end_abandoned)
        await self._places.acquire_on_behalf_of(job)
        try:
            # A new limiter, so that only the places above bound the threads.
            own = anyio.CapacityLimiter(1)
            return await anyio.to_thread.run_sync(job, abandon_on_cancel=True, limiter=own)
        finally:
            if job.leave():
                self._num_abandoned += 1
            else:
                self._places.release_on_behalf_of(job)

    async def run_within(self, max_cpu_s: float, work: Callable[[], T]) -> T:
        """As `run`, for work that may use `max_cpu_s` of CPU time. Waiting for a thread, a core or
        the interpreter's lock does not count.

        Raises Overrun, and NoThread where no thread is likely to become free.
        """
        timed = _Timed(work)
        async with anyio.create_task_group() as tasks:
            tasks.start_soon(self._watch, timed, max_cpu_s, tasks.cancel_scope)
            try:
                await self.run(timed)
            except Exception as error:  # raised below: the task group would wrap it
                timed.error = error
            tasks.cancel_scope.cancel()
        return timed.result()

    async def _watch(self, timed: "_Timed[T]", max_cpu_s: float, scope: anyio.CancelScope) -> None:
        while timed.error is None:
            await anyio.sleep(max(_LOOK_S, max_cpu_s - timed.cpu_s))
            if timed.cpu_s >= max_cpu_s:
                timed.error = Overrun()
            elif not timed.is_begun and self._is_stuck:
                timed.error = NoThread()
        scope.cancel()

    @property
    def _is_stuck(self) -> bool:
        return self._num_abandoned >= self._limit

    def _end_abandoned(self, job: "_Job[Any]") -> None:
        self._num_abandoned -= 1
        self._places.release_on_behalf_of(job)


class _Timed(Generic[T]):
    """Work whose CPU time can be read from any thread while the work runs."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._found: list[T] = []
        self._clock: Callable[[], float] | None = None  # the clock of the thread that does the work
        self._began_s = 0.0
        self.is_begun = False
        self.error: Exception | None = None

    def __call__(self) -> None:
        clock = _own_clock()
        self._began_s = clock()
        self._clock = clock
        self.is_begun = True
        try:
            self._found.append(self._work())
        finally:
            self._clock = None

    @property
    def cpu_s(self) -> float:
        clock = self._clock
        if clock is None:
            return 0.0
        with suppress(OSError):  # the thread has ended since
            return clock() - self._began_s
        return 0.0

    def result(self) -> T:
        if self.error is not None and not self._found:
            raise self.error
        return self._found[0]


def _own_clock() -> Callable[[], float]:
    """Return the clock of the calling thread's CPU time, which all threads may read.

    Where the system has no such clock (macOS), the wall clock is returned, and waiting counts too.
    """
    clock_id_of = getattr(time, "pthread_getcpuclockid", None)
    if clock_id_of is None:
        return time.monotonic
    return partial(time.clock_gettime, clock_id_of(threading.get_ident()))


class _Job(Generic[T]):
    """Work in a thread. If the caller leaves first, `end_abandoned` is called on the loop after the
    end of the work.
    """

    def __init__(
        self,
        work: Callable[[], T],
        loop: anyio.lowlevel.EventLoopToken,
        end_abandoned: "Callable[[_Job[Any]], None]",
    ) -> None:
        self._work = work
        self._loop = loop
        self._end_abandoned = end_abandoned
        self._lock = threading.Lock()
        self._at_work = False
        self._left = False

    def __call__(self) -> T:
        with self._lock:
            if self._left:  # its place is free already
                raise RuntimeError("the work's caller left before it began")
            self._at_work = True
        try:
            return self._work()
        finally:
            with self._lock:
                self._at_work = False
                left = self._left
            if left:
                self._end_from_thread()

    def leave(self) -> bool:
        """Return whether the work goes on without its caller. Called once, on the loop."""
        with self._lock:
            self._left = True
            return self._at_work

    def _end_from_thread(self) -> None:
        """Call `end_abandoned` without waiting: a loop that is about to close never answers."""
        loop: Any = self._loop.native_token  # trio's, or asyncio's event loop
        soon = getattr(loop, "run_sync_soon", None) or loop.call_soon_threadsafe
        with suppress(RuntimeError):  # the loop has ended
            soon(self._end_abandoned, self)
