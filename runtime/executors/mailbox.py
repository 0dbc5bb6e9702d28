"""A mailbox: what waits for one service operator; its size is bounded by the gate before it."""

from collections import deque
from collections.abc import Callable

import trio

from sagellm.runtime.messages import Item


class Mailbox:
    """First in, first out; items of an ended request can be taken out of the middle."""

    def __init__(self) -> None:
        self._items: deque[Item] = deque()
        self._waiting = trio.lowlevel.ParkingLot()

    def __len__(self) -> int:
        return len(self._items)

    def put(self, item: Item) -> None:
        self._items.append(item)
        self._waiting.unpark()

    async def take(self) -> Item:
        """The oldest item; waits for one. Cancelled, it takes nothing."""
        await trio.lowlevel.checkpoint_if_cancelled()
        while not self._items:
            await self._waiting.park()
        return self._items.popleft()

    def remove(self, unwanted: Callable[[Item], bool]) -> tuple[Item, ...]:
        """Take out, and return, the items that are not wanted any more."""
        removed = tuple(item for item in self._items if unwanted(item))
        if removed:
            self._items = deque(item for item in self._items if not unwanted(item))
        return removed
