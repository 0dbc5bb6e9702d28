"""The one timer of an executor."""

from collections.abc import Callable
from math import inf

import trio

from sagellm.runtime.core.effects import WakeAt
from sagellm.runtime.core.events import Event, TimeCame


class Timer:
    """Tells the core when the time that it asked for last has come."""

    def __init__(self, happen: Callable[[Event], None]) -> None:
        self._happen = happen
        self._at_s = inf
        self._moved = trio.Event()

    def set(self, effect: WakeAt) -> None:
        self._at_s = effect.at_s
        self._moved.set()

    async def run(self) -> None:
        """Until cancelled."""
        while True:
            self._moved = trio.Event()
            with trio.move_on_at(self._at_s):
                await self._moved.wait()
                continue
            self._happen(TimeCame())
