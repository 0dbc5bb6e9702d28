"""Spare worker processes: they have imported what a worker needs, and wait for a part.

A worker that takes the place of another is there a second or two earlier, and takes no CPU time for
imports while others make up for the loss.
"""

from collections.abc import Callable

import trio

from sagellm.graphs.log import get_logger
from sagellm.runtime.cluster.process import Process

log = get_logger("sagellm.cluster")

QUIET_S = 5.0  # after the last start of a worker: a spare is not to compete with it
_LOOK_S = 60.0  # between two looks whether one has died


class Spares:
    """Keeps `count` of them while `run` runs; `start` begins one."""

    def __init__(self, start: Callable[[], Process], count: int) -> None:
        self._start = start
        self._count = count
        self._waiting: list[Process] = []
        self._stirred = trio.Event()

    def stir(self) -> None:
        """A worker starts: wait with the next spare."""
        self._stirred.set()

    def take(self, part: bytes) -> Process | None:
        """One that was given its part; None where none waits."""
        while self._waiting:
            process = self._waiting.pop()
            try:
                process.tell(part)
            except OSError:  # it has died
                process.kill()
                process.close()
            else:
                return process
        return None

    async def run(self) -> None:
        """Until cancelled; then none is left."""
        try:
            while self._count:
                await self._quiet()
                self._fill()
                with trio.move_on_after(_LOOK_S):
                    await self._stirred.wait()
        finally:
            with trio.CancelScope(shield=True):
                for process in self._waiting:
                    process.kill()
                    await process.wait()
                    process.close()

    async def _quiet(self) -> None:
        """Wait until no worker has started for a while."""
        while True:
            self._stirred = trio.Event()
            with trio.move_on_after(QUIET_S) as waiting:
                await self._stirred.wait()
            if waiting.cancelled_caught:
                return

    def _fill(self) -> None:
        for process in [one for one in self._waiting if one.has_ended]:
            self._waiting.remove(process)
            process.close()
        try:
            while len(self._waiting) < self._count:
                self._waiting.append(self._start())
        except OSError as error:  # workers are started without
            log.warning("spare_not_started", error=error.strerror)
