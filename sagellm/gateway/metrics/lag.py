"""How late an event loop wakes whoever sleeps on it: what a busy loop adds to every token."""

import math
from typing import Protocol

import anyio

from sagellm.gateway.metrics.bounds import LAG_S
from sagellm.runtime.buckets import Buckets


class Ticking(Protocol):
    def __call__(self) -> None: ...


class LoopLag:
    """Sleeps `interval_s` again and again, and notes by how much each sleep was too long.

    `tick` is called at each waking. One instance belongs to one loop.
    """

    def __init__(self, interval_s: float = 0.5, tick: Ticking | None = None) -> None:
        self.seconds = Buckets(LAG_S)
        self._interval_s = interval_s
        self._tick = tick
        self._latest_s = 0.0
        self._due_s = math.inf

    def now_s(self) -> float:
        """How late the latest sleeper is, or was."""
        return max(self._latest_s, anyio.current_time() - self._due_s)

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._due_s = anyio.current_time() + self._interval_s
            await anyio.sleep_until(self._due_s)
            self._latest_s = max(anyio.current_time() - self._due_s, 0.0)
            self.seconds.observe(self._latest_s)
            if self._tick is not None:
                self._tick()
