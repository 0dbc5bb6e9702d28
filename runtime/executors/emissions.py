"""Items that tasks send into the core, and the tasks that wait until they have found credit."""

from collections.abc import Callable
from itertools import count, islice

import trio

from sagellm.runtime.core.effects import Parked, Resumed
from sagellm.runtime.core.events import Emitted, Event, Withdrawn
from sagellm.runtime.messages import Item


class _Emission:
    """Items that a task waits to be rid of."""

    def __init__(self, items: tuple[Item, ...], sent: Callable[[Item], None] | None) -> None:
        self._items = iter(items)
        self._num_left = len(items)
        self._sent = sent
        self.is_over = trio.Event()

    def advance(self, number: int) -> None:
        """So many more of the items were sent."""
        for item in islice(self._items, number):
            if self._sent is not None:
                self._sent(item)
        self._num_left -= number
        if not self._num_left:
            self.is_over.set()


class Emissions:
    """`happen` tells the core of an event, and does what it asks for."""

    def __init__(self, happen: Callable[[Event], None]) -> None:
        self._happen = happen
        self._tickets = count(1)
        self._num_sent: dict[int, int] = {}  # by ticket, before its task waits
        self._emissions: dict[int, _Emission] = {}  # of tasks that wait

    async def emit(
        self,
        node: str,
        replica: int,
        items: tuple[Item, ...],
        outlet: str = "out",
        sent: Callable[[Item], None] | None = None,
    ) -> None:
        """Send items of a service operator, waiting for credit; `sent` is called for each."""
        await trio.lowlevel.checkpoint_if_cancelled()
        await self.wait(items, lambda ticket: Emitted(ticket, node, replica, items, outlet), sent)

    async def wait(
        self,
        items: tuple[Item, ...],
        event: Callable[[int], Event],
        sent: Callable[[Item], None] | None = None,
    ) -> None:
        """Tell the core of items, and wait until all have found credit."""
        ticket = next(self._tickets)
        self._happen(event(ticket))
        num_sent = self._num_sent.pop(ticket, len(items))
        if sent is not None:
            for item in items[:num_sent]:
                sent(item)
        if num_sent == len(items):
            return
        emission = self._emissions[ticket] = _Emission(items[num_sent:], sent)
        try:
            await emission.is_over.wait()
        except BaseException:
            self._happen(Withdrawn(ticket))
            raise
        finally:
            del self._emissions[ticket]

    def advance(self, effect: Parked | Resumed) -> None:
        """Items of a ticket were sent; its task does not wait yet, or waits for them."""
        emission = self._emissions.get(effect.ticket)
        if emission is not None:
            emission.advance(effect.num_sent)
        else:
            before = self._num_sent.get(effect.ticket, 0)
            self._num_sent[effect.ticket] = before + effect.num_sent

    def end(self) -> None:
        """The graph stops: let every task go on."""
        for emission in self._emissions.values():
            emission.is_over.set()
