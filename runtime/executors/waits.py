"""The primitives that tasks of an executor wait with: those of trio, or those of simulated time."""

from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any, Protocol


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
