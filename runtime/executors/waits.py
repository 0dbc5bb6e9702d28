"""The primitives that tasks of an executor wait with: those of trio, or those of simulated time;
and the timer of a core under trio.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager
from math import inf
from types import TracebackType
from typing import Any, Protocol

import trio

from sagellm.runtime.core.effects import WakeAt
from sagellm.runtime.core.events import Event, TimeCame


class Lot(Protocol):
    """A place where tasks park until another task wakes them, in order of arrival."""

    async def park(self) -> None: ...

    def unpark(self) -> Any: ...

    def unpark_all(self) -> Any: ...

    def __len__(self) -> int: ...


class Flag(Protocol):
    """An event that happens once."""

    def set(self) -> None: ...

    async def wait(self) -> None: ...


class Scope(Protocol):
    """A block of a task that can be cancelled from outside."""

    @property
    def cancelled_caught(self) -> bool:
        """Whether the block ended because of `cancel`."""

    def cancel(self) -> None: ...

    def __enter__(self) -> Any: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool | None: ...


class Waits(Protocol):
    """Makes the primitives of one executor."""

    def lot(self) -> Lot: ...

    def flag(self) -> Flag: ...

    def scope(self) -> Scope: ...

    def fail_after(self, seconds: float) -> AbstractContextManager[object]:
        """Cancel the block after `seconds`, and raise trio.TooSlowError."""

    async def checkpoint(self) -> None: ...

    async def checkpoint_if_cancelled(self) -> None: ...


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
