"""The time of the host around a simulated engine: before a sequence enters, after events leave."""

from collections import deque
from collections.abc import Callable, Iterable

from sagellm.runtime.engine.costs.profile import HostCost
from sagellm.runtime.port import EngineEvent
from sagellm.runtime.simulation.timeline import Timeline


class SimulatedMailbox:
    """The events of one operator's sequences, one batch for each change of the engine's batch."""

    def __init__(self, timeline: Timeline) -> None:
        self._batches: deque[tuple[EngineEvent, ...]] = deque()
        self._arrived = timeline.lot()

    def post(self, events: Iterable[EngineEvent]) -> None:
        self._batches.append(tuple(events))
        self._arrived.unpark()

    def __aiter__(self) -> "SimulatedMailbox":
        return self

    async def __anext__(self) -> tuple[EngineEvent, ...]:
        while not self._batches:
            await self._arrived.park()
        return self._batches.popleft()


class HostTimes:
    """Calls what the host does for one engine, at the times at which it would be done. Without a
    cost, everything is done at once.

    Sequences enter one after another. Events leave in order: those of a later step never before
    those of an earlier one.
    """

    def __init__(self, timeline: Timeline, cost: HostCost | None) -> None:
        self._timeline = timeline
        self._cost = cost
        self._entered_s = 0.0  # when the latest sequence has entered, or will
        self._delivered_s = 0.0
        self._leaving: deque[Callable[[], None]] = deque()

    def enter(self, num_prompt: int, call: Callable[[], None]) -> None:
        """Call after the time that a sequence with a prompt of `num_prompt` tokens takes."""
        if self._cost is None:
            call()
            return
        seconds = self._cost.submit_s + num_prompt * self._cost.submit_token_s
        self._entered_s = max(self._entered_s, self._timeline.now) + seconds
        self._timeline.at(self._entered_s, call)

    def deliver(self, num_rows: int, call: Callable[[], None]) -> None:
        """Call after the time that the events of a step with `num_rows` sequences take."""
        if self._cost is None:
            call()
            return
        seconds = self._cost.deliver_s + num_rows * self._cost.deliver_row_s
        self._delivered_s = max(self._delivered_s, self._timeline.now + seconds)
        self._leaving.append(call)
        self._timeline.at(self._delivered_s, self._leave)

    def flush(self) -> None:
        """Deliver now what is on its way: the engine dies, and nothing may come after that."""
        while self._leaving:
            self._leaving.popleft()()

    def _leave(self) -> None:
        if self._leaving:  # else a flush was earlier
            self._leaving.popleft()()
