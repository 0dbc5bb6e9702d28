"""Worker threads that are never more than so many, however many callers gave up on theirs."""

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import cached_property
from typing import Any, Generic, TypeVar

import anyio
import anyio.lowlevel
import anyio.to_thread

T = TypeVar("T")


class Threads:
    """At most `limit` at work; work whose caller has left keeps its place until it ends.

    anyio's own limiter promises that on trio only: on asyncio it gives the place of an abandoned
    thread to the next caller, so that hung work would pile up threads without a bound.
    """

    def __init__(self, limit: int) -> None:
        self._limit = limit

    # Made where it is first used: its owner may be built on another loop than it runs on.
    @cached_property
    def _places(self) -> anyio.CapacityLimiter:
        return anyio.CapacityLimiter(self._limit)

    async def run(self, work: Callable[[], T]) -> T:
        """The work's result, from a thread. Cancelling it leaves the work to end by itself."""
        job = _Job(work, self._places, anyio.lowlevel.current_token())
        await self._places.acquire_on_behalf_of(job)
        try:
            # A limiter of its own, so that the places above are all that bounds the threads.
            own = anyio.CapacityLimiter(1)
            return await anyio.to_thread.run_sync(job, abandon_on_cancel=True, limiter=own)
        finally:
            job.leave()


class _Job(Generic[T]):
    """Work in a thread; its place goes back when both it and its caller are done with it."""

    def __init__(
        self,
        work: Callable[[], T],
        places: anyio.CapacityLimiter,
        loop: anyio.lowlevel.EventLoopToken,
    ) -> None:
        self._work = work
        self._places = places
        self._loop = loop
        self._lock = threading.Lock()
        self._at_work = False
        self._left = False

    def __call__(self) -> T:
        with self._lock:
            if self._left:  # its place is given back already
                raise RuntimeError("the work's caller left before it began")
            self._at_work = True
        try:
            return self._work()
        finally:
            with self._lock:
                self._at_work = False
                left = self._left
            if left:
                self._release_from_thread()

    def leave(self) -> None:
        """The caller waits no longer; called once, on the loop."""
        with self._lock:
            self._left = True
            at_work = self._at_work
        if not at_work:
            self._places.release_on_behalf_of(self)

    def _release_from_thread(self) -> None:
        """Not waited for: a loop that is about to close would never answer."""
        loop: Any = self._loop.native_token  # trio's, or asyncio's event loop
        soon = getattr(loop, "run_sync_soon", None) or loop.call_soon_threadsafe
        with suppress(RuntimeError):  # the loop is over, and its places with it
            soon(self._places.release_on_behalf_of, self)
