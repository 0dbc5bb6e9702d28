"""One long-lived thread that computes what a trio task hands it, one job at a time."""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Generic, TypeVar

import trio

T = TypeVar("T")


@dataclass(slots=True)
class Job(Generic[T]):
    """A call on its way: `outcome` waits for it."""

    function: Callable[[], T]
    done: trio.Event = field(default_factory=trio.Event)
    result: T | None = None
    error: BaseException | None = None

    async def outcome(self) -> T:
        """What the function returns; raises what it raises.

        Shielded: a computation cannot be interrupted, and what it writes must not be freed before
        it ends. A cancellation is delivered afterwards.
        """
        with trio.CancelScope(shield=True):
            await self.done.wait()
        await trio.lowlevel.checkpoint_if_cancelled()
        if self.error is not None:
            raise self.error
        return self.result  # type: ignore[return-value]


class Worker:
    """A thread between `start` and `stop`; the same one for all jobs.

    The same one, because OpenMP and the C kernels keep a team of threads for each thread that
    calls them: trio's own cache of threads would make a team for every thread of its cache.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._jobs: queue.SimpleQueue[Job[object] | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        token = trio.lowlevel.current_trio_token()
        self._thread = threading.Thread(target=self._work, args=(token,), name=self._name)
        self._thread.start()

    def stop(self) -> None:
        """End the thread. No job may be running, so this takes microseconds."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()
            self._thread = None

    def put(self, function: Callable[[], T]) -> Job[T]:
        """Call `function` on the thread, behind what was put before."""
        job: Job[T] = Job(function)
        self._jobs.put(job)  # type: ignore[arg-type]
        return job

    async def run(self, function: Callable[[], T]) -> T:
        """Call `function` on the thread; shielded, and raises what it raises."""
        return await self.put(function).outcome()

    def _work(self, token: trio.lowlevel.TrioToken) -> None:
        while (job := self._jobs.get()) is not None:
            try:
                job.result = job.function()
            except BaseException as error:
                job.error = error
            token.run_sync_soon(job.done.set)
