"""Worker threads with a bound that also counts threads whose callers have given up."""

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

_LOOK_S = 0.02  # the shortest interval between two readings of the work's CPU time


class Overrun(Exception):
    """The work exceeded its CPU time. It continues in its thread, without its caller."""


class NoThread(Exception):
    """All threads run work whose callers have given up, so none is likely to become free."""


class WorkerThreads:
    """Runs work in at most `limit` threads. Abandoned work keeps its thread until it ends.

    anyio's own limiter guarantees this only on trio. On asyncio it frees the place of an abandoned
    thread at once, so hung work would use threads without a bound.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._num_abandoned = 0

    # Made at the first use: the owner may be built on another loop than it runs on.
    @cached_property
    def _places(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(self._limit)

    async def run(self, work: Callable[[], T]) -> T:
        """Run work in a thread, and return its result. Cancellation abandons the work."""
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
        """As `run`, for work that may use `max_cpu_s` seconds of CPU time.

        Waiting for a thread, a core or the interpreter lock does not count. Raises Overrun if the
        work uses more, and NoThread if no thread is likely to become free.
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
        """Cancel `scope`, with an error in `timed`, if the work takes too long or cannot start."""
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
    """Return a clock of the calling thread's CPU time, which other threads can read.

    A system without such a clock (macOS) gets the wall clock, so waiting counts there too.
    """
    clock_id_of = getattr(time, "pthread_getcpuclockid", None)
    if clock_id_of is None:
        return time.monotonic
    return partial(time.clock_gettime, clock_id_of(threading.get_ident()))


class _Job(Generic[T]):
    """Work for a thread. If the caller leaves first, the end of the work calls `end_abandoned`.

    `end_abandoned` runs on the loop.
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
            if self._left:  # `run` has released the place, so this thread would be one too many
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
        """Record that the caller has left. Return whether the work is still running.

        Called once, on the loop.
        """
        with self._lock:
            self._left = True
            return self._at_work

    def _end_from_thread(self) -> None:
        """Schedule `end_abandoned` on the loop, from the thread."""
        # Without waiting: a loop that is about to close never runs the call.
        loop: Any = self._loop.native_token  # trio's, or asyncio's event loop
        soon = getattr(loop, "run_sync_soon", None) or loop.call_soon_threadsafe
        with suppress(RuntimeError):  # the loop has ended
            soon(self._end_abandoned, self)
