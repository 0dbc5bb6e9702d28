"""Runs a load: a closed loop of so many at a time, or an open loop at given times."""

from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field

import trio

from sagellm.load.record import Record
from sagellm.load.trace import Arrival

Send = Callable[[int, Arrival, float], Awaitable[Record]]  # number, request, when it was planned


@dataclass(slots=True)
class Drive:
    """One load under way. `stop`, once cancelled, sends nothing more; what runs goes on.

    `records` grow as requests end. `num_open` and its highest value are of this client.
    """

    send: Send
    now_s: Callable[[], float]  # since the load began
    report: Callable[[Record], None] = lambda record: None
    stop: trio.CancelScope = field(default_factory=trio.CancelScope)
    records: list[Record] = field(default_factory=list)
    num_open: int = 0
    num_open_peak: int = 0

    async def closed(
        self, arrivals: Iterator[Arrival], concurrency: int, until_s: float = float("inf")
    ) -> None:
        """So many at a time, each followed by the next, until time or requests are over."""
        numbered = enumerate(arrivals)
        async with trio.open_nursery() as nursery:
            for _ in range(concurrency):
                nursery.start_soon(self._worker, numbered, until_s)

    async def open(self, arrivals: Iterator[Arrival]) -> None:
        """Each at its time, however many are under way: a slow server is spared nothing."""
        async with trio.open_nursery() as nursery:
            with self.stop:
                for number, arrival in enumerate(arrivals):
                    await trio.sleep(max(0.0, arrival.at_s - self.now_s()))
                    nursery.start_soon(self._one, number, arrival, arrival.at_s)

    async def _worker(self, numbered: "enumerate[Arrival]", until_s: float) -> None:
        while not self.stop.cancel_called and self.now_s() < until_s:
            found = next(numbered, None)
            if found is None:
                return
            await self._one(*found, self.now_s())

    async def _one(self, number: int, arrival: Arrival, planned_s: float) -> None:
        self.num_open += 1
        self.num_open_peak = max(self.num_open_peak, self.num_open)
        try:
            record = await self.send(number, arrival, planned_s)
        finally:
            self.num_open -= 1
        self.records.append(record)
        self.report(record)
